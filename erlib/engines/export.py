"""Exports and compresses engines, as a process of its own: ``python -m erlib.engines.export``."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
from optimum.exporters.openvino import main_export
from optimum.intel import OVConfig
from transformers import LlamaForCausalLM

from erlib import cache
from erlib.config import Dtype
from erlib.engines.inference import feed
from erlib.engines.worker import do_jobs

# group_size 64 divides both 576 and 1,536. Embedding and lm_head stay INT8 in INT4, as AWQ leaves them wide.
_RECIPES: dict[Dtype, dict[str, Any]] = {
    "int8": {"mode": "INT8_SYM"},
    "fp8": {"mode": "FP8_E4M3", "group_size": -1, "all_layers": True},
    "int4": {"mode": "INT4_SYM", "group_size": 64, "awq": True, "scale_estimation": True},
}


def _build_worker(jobs: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    nncf.set_log_level("ERROR")
    for job in jobs:
        started_s = time.monotonic()
        target, facts = Path(job["target"]), job["facts"]
        partial = Path(job["scratch"]) / target.name
        if facts["dtype"] == "fp16":
            _export(Path(job["checkpoint"]), facts["layers"], partial)
        else:
            _compress(Path(job["fp16"]), facts["dtype"], job["calibration"], partial)
        facts["weights_bytes"] = (partial / "openvino_model.bin").stat().st_size
        facts["stored_as"] = _stored_as(partial)
        facts["build_s"] = round(time.monotonic() - started_s, 1)
        (partial / "engine.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
        cache.put(partial, target)
        yield facts


def _export(source: Path, layers: int, out: Path) -> None:
    """Export the first `layers` layers, with the embedding and the final norm, as a stateful FP16 model."""
    with tempfile.TemporaryDirectory() as scratch:
        sibling = Path(scratch)
        LlamaForCausalLM.from_pretrained(source, num_hidden_layers=layers).half().save_pretrained(sibling)
        for file in source.glob("*token*.json"):
            shutil.copy(file, sibling)
        main_export(
            str(sibling),
            output=out,
            task="text-generation-with-past",
            ov_config=OVConfig(dtype="fp16"),
            stateful=True,
            convert_tokenizer=True,
            library_name="transformers",
        )
    shutil.copy(source / "tokenizer.json", out)


def _compress(fp16: Path, dtype: Dtype, calibration: list[list[int]], out: Path) -> None:
    """Compress the weights of an FP16 engine and copy everything else."""
    recipe = {**_RECIPES[dtype], "mode": nncf.CompressWeightsMode[_RECIPES[dtype]["mode"]]}
    if recipe.get("awq"):
        samples = nncf.Dataset([feed(np.array(ids)) for ids in calibration])
        recipe |= {"dataset": samples, "subset_size": len(calibration)}
    model = nncf.compress_weights(openvino.Core().read_model(fp16 / "openvino_model.xml"), **recipe)
    shutil.copytree(fp16, out, ignore=shutil.ignore_patterns("openvino_model.*", "engine.json"))
    openvino.save_model(model, out / "openvino_model.xml", compress_to_fp16=False)


def _stored_as(engine: Path) -> dict[str, int]:
    """Weights per element type, read back from the file; scales and other small constants are left out."""
    counts: dict[str, int] = {}
    for op in openvino.Core().read_model(engine / "openvino_model.xml").get_ops():
        if op.get_type_name() == "Constant" and len(op.get_output_shape(0)) >= 2:
            size, kind = int(np.prod(op.get_output_shape(0))), op.get_element_type().get_type_name()
            counts[kind] = counts.get(kind, 0) + size
    return {kind: size for kind, size in counts.items() if size >= 100_000}


if __name__ == "__main__":
    do_jobs(_build_worker)

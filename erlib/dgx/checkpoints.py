"""Checkpoints, the papers' and one more: where they come from, and where they and what is made of them lie."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from erlib import paths
from erlib.config import ConfigError, Profile
from erlib.dgx.containers import Places

CHECKPOINTS = {
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
}
"""Repositories on the Hugging Face hub. Neither paper says whether base or chat models were served: base models."""

CALIBRATION = "cnn_dailymail"
"""Calibration texts, the tools' own default; a directory of this name beside the checkpoints, so no hub is asked."""

TEXTS = f"abisee/{CALIBRATION}"
"""Their repository on the hub."""


def source(model: str, places: Places) -> Path:
    """Where a model's checkpoint is downloaded to."""
    return places.checkpoints / CHECKPOINTS[model].partition("/")[2]


def fetch_tokenizer(model: str, places: Places) -> Path:
    """``tokenizer.json`` of a model, downloaded beside where its weights go if it is not there."""
    file = source(model, places) / "tokenizer.json"
    for name in (file.name, "tokenizer_config.json"):
        try:
            if not (file.parent / name).exists():
                huggingface_hub.hf_hub_download(CHECKPOINTS[model], name, local_dir=file.parent)
        except (HfHubHTTPError, OSError) as error:
            raise ConfigError(
                f"{CHECKPOINTS[model]}: no {name} ({str(error).splitlines()[0]}). The repository is gated: accept its "
                f"licence on huggingface.co and set HF_TOKEN, or put the checkpoint into {file.parent}"
            ) from None
    return file


def places(profile: Profile) -> Places:
    """The profile's directories, absolute."""
    settings = profile.tensorrt_llm
    checkpoints = settings.checkpoints or paths.CACHE / "checkpoints"
    return Places(Path(checkpoints).resolve(), Path(settings.work or paths.ENGINE_BUILDS / "tensorrt_llm").resolve())

"""What experts start from and are served on, and what of that can be told to be wrong before any is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from erlib import cache
from erlib.config import ConfigError, ExpertSettings, Profile
from erlib.engines import checkpoint, llama, lora
from erlib.experts.tables import LEAST_TOKENS, PROMPT
from erlib.machine import hardware
from erlib.routing import embeddings
from erlib.routing.clusterer import RouterError
from erlib.workload import corpus


class Base(NamedTuple):
    """The model that all arms start from."""

    directory: Path
    tokenizer: Tokenizer
    end: int
    """Token that stands before every text."""
    dtype: str
    layers: int | None
    """How many of its layers are taken (none: all)."""
    key: str


def base_of(profile: Profile) -> Base:
    """The checkpoint of ``experts.checkpoint``, checked.

    Raises
    ------
    ConfigError
    """
    settings = profile.experts
    directory = Path(settings.checkpoint) if settings.checkpoint else checkpoint.checkpoint(profile.engines)
    file = directory / "config.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"experts.checkpoint: {file} cannot be read: {error}") from None
    kind = described.get("model_type") if isinstance(described, dict) else described
    if kind != "llama":
        raise ConfigError(f"experts.checkpoint: {directory} holds a {kind!r:.60}, no Llama")
    if not (words := directory / "tokenizer.json").is_file():
        raise ConfigError(f"experts.checkpoint: {directory} has no tokenizer.json")
    weights = sorted((path.name, path.stat().st_size) for path in directory.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"experts.checkpoint: {directory} has no weights in safetensors")
    named = [described.get(name) for name in ("bos_token_id", "eos_token_id")]
    ends = [end for end in named if isinstance(end, int)]
    has = described.get("num_hidden_layers")
    if not ends or not isinstance(has, int):
        lacks = "num_hidden_layers" if ends else "bos_token_id or eos_token_id"
        raise ConfigError(f"experts.checkpoint: {file} has no {lacks}")
    if settings.layers and settings.layers > has:
        raise ConfigError(f"experts.layers={settings.layers}, but the checkpoint {directory} has {has}")
    try:
        tokenizer = Tokenizer.from_file(str(words))
    except Exception as error:  # tokenizers raises nothing more particular
        raise ConfigError(f"experts.checkpoint: {words} cannot be read: {error}") from None
    key = cache.digest(described, weights, words, settings.layers)
    return Base(directory, tokenizer, ends[0], dtype_of(settings), settings.layers, key)


def dtype_of(settings: ExpertSettings) -> str:
    """``bfloat16`` where the hardware multiplies it and nothing else is asked for.

    Raises
    ------
    ConfigError
    """
    able = _multiplies_bfloat16()
    if settings.dtype == "bfloat16" and not able:
        raise ConfigError("experts.dtype=bfloat16, but this machine does not multiply it: set float32 or auto")
    return settings.dtype if settings.dtype != "auto" else "bfloat16" if able else "float32"


def _multiplies_bfloat16() -> bool:
    if hardware.gpus():
        import torch  # noqa: PLC0415  (takes two seconds, and only a GPU has to be asked by it)

        if torch.cuda.is_available():
            return torch.cuda.is_bf16_supported()
    return hardware.multiplies_bfloat16()


def check(profile: Profile) -> None:
    """Refuse at once what notebook 11 would refuse, but for what only the corpus or SmolLM2 themselves tell.

    Raises
    ------
    ConfigError
    """
    settings = profile.experts
    try:
        corpus.check(settings.corpus)
        if settings.router in ("embeddings", "neighbours"):
            embeddings.installed_model()
    except corpus.CorpusError as error:
        raise ConfigError(f"experts.corpus: {error}") from None
    except RouterError as error:
        raise ConfigError(f"experts.router={settings.router}: {error}") from None
    dtype_of(settings)
    _check_answers(settings)
    if settings.checkpoint:
        base_of(profile)
    if settings.users and profile.serving.backend == "openvino":
        check_served(profile, llama.GPUS)


def _check_answers(settings: ExpertSettings) -> None:
    """Refuse answers beside which held-out texts may have nothing to show."""
    most = min(LEAST_TOKENS, settings.sequence - 1) - PROMPT
    if settings.answer_tokens > most:
        raise ConfigError(
            f"experts.answer_tokens={settings.answer_tokens}, but with experts.sequence={settings.sequence} held-out "
            f"texts may have only {max(0, most)} tokens after a prompt of {PROMPT}: lower the first"
            + (" or raise the second" if settings.sequence <= LEAST_TOKENS else "")
        )


def check_served(profile: Profile, n: int) -> None:
    """Refuse `n` servers that the experts do not fit, before one is trained.

    Raises
    ------
    ConfigError
        If there are more or fewer clusters, gateways would route by others, or the user's own adapters are not there.
    """
    settings = profile.experts
    if profile.clusterer.n_clusters != n:
        raise ConfigError(
            f"{n} servers need an expert each, but clusterer.n_clusters is {profile.clusterer.n_clusters}"
        )
    if settings.adapters:
        lora.own(Path(settings.adapters), n)
    elif settings.router != "classify":
        raise ConfigError(
            f"experts.router={settings.router}: gateways of x1.T route by c-BTM's clusters, so that experts of other "
            "ones can be judged, not served: set experts.router=classify"
        )

"""Whether the hub gives what a profile needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from erlib.config import Profile
from erlib.dgx.builds import PlannedSteps
from erlib.dgx.checkpoints import CALIBRATION, CHECKPOINTS, TEXTS
from erlib.dgx.tensorrt_llm import Plan
from erlib.workload import corpus

LICENCES = {
    "llama-2-": "Llama 2 Community License",
    "llama-3-": "Meta Llama 3 Community License",
    "llama-3.2-": "Llama 3.2 Community License",
}


def problems_with_the_hub(profile: Profile, plans: Sequence[Plan], todo: PlannedSteps) -> Iterable[str]:
    """Checkpoints and texts that are neither here nor to be had."""
    wanted: dict[str, Path | None] = {}
    for _, step in todo:
        if step.purpose == "fetch" and step.program[0] == "hf":
            wanted[step.options[0]] = step.makes
    for plan in plans:
        if not (plan.source / "tokenizer.json").exists():
            wanted[CHECKPOINTS[plan.system.model]] = plan.source
    if profile.corpus.name == "c4" and not corpus.c4_is_cached(profile.corpus):
        wanted["allenai/c4"] = None
    if any(step.tool == "hf_ptq.py" for _, step in todo):
        wanted[TEXTS] = None
    if not wanted:
        return
    with ThreadPoolExecutor(len(wanted)) as pool:
        answers = dict(zip(wanted, pool.map(_reach, wanted), strict=True))
    unreachable = [(name, error) for name, error in answers.items() if isinstance(error, (OSError, httpx.HTTPError))
                   and not isinstance(error, HfHubHTTPError)]  # fmt: skip
    if unreachable:
        yield (
            f"the Hugging Face hub is out of reach ({last_line(str(unreachable[0][1]))}): give this machine access, "
            f"or put there from elsewhere: {', '.join(_where(name, wanted[name]) for name, _ in unreachable)}"
        )
    for name, error in answers.items():
        if isinstance(error, (GatedRepoError, RepositoryNotFoundError)) or _is_denied(error):
            yield (
                f"no access to {name}, which is gated: accept the {_licence(name)} on https://huggingface.co/{name} "
                "and set HF_TOKEN to a token of that account"
            )
        elif isinstance(error, HfHubHTTPError):
            yield f"{name}: the hub answers {last_line(str(error))}: try again, or put it into {wanted[name]}"


def _reach(name: str) -> Exception | None:
    """Why a repository cannot be had from the hub; None if it can."""
    try:
        if name in CHECKPOINTS.values():  # a gated repository shows what it is, but not its files
            get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=ANSWER_S)
        else:
            HfApi().dataset_info(name, timeout=ANSWER_S)
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        return error
    return None


def _is_denied(error: Exception | None) -> bool:
    return isinstance(error, HfHubHTTPError) and error.response is not None and error.response.status_code in (401, 403)


def _licence(name: str) -> str:
    model = next(model for model, repository in CHECKPOINTS.items() if repository == name)
    return next(licence for family, licence in LICENCES.items() if model.startswith(family))


def _where(name: str, directory: Path | None) -> str:
    if name == TEXTS and directory is None:
        return f"{name} (which hf_ptq.py fetches itself: quantise elsewhere, and copy tensorrt_llm.work here)"
    if directory is None:
        return f"{name} (or choose a corpus of your own: corpus.name=jsonl)"
    texts = " (calibration texts)" if directory.name == CALIBRATION else ""
    return f"{name}{texts} into {directory}"


ANSWER_S = 10


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no reason given"

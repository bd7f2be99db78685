"""All arms of a profile, trained and judged: what is kept is found again, what was interrupted goes on.

Each adapter, and each arm's log-probabilities of the held-out texts, is kept by what it depends on. A run that is
killed loses the arms that were being trained, and no others.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from erlib import cache, paths, provenance
from erlib.config import ConfigError, Profile
from erlib.engines import checkpoint, lora, worker
from erlib.experts import texts
from erlib.experts.base import Base, base_of, check, check_served
from erlib.experts.division import division_of
from erlib.experts.tables import ADAPTED, AVERAGE, PROMPT, SEED, TEXT, Judged, read
from erlib.experts.texts import Blocks, HeldOut
from erlib.machine import hardware
from erlib.machine.progress import Bar, say
from erlib.workload import corpus

_KEPT = paths.CACHE / "experts"
_TRAINING, _SCORING, _ANSWERING = "experts/training.py", "experts/scoring.py", "experts/answering.py"
_TABLES = ("experts/arms.py", "experts/base.py", "experts/texts.py", "experts/division.py", _TRAINING, _SCORING)
_NOT_OF_THE_TABLE = {"temperature", "checkpoint", "adapters", "users", "repeats", "answer_tokens"}
"""Settings on which scores do not depend, or that are known by content."""
_SAMPLES = 4
"""Answers to each prompt."""


def judged(profile: Profile) -> Judged:
    """Train all arms of a profile and score the held-out texts with each, or find what an earlier run has kept.

    Raises
    ------
    ConfigError
        If a cluster has too few tokens or texts, the checkpoint is no Llama, or the hardware lacks what
        ``experts.dtype`` asks for.
    ClustererError, CorpusError, RuntimeError
    """
    base = base_of(profile)
    at = texts.on_own_corpus(profile)
    division = division_of(at)
    settings = profile.experts.model_dump(mode="json", exclude=_NOT_OF_THE_TABLE)
    code = [provenance.code_digest(*_TABLES), *_versions()]
    key = cache.digest(base.key, base.dtype, corpus.fingerprint(at.corpus), division.key, settings, profile.seed, code)
    directory = paths.run_dir(profile.name) / "experts" / key
    if cache.found(directory, "experts"):
        print(f"experts: reused {key} (same texts, router, checkpoint, settings and code)")
        return read(directory)
    held_out = texts.held_out(profile, division, base.tokenizer)
    blocks = texts.training_blocks(profile, division, base.tokenizer, base.end)
    with _workers() as workers:
        adapters = _trained(profile, base, blocks, workers)
        scores = _scored(base, adapters, held_out, workers)
    rows = held_out.tokens[["document", "position"]].merge(held_out.documents[["document", "cluster"]])
    table = pd.concat([rows.assign(arm=arm, log_probability=values) for arm, values in scores.items()])
    made = Judged(*held_out, table.astype({"arm": "category"}), _training(adapters))
    with cache.building(directory) as partial:
        for name, frame in made._asdict().items():
            frame.to_parquet(partial / f"{name}.parquet", compression="zstd", index=False)
    return made


def answered(profile: Profile, judged: Judged) -> pd.DataFrame:
    """What every arm answers to the first tokens of each held-out text, four times each.

    Returns
    -------
    DataFrame
        ``document``; ``arm``, among them ``text``, how the text itself goes on; ``prompt`` and ``answer``, as text.

    Raises
    ------
    ConfigError
        If no answers are asked for, or longer ones than the texts that they stand beside.
    """
    check(profile)
    base, n = base_of(profile), profile.experts.answer_tokens
    if not n:
        raise ConfigError("experts.answer_tokens=0: no answers are asked for")
    texts_ids = judged.tokens.groupby("document")["token"].agg(list).to_list()
    division = division_of(texts.on_own_corpus(profile))
    blocks = texts.training_blocks(profile, division, base.tokenizer, base.end)
    with _workers() as workers:
        drawn = _answered(profile, base, _trained(profile, base, blocks, workers), texts_ids, workers)
    drawn[TEXT] = np.array([[ids[PROMPT : PROMPT + n]] for ids in texts_ids])
    rows = []
    for arm, of_texts in drawn.items():
        for document, (ids, samples) in enumerate(zip(texts_ids, of_texts.tolist(), strict=True)):
            prompt = base.tokenizer.decode(ids[:PROMPT])
            whole = base.tokenizer.decode_batch([ids[:PROMPT] + answer for answer in samples])
            rows += [(document, arm, prompt, text[len(prompt) :]) for text in whole]
    return pd.DataFrame(rows, columns=["document", "arm", "prompt", "answer"])


def adapters(profile: Profile, n: int, served: Path | None = None) -> list[Path]:
    """A PEFT adapter for each of the `n` clusters: the user's own (``experts.adapters``), or trained if need be.

    `served`: the checkpoint on top of which the user's own are served, if it is not the one that experts start from.

    Raises
    ------
    ConfigError
        If one is missing or is of another base model, or there are more or fewer clusters.
    ClustererError, CorpusError, RuntimeError
    """
    settings, base = profile.experts, base_of(profile)
    check_served(profile, n)
    if settings.adapters is None:
        division = division_of(texts.on_own_corpus(profile))
        blocks = texts.training_blocks(profile, division, base.tokenizer, base.end)
        with _workers() as workers:
            trained = _trained(profile, base, blocks, workers)
        return [trained[f"expert-{cluster}"] for cluster in range(n)]
    described = json.loads(((served or base.directory) / "config.json").read_text(encoding="utf-8"))
    own = lora.own(Path(settings.adapters), n)
    for directory in own:
        lora.read(directory, *(described[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")))
    return [_by_content(directory) for directory in own]


def merged(profile: Profile, adapter: Path) -> Path:
    """The checkpoint with an adapter's weights in its own: what can be exported as any checkpoint is."""
    base = base_of(profile)
    target = _KEPT / f"merged-{cache.digest(base.key, adapter.name, provenance.code_digest(_SCORING), *_versions())}"
    if not cache.found(target, "experts"):
        with cache.scratch(_KEPT) as scratch, _workers() as workers:
            job = _job(base, "", target) | {"dtype": "float32", "adapters": [str(adapter)], "scratch": str(scratch)}
            _do(workers, [job], {"": 1}, "merging an expert")
    return target


def _by_content(adapter: Path) -> Path:
    """A copy in the cache that is named by its content, as what is trained here is: points are known by that name."""
    files = [adapter / name for name in (lora.CONFIG, lora.WEIGHTS)]
    target = _KEPT / f"own-{cache.digest(*files)}"
    if not cache.found(target, "experts"):
        with cache.building(target) as partial:
            for file in files:
                shutil.copy(file, partial)
    return target


def _versions() -> list[str]:
    return [version(name) for name in ("torch", "transformers", "peft")]


def _trained(profile: Profile, base: Base, blocks: Mapping[str, Blocks], workers: worker.Workers) -> dict[str, Path]:
    """Adapter of every arm, trained where it has not been."""
    targets: dict[str, Path] = {}
    for arm, own in blocks.items():
        start = targets.get(ADAPTED)
        targets[arm] = _KEPT / f"{arm}-{_key(profile, base, own, start)}"
    missing = [arm for arm in blocks if not cache.found(targets[arm], "experts")]
    say(f"experts: {len(targets) - len(missing)} arms found by content hash, {len(missing)} to train in {base.dtype}")
    with cache.scratch(_KEPT) as scratch:
        first = [arm for arm in missing if arm == ADAPTED]
        for arms in (first, [arm for arm in missing if arm not in first]):
            jobs = [_training_job(profile, base, arm, blocks[arm], targets, scratch) for arm in arms]
            _do(workers, jobs, {job["arm"]: int(blocks[job["arm"]].size) for job in jobs}, "training experts")
    return targets


def _key(profile: Profile, base: Base, blocks: Blocks, start: Path | None) -> str:
    settings = profile.experts
    how = [settings.rank, settings.batch, settings.learning_rate, profile.seed, base.dtype]
    code = [provenance.code_digest(_TRAINING), *_versions()]
    return cache.digest(base.key, start.name if start else "", blocks.tolist(), how, code)


def _training_job(
    profile: Profile, base: Base, arm: str, blocks: Blocks, targets: Mapping[str, Path], scratch: Path
) -> dict[str, Any]:
    settings = profile.experts
    file = scratch / f"{arm}.npy"
    np.save(file, blocks)
    start = targets.get(ADAPTED) if arm != ADAPTED else None
    origin = settings.checkpoint or checkpoint.origin(profile.engines)
    return _job(base, arm, targets[arm]) | {
        "base": Path(origin).name if settings.checkpoint else origin,
        "blocks": str(file),
        "start": str(start) if start else None,
        "scratch": str(scratch),
        "rank": settings.rank,
        "batch": settings.batch,
        "learning_rate": settings.learning_rate,
        "seed": profile.seed,
        "facts": {"dtype": base.dtype, "machine": hardware.machine(), "python": platform.python_version()},
    }


def _job(base: Base, arm: str, target: Path) -> dict[str, Any]:
    """What all jobs have."""
    about = {"checkpoint": str(base.directory), "dtype": base.dtype, "layers": base.layers}
    return about | {"arm": arm, "target": str(target)}


class _Task(NamedTuple):
    """What every arm does with the same texts."""

    makes: str
    """What comes of it: scores or answers."""
    texts: str
    """What its job calls the texts."""
    ids: list[list[int]]
    """The tokens of each text."""
    how: dict[str, int | str]
    """What else its job says."""
    code: tuple[str, ...]
    """What the result depends on, beside the arm."""
    tokens: int
    """How many are worked on for an arm: of its progress."""
    doing: str
    """What the progress is called."""


def _scored(base: Base, adapters: Mapping[str, Path], held_out: HeldOut, workers: worker.Workers) -> dict[str, Any]:
    """Log-probabilities of all held-out tokens, per arm."""
    ids = [[base.end, *tokens] for _, tokens in held_out.tokens.groupby("document")["token"].agg(list).items()]
    average = {AVERAGE: [path for arm, path in adapters.items() if arm.startswith("expert-")]}
    task = _Task("scores", "texts", ids, {}, (_TRAINING, _SCORING), sum(map(len, ids)), "judging experts")
    return _by_arm(base, _made_of(adapters) | average, task, workers)


def _answered(
    profile: Profile, base: Base, adapters: Mapping[str, Path], ids: list[list[int]], workers: worker.Workers
) -> dict[str, Any]:
    """Tokens of all arms' answers, (texts, samples, tokens) each."""
    prompts, n = [[base.end, *text[:PROMPT]] for text in ids], profile.experts.answer_tokens
    how: dict[str, int | str] = {"answer_tokens": n, "samples": _SAMPLES, "seed": profile.seed}
    how["device"] = "cuda" if torch.cuda.is_available() else "cpu"  # each draws in its own way
    code = (_TRAINING, _ANSWERING, _SCORING)
    task = _Task("answers", "prompts", prompts, how, code, len(ids) * _SAMPLES * n, "asking experts")
    return _by_arm(base, _made_of(adapters), task, workers)


def _made_of(adapters: Mapping[str, Path]) -> dict[str, list[Path]]:
    """The adapters of every arm: none of the seed, one of all others."""
    return {SEED: [], **{arm: [path] for arm, path in adapters.items()}}


def _by_arm(base: Base, made_of: Mapping[str, list[Path]], task: _Task, workers: worker.Workers) -> dict[str, Any]:
    """An array of every arm, made where an earlier run has not kept it."""
    code = [provenance.code_digest(*task.code), *_versions()]
    keys = {
        arm: cache.digest(base.key, base.dtype, task.ids, task.how, [path.name for path in adapters], code)
        for arm, adapters in made_of.items()
    }
    targets = {arm: _KEPT / f"{task.makes}-{key}.npy" for arm, key in keys.items()}
    missing = [arm for arm, file in targets.items() if cache.recalled(file, np.load, "experts") is None]
    say(f"experts: {len(targets) - len(missing)} arms' {task.makes} found by content hash, {len(missing)} to make")
    with cache.scratch(_KEPT) as scratch:
        file = scratch / "texts.json"
        file.write_text(json.dumps(task.ids), encoding="utf-8")
        jobs = []
        for arm in missing:
            about = {task.texts: str(file), "adapters": [str(path) for path in made_of[arm]], **task.how}
            jobs.append(_job(base, arm, targets[arm]) | about)
        _do(workers, jobs, dict.fromkeys(missing, task.tokens), task.doing)
    return {arm: np.load(file) for arm, file in targets.items()}


def _workers() -> worker.Workers:
    """As many processes of one thread as there are cores, but for GPUs, which one process has to itself."""
    return worker.Workers("erlib.experts.jobs", 1 if torch.cuda.is_available() else hardware.cores(), threads=1)


def _do(workers: worker.Workers, jobs: Sequence[dict[str, Any]], tokens: Mapping[str, int], what: str) -> None:
    """Do jobs, the longest first."""
    if not jobs:
        return
    with Bar(total=sum(tokens[job["arm"]] for job in jobs), desc=what, unit="token", unit_scale=True) as bar:
        for result in workers.do(sorted(jobs, key=lambda job: -tokens[job["arm"]])):
            bar.update(result["tokens"])


def _training(adapters: Mapping[str, Path]) -> pd.DataFrame:
    rows = []
    for arm, directory in adapters.items():
        facts = json.loads((directory / "training.json").read_text(encoding="utf-8"))
        losses = facts.pop("losses")
        rows.append({**facts, "arm": arm, "first_loss": losses[0], "last_loss": losses[-1]})
    return pd.DataFrame(rows)

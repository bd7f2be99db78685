"""Plans carried out: every step once, with a log; again only if it was cut off or its command has changed.

Beside what a step has made lies ``<made>.done.json`` with its command and how long it took, in seconds. What somebody
else has made counts too, if it is what the plan asks for: an engine that passes the plan's check needs no step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import platform
import shutil
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from erlib.config import Configuration, Profile, RunnerKind
from erlib.dgx import outcome, recipes, tensorrt_llm, tools
from erlib.dgx.containers import Command, Runner, load_image
from erlib.dgx.tensorrt_llm import Plan
from erlib.machine import processes
from erlib.machine.progress import Bar

PlannedSteps: TypeAlias = Sequence[tuple[Plan, Command]]
"""Steps, each with the first plan that asks for it."""


class StepFailed(RuntimeError):
    """A step ended with an error, or made something else than it was asked for; the message quotes its log."""


def stamp(command: Command) -> Path:
    """File that says that a step has succeeded."""
    return command.makes.with_name(f"{command.makes.name}.done.json")


def is_done(command: Command) -> bool:
    """Whether a step need not be run: it has succeeded with this command, and what it has made is there.

    A download counts whoever has put it there, but only if it is whole.
    """
    if lacking(command):
        return False
    if command.program[0] == "hf" and "dataset" not in command.options:
        return True
    if said := _stamped(command, "argv"):
        return said == list(command.argv)
    # Texts have no index that would show what is still to come; hf's own notes show that it has begun.
    return command.program[0] == "hf" and not (command.makes / ".cache" / "huggingface").exists()


def lacking(command: Command) -> list[str]:
    """What a step should have made and has not; of a download, each file that is missing or cut short."""
    directory = command.makes
    if not directory.exists():
        return [str(directory)]
    if command.program[0] != "hf":
        return []
    if "dataset" in command.options:
        return [] if any(directory.rglob("*.parquet")) else [f"{directory}/*.parquet"]
    described = [] if _size(directory / "config.json") else [f"{directory}/config.json"]
    return described + _lacking_weights(directory)


def _lacking_weights(directory: Path) -> list[str]:
    """What is missing of the files that a checkpoint's index names, or of its only one."""
    index, names, due = directory / "model.safetensors.index.json", ["model.safetensors"], 0
    if index.exists():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(content["weight_map"].values()))
            due = content.get("metadata", {}).get("total_size", 0)
        except (ValueError, KeyError, AttributeError):
            return [f"{index} that could be read"]
    sizes = {name: _size(directory / name) for name in names}
    missing = [f"{directory / name}" for name, size in sizes.items() if not size]
    if not missing and (total := sum(sizes.values())) < due:
        return [f"{(due - total) / 1e9:.2f} GB of {directory}/*.safetensors"]
    return missing


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def seconds(command: Command) -> float | None:
    """How long a step took when it was run here; None if it was not."""
    return _stamped(command, "seconds")


def _stamped(command: Command, what: str) -> Any:
    """What a step's stamp says of it; None if it has none, or one that was cut off."""
    try:
        return json.loads(stamp(command).read_text(encoding="utf-8"))[what]
    except (OSError, ValueError, KeyError):
        return None


def missing(plans: Sequence[Plan]) -> list[tuple[Plan, Command]]:
    """Steps that are still to be run, in order, each once; checks are no steps of their own."""
    found: dict[Path, tuple[Plan, Command]] = {}
    for plan in plans:
        if plan.served.exists() and not outcome.problems(plan):
            continue
        for command in recipes.commands(plan):
            if command.purpose != "check" and not is_done(command):
                found.setdefault(command.makes, (plan, command))
    return list(found.values())


def build(plans: Sequence[Plan], kind: RunnerKind) -> None:
    """Make what a server of each plan's system loads; after a StepFailed the next call goes on with that step."""
    todo = missing(plans)
    runners = {plan.version: Runner(kind, load_image(plan.version), plan.places) for plan, _ in todo}
    programs: dict[tuple[str, str], tuple[str, ...]] = {}
    print(f"builds: {len(plans)} engines, {len(todo)} steps to run")
    with Bar(todo, unit="step") as progress:
        for plan, command in progress:
            progress.set_description(f"{plan.configuration.id}: {command.purpose} {command.makes.name}")
            runner, tool = runners[plan.version], (plan.version, command.tool)
            if command.tool and tool not in programs:
                fetch_image(runner)
                programs |= _found([each for each, _ in todo if each.version == plan.version], runner)
            _run(command, runner, programs.get(tool, command.program))
    for plan in plans:
        if problems := outcome.problems(plan):
            wrong = "\n".join(problems)
            raise StepFailed(f"{plan.configuration.id}: not what the plan asks for; remove it and run again:\n{wrong}")


def build_report(profile: Profile, configurations: Sequence[Configuration]) -> pd.DataFrame:
    """Engines of some configurations on GPUs: built first, if ``serving.backend`` asks for them.

    Returns
    -------
    pandas.DataFrame
        One row per engine: the first configuration that loads it, what it is, ``commands`` (how many steps lead to
        it), ``minutes`` (of those that have been run here; NaN if none has), ``missing`` (steps that have not).
    """
    plans = tensorrt_llm.needed(profile, configurations)
    if profile.serving.backend == "tensorrt_llm":
        build(plans, profile.tensorrt_llm.runner)
    rows = []
    for plan in plans:
        steps = [command for command in recipes.commands(plan) if command.purpose != "check"]
        taken_s = [took_s for command in steps if (took_s := seconds(command)) is not None]
        rows.append(
            {
                "config": plan.configuration.id,
                "engine": plan.served.name,
                "tensorrt_llm": plan.version,
                "commands": len(steps),
                "minutes": sum(taken_s) / 60 if taken_s else math.nan,
                "missing": len(missing([plan])),
            }
        )
    return pd.DataFrame(rows)


def _found(plans: Sequence[Plan], runner: Runner) -> dict[tuple[str, str], tuple[str, ...]]:
    """How the tools of an image are started, by version and name, once they have said that they take all commands.

    Before hours of work, because what an image holds is known only when it is here.
    """
    work, version = runner.places.work, plans[0].version
    used = dict.fromkeys(command.tool for plan in plans for command in recipes.commands(plan) if command.tool)
    answers, wrong = tools.inspect(plans, [tool for tool in used if runner.image.comes_with(tool, work)], runner)
    if wrong:
        raise StepFailed("\n".join(wrong))
    return {(version, tool): program for tool, program in answers.programs.items()}


def _run(command: Command, runner: Runner, program: tuple[str, ...]) -> None:
    """Run a step, started as `program` says: the plan's own way is the likeliest one."""
    work = runner.places.work
    log = work / "logs" / f"{command.purpose}-{command.makes.name}.log"
    for directory in (work, runner.places.checkpoints, command.makes.parent):
        directory.mkdir(parents=True, exist_ok=True)
    if command.program[0] != "hf":  # whose downloads go on where they were
        shutil.rmtree(command.makes, ignore_errors=True)
    began = time.monotonic()
    log.unlink(missing_ok=True)
    _finish(runner.argv(dataclasses.replace(command, program=program)), log, work)
    if lacks := lacking(command):
        shown = ", ".join(lacks[:3]) + (f" and {len(lacks) - 3} more" if len(lacks) > 3 else "")
        raise StepFailed(
            f"{command.purpose} ended without an error, but there is no {shown}; {log} ends:\n{processes.tail(log)}"
        )
    done = {
        "argv": list(command.argv),
        "image": runner.image.reference if command.tool else None,
        "seconds": round(time.monotonic() - began, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    stamp(command).write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


def fetch_image(runner: Runner) -> None:
    """Fetch an image that is not on this machine; machines that share a directory for its file take turns."""
    if runner.is_ready:
        return
    work = runner.places.work
    work.mkdir(parents=True, exist_ok=True)
    with (work / "image.lock").open("wb") as lock:
        if runner.kind != "docker":  # which keeps images on each machine
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
        for argv in runner.due:
            _finish(argv, work / "logs" / f"image-{platform.node()}.log", work)


def _finish(argv: Sequence[str], log: Path, directory: Path) -> None:
    """Run a program to its end, and end it if we are interrupted."""
    try:
        process = processes.spawn(argv, log, cwd=directory)
    except FileNotFoundError:
        raise StepFailed(f"{argv[0]} is not installed; ./run_all.sh --dry-run lists what is missing") from None
    try:
        code = process.wait()
    finally:
        processes.stop([process])
    if code:
        raise StepFailed(f"{argv[0]} failed with code {code}; {log} ends:\n{processes.tail(log)}")

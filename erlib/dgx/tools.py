"""What the tools of an image say of their options."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from erlib.dgx import option_tables, recipes
from erlib.dgx.containers import Command, Runner
from erlib.dgx.option_tables import OptionError
from erlib.dgx.tensorrt_llm import Plan

_ANSWER_S = 300


@dataclass(frozen=True)
class Answers:
    """What tools of an image say of themselves, by tool."""

    programs: dict[str, tuple[str, ...]]
    """How each is started."""
    helps: dict[str, str]
    """What it prints when asked for ``--help``."""
    failures: dict[str, str]
    """Why others did not answer."""


def ask_tools(tools: Sequence[str], runner: Runner) -> Answers:
    """Ask tools of an image for ``--help``; of several places where a script may be, the first that answers counts."""
    answers = Answers({}, {}, {})

    def ask(tool: str) -> None:
        reasons = []
        for program in runner.image.programs(tool, runner.places.work):
            asking = Command("ask", program, ("--help",), runner.places.work, tool)
            try:
                reply = subprocess.run(
                    runner.argv(asking), capture_output=True, text=True, check=True, timeout=_ANSWER_S
                )
            except (OSError, subprocess.SubprocessError) as error:
                said = (getattr(error, "stderr", "") or str(error)).strip().splitlines() or ["no reason given"]
                reasons.append(f"{shlex.join(program)} --help: {said[-1][-300:]}")
            else:
                answers.programs[tool], answers.helps[tool] = program, reply.stdout
                return
        answers.failures[tool] = "; ".join(reasons)

    with ThreadPoolExecutor() as pool:  # each imports TensorRT-LLM, which takes half a minute
        list(pool.map(ask, tools))
    return answers


def inspect(plans: Sequence[Plan], tools: Sequence[str], runner: Runner) -> tuple[Answers, list[str]]:
    """Ask tools of an image, which is here, what they take; also all that plans (of one version) would fail on.

    Those of the plans' tools that are not asked, the table knows.
    """
    image, version = runner.image, plans[0].version
    answers = ask_tools(tools, runner)
    found = [
        f"{tool} --help fails in {image.tag} ({why}): look what is wrong with the image, or name the script's place in "
        "data/tensorrt_llm_images.yaml"
        for tool, why in answers.failures.items()
    ]
    try:
        contract = option_tables.load_contract(version)
        contract, _ = option_tables.refreshed(contract, answers.helps, f"--help in {image.reference}")
    except OptionError as error:
        return answers, [*found, f"{image.tag}: {error}"]
    misfits = dict.fromkeys(misfit for plan in plans for misfit in recipes.misfits(plan, contract))
    remedy = f"this image is not as TensorRT-LLM {version} was; pin the digest of one that is"
    return answers, [*found, *(f"{misfit}: {remedy}" for misfit in misfits)]

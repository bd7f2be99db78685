"""``python -m erlib.dgx``: shows a plan, checks what was built, refreshes the tables of known options."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from erlib import config, paths
from erlib.config import ConfigError, Flow, RunnerKind, Version, WorkloadSettings
from erlib.dgx import adapters, option_tables, outcome, recipes
from erlib.dgx.containers import Places, Runner, load_image
from erlib.dgx.tensorrt_llm import NEWEST, Plan, lengths
from erlib.dgx.tools import ask_tools


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m erlib.dgx``; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m erlib.dgx")
    actions = parser.add_subparsers(dest="action", required=True)
    show = actions.add_parser("show", help="print the commands of a configuration's plan; runs none")
    check = actions.add_parser("check", help="compare what a plan has made with the configuration")
    refresh = actions.add_parser("refresh", help="ask the tools in an image for their options; show the differences")
    for action in (show, check):
        action.add_argument("configuration", metavar="CONFIG", help="e.g. p1.A")
        action.add_argument("--flow", choices=get_args(Flow), default="engine")
        action.add_argument("--version", choices=get_args(Version), default=NEWEST, help="of TensorRT-LLM")
        action.add_argument(
            "--lengths", nargs=2, type=int, metavar="TOKENS", help="longest prompt and sequence (default: the papers')"
        )
        action.add_argument("--adapters", type=Path, help="with expert-0, expert-1, ..., if experts are adapters")
        action.add_argument("--experts", type=int, default=8, help="how many of them (default: 8)")
    check.add_argument("--checkpoint", action="store_true", help="look at the checkpoint, before an engine is built")
    refresh.add_argument("version", choices=get_args(Version), metavar="VERSION", help="of TensorRT-LLM, e.g. 1.2.1")
    refresh.add_argument("--write", action="store_true", help="correct the table in data/trtllm_options")
    for action in (show, refresh):
        action.add_argument("--runner", choices=get_args(RunnerKind), default="docker")
    for action in (show, check, refresh):
        action.add_argument("--checkpoints", type=Path, default=paths.CACHE / "checkpoints")
        action.add_argument("--work", type=Path, default=paths.ENGINE_BUILDS / "tensorrt_llm")
    args = parser.parse_args(arguments)
    try:
        return {"show": _show, "check": _check, "refresh": _refresh}[args.action](args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2


def _places(args: argparse.Namespace) -> Places:
    return Places(args.checkpoints.resolve(), args.work.resolve())


def _plan(args: argparse.Namespace) -> Plan:
    configuration = config.load_configuration(args.configuration)
    longest, places = args.lengths or lengths(configuration, WorkloadSettings()), _places(args)
    its = None
    if configuration.adapters and args.adapters:
        its = adapters.read(configuration.id, args.adapters.resolve(), args.experts, configuration.system.model, places)
    return Plan(configuration, tuple(longest), places, args.flow, args.version, its)


def _show(args: argparse.Namespace) -> int:
    plan = _plan(args)
    runner = Runner(args.runner, load_image(plan.version), plan.places)
    for words in [*runner.setup, *map(runner.argv, recipes.commands(plan))]:
        print(shlex.join(words))
    return 0


def _check(args: argparse.Namespace) -> int:
    plan = _plan(args)
    found = outcome.checkpoint_problems(plan) if args.checkpoint else outcome.problems(plan)
    made = plan.checkpoint if args.checkpoint else plan.served
    print("\n".join(found) or f"{made} is what {plan.configuration.id} asks for")
    return bool(found)


def _refresh(args: argparse.Namespace) -> int:
    contract, image, places = option_tables.load_contract(args.version), load_image(args.version), _places(args)
    runner = Runner(args.runner, image, places)
    answers = ask_tools(list(contract.tools), runner)
    for tool, why in answers.failures.items():
        print(f"{tool}: not asked: {why}", file=sys.stderr)
    if not answers.helps:
        return 1
    evidence = "--help of the installed tools" if args.runner == "bare" else f"--help in {image.reference}"
    contract, differences = option_tables.refreshed(contract, answers.helps, evidence)
    refused = [line for plan in _plans(args.version, places) for line in recipes.misfits(plan, contract)]
    print("\n".join(differences) or f"no difference in {', '.join(answers.helps)}")
    print("\n".join(refused) or "every plan fits")
    if args.write:
        (option_tables.TABLES / f"{args.version}.json").write_text(contract.dumps(), encoding="utf-8")
    return 0 if len(answers.helps) == len(contract.tools) and not refused else 1


def _plans(version: Version, places: Places) -> Iterator[Plan]:
    """All plans that use a version."""
    for configuration in map(config.load_configuration, config.config_ids()):
        for flow in get_args(Flow):
            its = adapters.OF_ALL_MATRICES if configuration.adapters else None
            with contextlib.suppress(ConfigError):  # a flow that cannot express it
                yield Plan(configuration, lengths(configuration, WorkloadSettings()), places, flow, version, its)


if __name__ == "__main__":
    sys.exit(main())

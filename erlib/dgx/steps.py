"""The steps that make engines, as a reader types them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from erlib import config
from erlib.dgx import builds, checkpoints, estimates, preflight, recipes, tensorrt_llm
from erlib.dgx.builds import PlannedSteps
from erlib.dgx.containers import Command, Places, Runner
from erlib.dgx.fit import Fitted
from erlib.dgx.layout import WIDTH
from erlib.dgx.preflight import Report
from erlib.dgx.tensorrt_llm import Plan


class Steps:
    """Commands of all plans, each once, and what for; builds that differ in batch size alone stand together."""

    def __init__(self, fitted: Fitted):
        self.users: defaultdict[Path, list[str]] = defaultdict(list)
        self.groups: dict[str, list[tuple[Plan, Command]]] = {}
        preliminary = {one.id for one in fitted.preliminary}
        for one in fitted.configurations:
            plan = tensorrt_llm.plan(fitted.profile, one)
            name = "preliminary" if one.id in preliminary else one.id
            for command in recipes.commands(plan):
                if command.purpose == "check":
                    continue
                if name not in self.users[command.makes]:
                    self.users[command.makes].append(name)
                group = self.groups.setdefault(re.sub(r"-bs\d+-", "-bs*-", str(command.makes)), [])
                if all(command.makes != other.makes for _, other in group):
                    group.append((plan, command))
        self.missing = builds.missing(fitted.plans)
        self._to_make = {command.makes for _, command in self.missing}

    def used_by(self, group: PlannedSteps) -> str:
        return ", ".join(dict.fromkeys(name for _, command in group for name in self.users[command.makes]))

    def state(self, group: PlannedSteps) -> str:
        todo = sum(command.makes in self._to_make for _, command in group)
        if todo in (0, len(group)):
            return "to do" if todo else "done"
        return f"{todo} to do"


def table_of_steps(steps: Steps) -> str:
    rows = []
    for group in steps.groups.values():
        _, command = group[0]
        costs = [estimates.of_step(*each) for each in group]
        sizes = sorted(each.system.batch_size for each, _ in group)
        name = re.sub(r"-bs\d+-.*", "", command.makes.name)
        what = f"{name}, batch size {', '.join(map(str, sizes))}" if command.purpose == "build" else name
        if command.tool == "hf_lora_convert.py":
            what = f"adapter {name}"
        rows.append(
            [command.purpose, what, steps.used_by(group), f"{sum(cost.disk_bytes for cost in costs) / 1e9:,.0f}",
             _minutes(costs), steps.state(group)]
        )  # fmt: skip
    headers = ["step", "makes", "for", "GB", "minutes", ""]
    table = tabulate(
        rows, headers, tablefmt="simple", disable_numparse=True, maxcolwidths=[None, 52, 30, None, None, None],
        colalign=("left", "left", "left", "right", "right", "left"),
    )  # fmt: skip
    return f"{table}\n\n* an estimate that nobody has measured; without it: as long as it took here"


def _minutes(costs: Sequence[estimates.Cost]) -> str:
    minutes = sum(cost.seconds for cost in costs) / 60
    star = "" if all(cost.measured for cost in costs) else " *"
    return (f"{minutes:,.0f}" if minutes >= 1 else "< 1") + star


def commands(report: Report, steps: Steps) -> str:
    places, runners = checkpoints.places(report.asked), preflight.runners(report.fitted.plans, report.asked)
    lines = [f"CHECKPOINTS={shlex.quote(str(places.checkpoints))}", f"WORK={shlex.quote(str(places.work))}"]
    lines += ["mkdir -p $CHECKPOINTS $WORK && cd $WORK"]
    for version, runner in runners.items():
        if runner.kind != "bare":
            lines += ["", *(folded(words, places) for words in runner.setup)]
            lines += [f"{_in_image(version, runners)}() {{", folded([*runner.start(()), '"$@"'], places, 2), "}"]
        lines += _elsewhere(runner, steps)
    named = ""
    for group in steps.groups.values():
        plan, command = group[0]
        if (name := steps.used_by(group)) != named:
            lines += ["", f"# {name}"]
            named = name
        in_image = command.tool and runners[plan.version].kind != "bare"
        lines.append(_loop(group, [_in_image(plan.version, runners)] if in_image else [], places))
        if command.purpose == "build":
            lines += [folded(recipes.commands(each)[-1].argv, places) for each, _ in group if _is_printed(each)]
    return "\n".join(lines)


def _elsewhere(runner: Runner, steps: Steps) -> list[str]:
    """Comments: where else a run looks for the scripts of its commands."""
    used = dict.fromkeys(command.tool for group in steps.groups.values() for _, command in group)
    places = [runner.image.scripts[tool] for tool in used if tool in runner.image.scripts]
    said = [f"{first} may be at {' or '.join(others)} instead" for first, *others in places if others]
    layout: dict[str, Any] = {"initial_indent": "# ", "subsequent_indent": "#   ", "break_on_hyphens": False}
    return [textwrap.fill(one, WIDTH, **layout) for one in said]


def _in_image(version: str, runners: dict[str, Runner]) -> str:
    return "in_image" if len(runners) == 1 else f"in_image_{version.replace('.', '_')}"


def _is_printed(plan: Plan) -> bool:
    """Whether a configuration is one of ``engines/*.yaml``, which the check on the command line knows by its name."""
    name = plan.configuration.id
    return name in config.config_ids() and config.load_configuration(name).system == plan.system


def _loop(group: PlannedSteps, prefix: Sequence[str], places: Places) -> str:
    plan, command = group[0]
    if len(group) == 1:
        return folded([*prefix, *command.argv], places)
    size = plan.system.batch_size
    words = [word.replace(f"-bs{size}-", "-bs${batch_size}-") for word in command.argv]
    words[words.index("--max_batch_size") + 1] = "$batch_size"
    sizes = " ".join(str(each.system.batch_size) for each, _ in group)
    return "\n".join([f"for batch_size in {sizes}; do", folded([*prefix, *words], places, 2), "done"])


def folded(words: Iterable[str], places: Places, indent: int = 0) -> str:
    """A command as one would type it, cut between options, with names for the two directories."""
    names = {str(places.checkpoints): "$CHECKPOINTS", str(places.work): "$WORK"}
    pieces: list[str] = []
    for word in words:
        shown = word if "$" in word else shlex.quote(word)
        for path, name in names.items():
            shown = shown.replace(path, name)
        follows_option = pieces and re.fullmatch(r"--?[\w-]+", pieces[-1])
        if follows_option and not word.startswith("-"):
            pieces[-1] += f" {shown}"
        else:
            pieces.append(shown)
    margin, lines = " " * indent, [""]
    for piece in pieces:
        if lines[-1] and len(margin + lines[-1] + piece) + 3 > WIDTH:
            lines[-1] += " \\"
            lines.append(f"    {piece}")
        else:
            lines[-1] += f" {piece}" if lines[-1] else piece
    return "\n".join(margin + line for line in lines)

"""The whole plan of a TensorRT-LLM profile as text: what ``./run_all.sh --dry-run`` prints, before anything is done."""

from __future__ import annotations

import dataclasses
import math
import platform
import re
import shlex
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from tabulate import tabulate

from erlib import config, paths
from erlib.config import Configuration
from erlib.dgx import builds, estimates, preflight, repository, tensorrt_llm
from erlib.dgx.containers import Command, Places, Runner
from erlib.dgx.fit import Fitted
from erlib.dgx.preflight import Report
from erlib.dgx.tensorrt_llm import Plan
from erlib.engines import llama, table1
from erlib.engines.llama import Paper
from erlib.machine import hardware
from erlib.serving import triton
from erlib.serving.stack import Gateway
from erlib.serving.triton import TritonServer

WIDTH = 118


def text(report: Report, notebooks: Sequence[tuple[str, str]]) -> str:
    """The plan, section by section.

    Parameters
    ----------
    report : Report
        What :func:`erlib.dgx.preflight.check` found.
    notebooks : sequence of (str, str)
        Name, and whether and why it would run.
    """
    fitted, profile = report.fitted, report.fitted.profile
    steps = _Steps(fitted)
    sweeps = estimates.sweeps(profile, fitted.load, fitted.preliminary, fitted.gpu)
    sections = {
        "Machine": _machine(report),
        "Systems": _systems(fitted),
        "Memory of each GPU": _memory(fitted),
        "Table I of the papers": _tables(),
        "Steps": _table_of_steps(steps),
        "Commands": _commands(report, steps),
        "Servers": _servers(fitted),
        "Load": _load(sweeps),
        "Time and disk": _totals(report, steps, sweeps),
        "Notebooks": _table([list(row) for row in notebooks], ["notebook", "would"]),
        "Problems": _closing(report),
    }
    title = f"Plan of profile {profile.name}: {profile.description}"
    lines = [_wrapped(title), "Printing it starts, downloads and writes nothing."]
    for number, (heading, body) in enumerate(sections.items(), 1):
        lines.append(f"{number}. {heading}\n{'=' * (len(heading) + len(str(number)) + 2)}\n\n{body}")
    return "\n\n".join(lines)


# --- what there is ------------------------------------------------------------------------------------------------


def _machine(report: Report) -> str:
    gpus, fitted = report.gpus, report.fitted
    if gpus:
        each = f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory_bytes / 2**20:,.0f} MiB, driver {gpus[0].driver}"
        used = f"{each}; {fitted.n_gpus} used"
    else:
        used = f"none; everything below is laid out for {fitted.n_gpus} x {fitted.gpu.name}"
    places = tensorrt_llm.places(report.asked)
    rows = [
        ["host", platform.node()],
        ["GPUs", used],
        ["cores", hardware.cores()],
        ["host memory", f"{hardware.free_memory_bytes() / 1e9:,.0f} GB free"],
        *(
            [name, f"{directory}, {hardware.free_disk_bytes(directory) / 1e9:,.0f} GB free"]
            for name, directory in {
                "checkpoints": places.checkpoints,
                "engines": places.work,
                "records": paths.run_dir(report.asked.name),
            }.items()
        ),
    ]
    for version, runner in preflight.runners(fitted.plans, report.asked).items():
        state = (
            "" if runner.kind == "bare" else ", here" if runner.is_ready else f", {runner.image.size_gb:g} GB to load"
        )
        rows.append([f"TensorRT-LLM {version}", f"{runner.kind}: {runner.image.reference}{state}"])
    return tabulate(rows, tablefmt="plain")


def _systems(fitted: Fitted) -> str:
    rows = [
        [one.id, one.title, one.system.instances, f"TP{one.system.tensor_parallel}", one.system.batch_size,
         f"{llama.kv_tokens(one.system):,}", one.routing.replace("_", " ")]
        for one in fitted.load
    ]  # fmt: skip
    headers = ["", "system", "servers", "GPUs each", "batch size", "KV tokens", "requests reach it by"]
    parts = [_table(rows, headers)]
    if fitted.preliminary:
        systems = [one.system for one in fitted.preliminary]
        formats = ", ".join(dict.fromkeys(system.dtype.upper() for system in systems))
        widths = " and ".join(f"TP{width}" for width in dict.fromkeys(system.tensor_parallel for system in systems))
        sizes = ", ".join(map(str, sorted({system.batch_size for system in systems})))
        parts.append(
            _wrapped(
                f"Preliminary experiment of paper 2: {len(systems)} systems of Llama 3 70B, one server each: "
                f"{formats}; {widths}; batch sizes {sizes}."
            )
        )
    parts.append(_listed("What is lost against the papers:", fitted.losses) or "As the papers print them.")
    if fitted.refused:
        parts.append(_listed("Not run:", fitted.refused))
    return "\n\n".join(parts)


def _memory(fitted: Fitted) -> str:
    rows, gateways = [], llama.GATEWAYS_GB_PER_GPU
    room = fitted.gpu.usable_bytes / 1e9
    widest = max(fitted.preliminary, key=lambda one: llama.gpu_memory(one.system).total, default=None)
    for one in [*fitted.load, *([widest] if widest else [])]:
        memory = llama.gpu_memory(one.system)
        total = memory.total / 1e9
        hosts = one.routing in ("expert_router", "replicas")
        rows.append(
            [one.id, *(f"{part / 1e9:.1f}" for part in dataclasses.astuple(memory)),
             f"{total:.1f}", f"{room - total:.1f}", f"{room - total - gateways:.1f}" if hosts else ""]
        )  # fmt: skip
    headers = ["GB (10^9 bytes)", "weights", "activations", "other ranks", "KV cache", "together", "left",
               "left beside gateways"]  # fmt: skip
    tight = [row[0] for row in rows if str(row[-1]).startswith("-")]
    beside = f" By this arithmetic {', '.join(tight)} would have no room for those." if tight else ""
    said = (
        f"One {fitted.gpu.name} has {fitted.gpu.memory_bytes / 1e9:.1f} GB, {room:.1f} of them for an engine. The "
        f"papers' gateways take {gateways:g} GB of each GPU, ours run on the CPU.{beside} Activations are an estimate, "
        f"and so are {llama.FOREIGN_CONTEXT_BYTES / 1e9:g} GB for each other rank's CUDA context; a server whose KV "
        "cache comes out smaller than this is not used. Of the preliminary systems, the largest."
    )
    return f"{_table(rows, headers, numbers=True)}\n\n{_wrapped(said)}"


def _tables() -> str:
    parts = []
    for paper in get_args(Paper):
        table, (unit, _) = table1.table1(paper), llama.TABLE1_WEIGHTS_UNIT[paper]
        rows = [
            [row.config, f"{row.weights_gb_printed:g}", f"{row.loaded_gb * 1e9 / unit:.1f}",
             f"{row.loaded_gb * 1e9 / unit / row.weights_gb_printed - 1:+.1%}", "yes" if row.weights_agree else "NO",
             f"{row.kv_cache_gb_printed:g}", f"{row.kv_tokens:,}",
             "" if pd.isna(row.kv_tokens_printed) else f"{row.kv_tokens_printed:,}", row.batch_size, row.full_sequences]
            for row in table.itertuples()
        ]  # fmt: skip
        what = "GB of 10^9 bytes" if unit == 1e9 else "thousands of MiB"
        headers = ["", "weights\nprinted", "as\nloaded", "differ\nby", "agree", "KV cache\nprinted", "holds\ntokens",
                   "printed\ntokens", "batch\nsize", "longest\nsequences"]  # fmt: skip
        parts.append(f"Paper {paper[1]}, weights in {what} (within 1.5 % or its rounding):")
        parts.append(_table(rows, headers, numbers=True))
        found = [f"{row.config}: {row.discrepancy}" for row in table.itertuples() if row.discrepancy]
        parts.append(_listed("Where print and arithmetic disagree:", found))
    return "\n\n".join(parts)


# --- steps --------------------------------------------------------------------------------------------------------


class _Steps:
    """Commands of all plans, each once, and what for; builds that differ in batch size alone stand together."""

    def __init__(self, fitted: Fitted):
        self.users: defaultdict[Path, list[str]] = defaultdict(list)
        self.groups: dict[str, list[tuple[Plan, Command]]] = {}
        preliminary = {one.id for one in fitted.preliminary}
        for one in fitted.configurations:
            plan = tensorrt_llm.plan(fitted.profile, one)
            name = "preliminary" if one.id in preliminary else one.id
            for command in plan.commands:
                if command.purpose == "check":
                    continue
                if name not in self.users[command.makes]:
                    self.users[command.makes].append(name)
                group = self.groups.setdefault(re.sub(r"-bs\d+-", "-bs*-", str(command.makes)), [])
                if all(command.makes != other.makes for _, other in group):
                    group.append((plan, command))
        self.missing = builds.missing(fitted.plans)
        self._to_make = {command.makes for _, command in self.missing}

    def used_by(self, group: Sequence[tuple[Plan, Command]]) -> str:
        return ", ".join(dict.fromkeys(name for _, command in group for name in self.users[command.makes]))

    def state(self, group: Sequence[tuple[Plan, Command]]) -> str:
        todo = sum(command.makes in self._to_make for _, command in group)
        if todo in (0, len(group)):
            return "to do" if todo else "done"
        return f"{todo} to do"


def _table_of_steps(steps: _Steps) -> str:
    rows = []
    for group in steps.groups.values():
        _, command = group[0]
        costs = [estimates.of_step(*each) for each in group]
        sizes = sorted(each.system.batch_size for each, _ in group)
        name = re.sub(r"-bs\d+-.*", "", command.makes.name)
        what = f"{name}, batch size {', '.join(map(str, sizes))}" if command.purpose == "build" else name
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


def _commands(report: Report, steps: _Steps) -> str:
    places, runners = tensorrt_llm.places(report.asked), preflight.runners(report.fitted.plans, report.asked)
    lines = [f"CHECKPOINTS={shlex.quote(str(places.checkpoints))}", f"WORK={shlex.quote(str(places.work))}"]
    lines += ["mkdir -p $CHECKPOINTS $WORK && cd $WORK"]
    for version, runner in runners.items():
        if runner.kind != "bare":
            lines += ["", *(_folded(words, places) for words in runner.setup)]
            lines += [f"{_in_image(version, runners)}() {{", _folded([*runner.start(()), '"$@"'], places, 2), "}"]
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
            lines += [_folded(each.commands[-1].argv, places) for each, _ in group if _is_printed(each)]
    return "\n".join(lines)


def _elsewhere(runner: Runner, steps: _Steps) -> list[str]:
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


def _loop(group: Sequence[tuple[Plan, Command]], prefix: Sequence[str], places: Places) -> str:
    plan, command = group[0]
    if len(group) == 1:
        return _folded([*prefix, *command.argv], places)
    size = plan.system.batch_size
    words = [word.replace(f"-bs{size}-", "-bs${batch_size}-") for word in command.argv]
    words[words.index("--max_batch_size") + 1] = "$batch_size"
    sizes = " ".join(str(each.system.batch_size) for each, _ in group)
    return "\n".join([f"for batch_size in {sizes}; do", _folded([*prefix, *words], places, 2), "done"])


def _folded(words: Iterable[str], places: Places, indent: int = 0) -> str:
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


# --- servers ------------------------------------------------------------------------------------------------------


def _servers(fitted: Fitted) -> str:
    settings, rows = fitted.profile.serving, []
    first = settings.base_port + 1 + settings.gateways * Gateway.PORTS
    alike: defaultdict[tuple[int, int], list[Configuration]] = defaultdict(list)
    for one in fitted.load:
        hosts = one.routing in ("expert_router", "replicas")
        count, width = one.system.instances, one.system.tensor_parallel
        gateways = f"{settings.base_port + 1}-{first - 1}"
        rows.append(
            [one.id, count, _gpu_list(count, width), settings.base_port if hosts else "", gateways if hosts else "",
             *(_every(first + offset, count) for offset in range(TritonServer.PORTS))]
        )  # fmt: skip
        alike[count, width].append(one)
    headers = ["", "servers", "CUDA_VISIBLE_DEVICES", "NGINX", "gateways", "HTTP", "gRPC", "metrics"]
    said = (
        f"All on {settings.host}. Systems without NGINX are asked at their gRPC ports directly. Each system's "
        "repository is rendered before it is started; those of the preliminary experiment are served as the first."
    )
    launches = [_launch(fitted, group, first) for group in alike.values()]
    return "\n\n".join([_table(rows, headers), _wrapped(said), *launches])


def _gpu_list(count: int, width: int) -> str:
    if width == 1:
        return f"0 ... {count - 1}" if count > 1 else "0"
    return "  ".join(",".join(str(i * width + k) for k in range(width)) for i in range(count))


def _every(first: int, count: int) -> str:
    return f"{first}, +{TritonServer.PORTS} ... {first + (count - 1) * TritonServer.PORTS}" if count > 1 else str(first)


def _launch(fitted: Fitted, group: Sequence[Configuration], port: int) -> str:
    """Launch command of the first server of systems that differ in their repository alone, and how siblings differ."""
    profile, one = fitted.profile, group[0]
    plan = tensorrt_llm.plan(profile, one)
    plans = repository.server_plans(plan, profile.tensorrt_llm.runner, fitted.n_gpus)
    launch = plans[0].server(f"{one.id}-0", port, Path(), profile.serving.host).launch
    first, *others = _ranks(launch.command)
    words = [*(f"{name}={value}" for name, value in launch.environment.items()), *first, *(others[0] if others else [])]
    words = [word.replace(str(plans[0].repository), str(plans[0].repository.with_name("$CONFIG"))) for word in words]
    words = [word.replace(triton.UNTOLD, "$UNTOLD") for word in words]
    lines = [f"# {', '.join(each.id for each in group)}: the first server", _folded(words, plan.places)]
    if len(others) > 1:
        lines.append(f"# ... and so on to rank {len(others)}, each with a shared-memory prefix of its own")
    if len(plans) > 1:
        others_are = "the second" if len(plans) == 2 else f"the other {len(plans) - 1}"
        lines.append(f"# {others_are}: the same, on the GPUs and ports above")
    return "\n".join(lines)


def _ranks(command: Sequence[str]) -> list[list[str]]:
    """One list of words per rank; the first also has what comes before."""
    ranks: list[list[str]] = [[]]
    for word in command:
        if word == ":":
            ranks.append([])
        ranks[-1].append(word)
    return ranks


# --- time ---------------------------------------------------------------------------------------------------------


def _load(sweeps: Sequence[estimates.Sweep]) -> str:
    rows = []
    together: defaultdict[str, list[estimates.Sweep]] = defaultdict(list)
    for each in sweeps:
        preliminary = each.experiment == "preliminary"
        together[f"{each.experiment}\0{'' if preliminary else each.configuration.id}"].append(each)
    for key, group in together.items():
        experiment, _, name = key.partition("\0")
        rows.append(
            [experiment, name or f"{len(group)} systems", f"{sum(each.points for each in group):,}",
             *_hours(group)]
        )  # fmt: skip
    table = _table(rows, ["experiment", "system", "points", "longest point, min", "all points, h"], numbers=True)
    return f"{table}\n\n{_wrapped('Estimates: ' + estimates.ASSUMPTIONS['load'] + '.')}"


def _hours(group: Sequence[estimates.Sweep]) -> list[str]:
    if any(each.seconds is None for each in group):
        return ["?", "? (no data sheet of this GPU here)"]
    longest = max(each.longest_point_s or 0 for each in group)
    return [f"{longest / 60:.1f}", f"{sum(each.seconds or 0 for each in group) / 3600:.1f}"]


def _totals(report: Report, steps: _Steps, sweeps: Sequence[estimates.Sweep]) -> str:
    fitted = report.fitted
    hours: defaultdict[str, float] = defaultdict(float)
    for plan, command in steps.missing:
        hours[command.purpose] += estimates.of_step(plan, command).seconds / 3600
    for runner in preflight.runners(fitted.plans, report.asked).values():
        if not runner.is_ready:
            hours["fetch"] += runner.image.size_gb * 1e9 / estimates.DOWNLOAD_BYTES_PER_S / 3600
    if all(each.seconds is not None for each in sweeps):
        hours["load"] = sum(each.seconds or 0 for each in sweeps) / 3600
    rows = [[what, f"{value:.1f}"] for what, value in hours.items()]
    rows.append(["together", f"{sum(hours.values()):.1f}"])
    disk = [
        [str(where), f"{size / 1e9:,.0f}"] for where, size in preflight.disk_needs(report.asked, fitted.plans).items()
    ]
    assumed = "\n".join(
        textwrap.fill(f"{what}: {how}", WIDTH, initial_indent="  ", subsequent_indent="    ")
        for what, how in estimates.ASSUMPTIONS.items()
    )
    return "\n\n".join(
        [
            _table(rows, ["still to do", "hours *"], numbers=True),
            _table(disk, ["still to be written to", "GB"], numbers=True),
            f"* estimates that nobody has measured, assuming\n{assumed}",
        ]
    )


def _closing(report: Report) -> str:
    parts = [
        _listed("To be known:", report.warnings),
        _listed("A run would stop here because:", report.problems) or "Nothing stops it: without --dry-run it runs.",
    ]
    return "\n\n".join(filter(None, parts))


def opening(report: Report) -> str:
    """What a run says before it begins, or stops: what is lost, what is to be known, what is in the way."""
    parts = [
        _listed("What is lost against the papers:", report.fitted.losses),
        _listed("To be known:", report.warnings),
        _listed("Nothing was started, because:", report.problems),
    ]
    return "\n\n".join(filter(None, parts))


# --- layout -------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Sequence[Any]], headers: Sequence[str], numbers: bool = False) -> str:
    aligned = ["left", *(["right"] * (len(headers) - 1))] if numbers else None
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, colalign=aligned)


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH)


def _listed(heading: str, lines: Sequence[str]) -> str:
    """A numbered list; nothing if it is empty."""
    if not lines:
        return ""
    digits = int(math.log10(len(lines))) + 1
    items = [
        textwrap.fill(
            line, WIDTH, initial_indent=f"  {number:>{digits}}. ", subsequent_indent=" " * (digits + 4),
            break_on_hyphens=False, break_long_words=False,
        )
        for number, line in enumerate(lines, 1)
    ]  # fmt: skip
    return "\n".join([heading, *items])

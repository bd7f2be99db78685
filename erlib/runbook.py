"""The whole plan of a TensorRT-LLM profile as text: what ``./run_all.sh --dry-run`` prints, before anything is done."""

from __future__ import annotations

import math
import platform
import re
import shlex
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd
from tabulate import tabulate

from erlib import builds, config, engines, estimates, hardware, paths, preflight, repository, tensorrt_llm
from erlib.config import Configuration, Profile
from erlib.containers import Command, Runner
from erlib.engines import Paper
from erlib.preflight import Fitted, Report
from erlib.tensorrt_llm import Plan
from erlib.triton import TritonServer

WIDTH = 118


def text(report: Report, notebooks: Sequence[tuple[str, str]]) -> str:
    """The plan, section by section.

    Parameters
    ----------
    report : Report
        What :func:`erlib.preflight.check` found.
    notebooks : sequence of (str, str)
        Name, and whether and why it would run.
    """
    fitted, profile = report.fitted, report.fitted.profile
    sections = {
        "Machine": _machine(report),
        "Systems": _systems(fitted),
        "Memory of each GPU": _memory(fitted),
        "Table I of the papers": _tables(),
        "Steps": _steps(report),
        "Commands": _commands(report),
        "Servers": _servers(fitted),
        "Load": _load(fitted),
        "Time and disk": _totals(report),
        "Notebooks": _table([list(row) for row in notebooks], ["notebook", "would"]),
        "Problems": _closing(report),
    }
    title = f"Plan of profile {profile.name}: {profile.description}"
    lines = ["\n".join(textwrap.wrap(title, WIDTH)), _NOTHING]
    for number, (heading, body) in enumerate(sections.items(), 1):
        lines.append(f"{number}. {heading}\n{'=' * (len(heading) + len(str(number)) + 2)}\n\n{body}")
    return "\n\n".join(lines)


_NOTHING = "Nothing is started, downloaded or written by printing it."


# --- what there is --------------------------------------------------------------------------------------------------


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
        state = "" if runner.kind == "bare" else ", here" if runner.is_ready else f", {runner.image.size_gb:g} GB to load"
        rows.append([f"TensorRT-LLM {version}", f"{runner.kind}: {runner.image.reference}{state}"])
    return tabulate(rows, tablefmt="plain")


def _systems(fitted: Fitted) -> str:
    rows = [
        [one.id, one.title, one.system.instances, f"TP{one.system.tensor_parallel}", one.system.batch_size,
         f"{engines.kv_tokens(one.system):,}", one.routing.replace("_", " ")]
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
    rows, gateways = [], engines.GATEWAYS_GB_PER_GPU
    room = fitted.gpu.usable_bytes / 1e9
    widest = max(fitted.preliminary, key=lambda one: engines.gpu_memory(one.system).total, default=None)
    for one in [*fitted.load, *([widest] if widest else [])]:
        memory = engines.gpu_memory(one.system)
        total = memory.total / 1e9
        hosts = one.routing in ("expert_router", "replicas")
        rows.append(
            [one.id, *(f"{part / 1e9:.1f}" for part in (memory.weights, memory.activations, memory.kv_cache)),
             f"{total:.1f}", f"{room - total:.1f}", f"{room - total - gateways:.1f}" if hosts else ""]
        )  # fmt: skip
    headers = ["GB (10^9 bytes)", "weights", "activations", "KV cache", "together", "left", "left beside gateways"]
    said = (
        f"One {fitted.gpu.name} has {fitted.gpu.memory_bytes / 1e9:.1f} GB, {room:.1f} of them for an engine. The "
        f"papers' gateways take {gateways:g} GB of each GPU, ours run on the CPU. Activations are an estimate; the "
        "server gives the KV cache less if they turn out larger. Of the preliminary systems, the largest."
    )
    return f"{_table(rows, headers, numbers=True)}\n\n{_wrapped(said)}"


def _tables() -> str:
    parts = []
    for paper in get_args(Paper):
        table, (unit, _) = engines.table1(paper), engines.TABLE1_WEIGHTS_UNIT[paper]
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


# --- steps ------------------------------------------------------------------------------------------------------------


class _Steps:
    """Commands of all plans, each once, and what they are for; builds that differ in batch size alone stand together."""

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
        self.missing = {command.makes for _, command in builds.missing(fitted.plans)}

    def used_by(self, group: Sequence[tuple[Plan, Command]]) -> str:
        return ", ".join(dict.fromkeys(name for _, command in group for name in self.users[command.makes]))

    def state(self, group: Sequence[tuple[Plan, Command]]) -> str:
        todo = sum(command.makes in self.missing for _, command in group)
        if todo in (0, len(group)):
            return "to do" if todo else "done"
        return f"{todo} to do"


def _steps(report: Report) -> str:
    steps, rows = _Steps(report.fitted), []
    for group in steps.groups.values():
        plan, command = group[0]
        costs = [estimates.of_step(*each) for each in group]
        sizes = sorted(each.system.batch_size for each, _ in group)
        name = re.sub(r"-bs\d+-.*", "", command.makes.name)
        what = f"{name}, batch size {', '.join(map(str, sizes))}" if command.purpose == "build" else name
        minutes = sum(cost.seconds for cost in costs) / 60
        rows.append(
            [command.purpose, what, steps.used_by(group), f"{sum(cost.disk_bytes for cost in costs) / 1e9:,.0f}",
             f"{minutes:,.0f}" + ("" if all(cost.measured for cost in costs) else " *"), steps.state(group)]
        )  # fmt: skip
    headers = ["step", "makes", "for", "GB", "minutes", ""]
    table = tabulate(rows, headers, tablefmt="simple", disable_numparse=True, maxcolwidths=[None, 52, 30, None, None, None],
                     colalign=("left", "left", "left", "right", "right", "left"))  # fmt: skip
    return f"{table}\n\n* an estimate that nobody has measured; without it: as long as it took here"


def _commands(report: Report) -> str:
    fitted, places = report.fitted, tensorrt_llm.places(report.asked)
    steps = _Steps(fitted)
    runners = preflight.runners(fitted.plans, report.asked)
    lines = [f"CHECKPOINTS={shlex.quote(str(places.checkpoints))}", f"WORK={shlex.quote(str(places.work))}"]
    lines += ["mkdir -p $CHECKPOINTS $WORK && cd $WORK", ""]
    for version, runner in runners.items():
        if runner.kind != "bare":
            lines += [_folded(words, report) for words in runner.setup]
            lines += [f"{_in_image(version, runners)}() {{ \\", _folded(runner.start(()), report, 2) + ' "$@"', "}", ""]
    named = ""
    for group in steps.groups.values():
        plan, command = group[0]
        name = steps.used_by(group)
        if name != named:
            lines += ["", f"# {name}"]
            named = name
        prefix = _in_image(plan.version, runners) + " " if command.tool and runners[plan.version].kind != "bare" else ""
        lines += _loop(group, prefix, report)
        if command.purpose == "build" and (printed := [each for each, _ in group if _is_printed(each)]):
            lines += [_folded(each.commands[-1].argv, report) for each in printed]
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _in_image(version: str, runners: dict[str, Runner]) -> str:
    return "in_image" if len(runners) == 1 else f"in_image_{version.replace('.', '_')}"


def _is_printed(plan: Plan) -> bool:
    """Whether a configuration is one of ``engines/*.yaml``, which the check on the command line knows by its name."""
    name = plan.configuration.id
    return name in config.config_ids() and config.load_configuration(name).system == plan.system


def _loop(group: Sequence[tuple[Plan, Command]], prefix: str, report: Report) -> list[str]:
    plan, command = group[0]
    if len(group) == 1:
        return [prefix + _folded(command.argv, report)]
    size = str(plan.system.batch_size)
    words = [word.replace(f"-bs{size}-", "-bs${batch_size}-") for word in command.argv]
    words[words.index("--max_batch_size") + 1] = "$batch_size"
    sizes = " ".join(str(each.system.batch_size) for each, _ in group)
    return [f"for batch_size in {sizes}; do", "  " + prefix + _folded(words, report, 2), "done"]


def _folded(words: Iterable[str], report: Report, indent: int = 0) -> str:
    """A command as one would type it, cut before options, with names for the two directories."""
    places = tensorrt_llm.places(report.asked)
    names = {str(places.checkpoints): "$CHECKPOINTS", str(places.work): "$WORK"}
    pieces: list[str] = []
    for word in map(str, words):
        shown = word if "$batch_size" in word or "${batch_size}" in word else shlex.quote(word)
        for path, name in names.items():
            shown = shown.replace(path, name)
        if pieces and not word.startswith("-") and pieces[-1].startswith("-") and " " not in pieces[-1]:
            pieces[-1] += f" {shown}"  # an option and its value stay together
        else:
            pieces.append(shown)
    return _lines(pieces, " " * indent)


def _lines(pieces: Sequence[str], margin: str) -> str:
    lines, line = [], margin if margin else ""
    for piece in pieces:
        if line.strip() and len(line) + len(piece) + 3 > WIDTH:
            lines.append(f"{line} \\")
            line = f"{margin}    {piece}"
        else:
            line = f"{line} {piece}" if line.strip() else f"{margin}{piece}"
    return "\n".join([*lines, line]).strip() if not margin else "\n".join([*lines, line]).rstrip()


# --- servers ------------------------------------------------------------------------------------------------------------


def _servers(fitted: Fitted) -> str:
    settings, rows, launches = fitted.profile.serving, [], []
    first = settings.base_port + 1 + settings.gateways
    for one in fitted.load:
        hosts = one.routing in ("expert_router", "replicas")
        count, width = one.system.instances, one.system.tensor_parallel
        gateways = f"{settings.base_port + 1}-{settings.base_port + settings.gateways}"
        rows.append(
            [one.id, count, _gpu_list(count, width), settings.base_port if hosts else "", gateways if hosts else "",
             *(_every(first + offset, count) for offset in range(TritonServer.PORTS))]
        )  # fmt: skip
        launches.append(_launch(fitted, one, first))
    headers = ["", "servers", "CUDA_VISIBLE_DEVICES", "NGINX", "gateways", "HTTP", "gRPC", "metrics"]
    table = _table(rows, headers)
    said = (
        f"On {settings.host}. Systems without NGINX are asked at their gRPC ports directly. Those of the preliminary "
        "experiment are served like the first. Repositories are rendered before each start."
    )
    return "\n\n".join([table, _wrapped(said), *launches])


def _gpu_list(count: int, width: int) -> str:
    if width == 1:
        return f"0 ... {count - 1}" if count > 1 else "0"
    return "  ".join(",".join(str(i * width + k) for k in range(width)) for i in range(count))


def _every(first: int, count: int) -> str:
    return f"{first}, +{TritonServer.PORTS} ... {first + (count - 1) * TritonServer.PORTS}" if count > 1 else str(first)


def _launch(fitted: Fitted, one: Configuration, port: int) -> str:
    """Launch command of the first server; its siblings differ in few places."""
    profile, count = fitted.profile, one.system.instances
    plan = tensorrt_llm.plan(profile, one)
    plans = repository.server_plans(plan, profile.tensorrt_llm.runner, fitted.n_gpus)
    launch = plans[0].server(f"{one.id}-0", port, Path(), profile.serving.host).launch
    ranks = _split(launch.command)
    shown = [word for rank in ranks[:2] for word in rank]
    words = [*(f"{name}={value}" for name, value in launch.environment.items()), *shown]
    places = tensorrt_llm.places(profile)
    pieces = [word.replace(str(places.checkpoints), "$CHECKPOINTS").replace(str(places.work), "$WORK") for word in words]
    notes = []
    if len(ranks) > 2:
        notes.append(f"ranks 2 to {len(ranks) - 1} follow, as rank 1, each with a shared-memory prefix of its own")
    if count > 1:
        notes.append(f"servers 1 to {count - 1}: the same on the GPUs and ports above")
    return "\n".join([f"# {one.id}, server 0", _lines(pieces, ""), *(f"#   {note}" for note in notes)])


def _split(command: Sequence[str]) -> list[list[str]]:
    """One list of words per rank; the first also has what comes before."""
    ranks: list[list[str]] = [[]]
    for word in command:
        if word == ":":
            ranks.append([])
        ranks[-1].append(word)
    return ranks


# --- time -----------------------------------------------------------------------------------------------------------------


def _load(fitted: Fitted) -> str:
    rows = []
    sweeps = estimates.sweeps(fitted.profile, fitted.load, fitted.preliminary, fitted.gpu)
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


def _totals(report: Report) -> str:
    fitted = report.fitted
    missing = builds.missing(fitted.plans)
    hours: defaultdict[str, float] = defaultdict(float)
    for plan, command in missing:
        hours[command.purpose] += estimates.of_step(plan, command).seconds / 3600
    for runner in preflight.runners(fitted.plans, report.asked).values():
        if not runner.is_ready:
            hours["fetch"] += runner.image.size_gb * 1e9 / estimates.DOWNLOAD_BYTES_PER_S / 3600
    sweeps = estimates.sweeps(fitted.profile, fitted.load, fitted.preliminary, fitted.gpu)
    if all(each.seconds is not None for each in sweeps):
        hours["load"] = sum(each.seconds or 0 for each in sweeps) / 3600
    rows = [[what, f"{value:.1f}"] for what, value in hours.items()]
    rows.append(["together", f"{sum(hours.values()):.1f}"])
    disk = [[str(where), f"{size / 1e9:,.0f}"] for where, size in preflight.disk_needs(report.asked, fitted.plans).items()]
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
    parts = []
    if report.warnings:
        parts.append(_listed("To be known:", report.warnings))
    if report.problems:
        parts.append(_listed("A run would stop here because:", report.problems))
    return "\n\n".join(parts) or "None: without --dry-run this runs."


# --- layout -----------------------------------------------------------------------------------------------------------------


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


def problems(report: Report) -> str:
    """The closing list alone, for a run that stops."""
    return _closing(report)


def basics(profile: Profile) -> str:
    """Problems that any profile may have, as a list; empty if there are none."""
    return _listed("cannot start:", preflight.basics(profile))

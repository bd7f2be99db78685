"""The whole plan of a TensorRT-LLM profile as text: what ``./run_all.sh --dry-run`` prints, before anything is done."""

from __future__ import annotations

import dataclasses
import platform
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pandas as pd
from tabulate import tabulate

from erlib import paths
from erlib.config import Configuration
from erlib.config.system import HAVE_GATEWAYS
from erlib.dgx import checkpoints, estimates, preflight, repository, tensorrt_llm
from erlib.dgx.fit import Fitted
from erlib.dgx.layout import WIDTH, listed, table, wrapped
from erlib.dgx.preflight import Report
from erlib.dgx.steps import Steps, _folded, commands, table_of_steps
from erlib.engines import llama, table1
from erlib.engines.llama import Paper
from erlib.machine import hardware
from erlib.serving import triton
from erlib.serving.share import Gateway
from erlib.serving.triton import TritonServer


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
    steps = Steps(fitted)
    sweeps = estimates.sweeps(profile, fitted.load, fitted.preliminary, fitted.gpu)
    sections = {
        "Machine": _machine(report),
        "Systems": _systems(fitted),
        "Memory of each GPU": _memory(fitted),
        "Table I of the papers": _tables(),
        "Steps": table_of_steps(steps),
        "Commands": commands(report, steps),
        "Servers": _servers(fitted),
        "Load": _load(sweeps),
        "Time and disk": _totals(report, steps, sweeps),
        "Notebooks": table([list(row) for row in notebooks], ["notebook", "would"]),
        "Problems": _closing(report),
    }
    title = f"Plan of profile {profile.name}: {profile.description}"
    lines = [wrapped(title), "Printing it starts, downloads and writes nothing."]
    for number, (heading, body) in enumerate(sections.items(), 1):
        lines.append(f"{number}. {heading}\n{'=' * (len(heading) + len(str(number)) + 2)}\n\n{body}")
    return "\n\n".join(lines)


def _machine(report: Report) -> str:
    gpus, fitted = report.gpus, report.fitted
    if gpus:
        each = f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory_bytes / 2**20:,.0f} MiB, driver {gpus[0].driver}"
        used = f"{each}; {fitted.n_gpus} used"
    else:
        used = f"none; everything below is laid out for {fitted.n_gpus} x {fitted.gpu.name}"
    places = checkpoints.places(report.asked)
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
    parts = [table(rows, headers)]
    if fitted.preliminary:
        systems = [one.system for one in fitted.preliminary]
        formats = ", ".join(dict.fromkeys(system.dtype.upper() for system in systems))
        widths = " and ".join(f"TP{width}" for width in dict.fromkeys(system.tensor_parallel for system in systems))
        sizes = ", ".join(map(str, sorted({system.batch_size for system in systems})))
        parts.append(
            wrapped(
                f"Preliminary experiment of paper 2: {len(systems)} systems of Llama 3 70B, one server each: "
                f"{formats}; {widths}; batch sizes {sizes}."
            )
        )
    parts.append(listed("What is lost against the papers:", fitted.losses) or "As the papers print them.")
    if fitted.refused:
        parts.append(listed("Not run:", fitted.refused))
    return "\n\n".join(parts)


def _memory(fitted: Fitted) -> str:
    rows, gateways = [], llama.GATEWAYS_GB_PER_GPU
    room = fitted.gpu.usable_bytes / 1e9
    widest = max(fitted.preliminary, key=lambda one: llama.gpu_memory(one.system).total, default=None)
    for one in [*fitted.load, *([widest] if widest else [])]:
        memory = llama.gpu_memory(one.system)
        total = memory.total / 1e9
        hosts = one.routing in HAVE_GATEWAYS
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
    return f"{table(rows, headers, numbers=True)}\n\n{wrapped(said)}"


def _tables() -> str:
    parts = []
    for paper in get_args(Paper):
        printed, (unit, _) = table1.recomputed_table1(paper), llama.TABLE1_WEIGHTS_UNIT[paper]
        rows = [
            [row.config, f"{row.weights_gb_printed:g}", f"{row.loaded_gb * 1e9 / unit:.1f}",
             f"{row.loaded_gb * 1e9 / unit / row.weights_gb_printed - 1:+.1%}", "yes" if row.weights_agree else "NO",
             f"{row.kv_cache_gb_printed:g}", f"{row.kv_tokens:,}",
             "" if pd.isna(row.kv_tokens_printed) else f"{row.kv_tokens_printed:,}", row.batch_size, row.full_sequences]
            for row in printed.itertuples()
        ]  # fmt: skip
        what = "GB of 10^9 bytes" if unit == 1e9 else "thousands of MiB"
        headers = ["", "weights\nprinted", "as\nloaded", "differ\nby", "agree", "KV cache\nprinted", "holds\ntokens",
                   "printed\ntokens", "batch\nsize", "longest\nsequences"]  # fmt: skip
        parts.append(f"Paper {paper[1]}, weights in {what} (within 1.5 % or its rounding):")
        parts.append(table(rows, headers, numbers=True))
        found = [f"{row.config}: {row.discrepancy}" for row in printed.itertuples() if row.discrepancy]
        parts.append(listed("Where print and arithmetic disagree:", found))
    return "\n\n".join(parts)


def _servers(fitted: Fitted) -> str:
    settings, rows = fitted.profile.serving, []
    first = settings.base_port + 1 + settings.gateways * Gateway.PORTS
    alike: defaultdict[tuple[int, int], list[Configuration]] = defaultdict(list)
    for one in fitted.load:
        hosts = one.routing in HAVE_GATEWAYS
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
    return "\n\n".join([table(rows, headers), wrapped(said), *launches])


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
    hours = table(rows, ["experiment", "system", "points", "longest point, min", "all points, h"], numbers=True)
    return f"{hours}\n\n{wrapped('Estimates: ' + estimates.ASSUMPTIONS['load'] + '.')}"


def _hours(group: Sequence[estimates.Sweep]) -> list[str]:
    if any(each.seconds is None for each in group):
        return ["?", "? (no data sheet of this GPU here)"]
    longest = max(each.longest_point_s or 0 for each in group)
    return [f"{longest / 60:.1f}", f"{sum(each.seconds or 0 for each in group) / 3600:.1f}"]


def _totals(report: Report, steps: Steps, sweeps: Sequence[estimates.Sweep]) -> str:
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
            table(rows, ["still to do", "hours *"], numbers=True),
            table(disk, ["still to be written to", "GB"], numbers=True),
            f"* estimates that nobody has measured, assuming\n{assumed}",
        ]
    )


def _closing(report: Report) -> str:
    parts = [
        listed("To be known:", report.warnings),
        listed("A run would stop here because:", report.problems) or "Nothing stops it: without --dry-run it runs.",
    ]
    return "\n\n".join(filter(None, parts))


def opening(report: Report) -> str:
    """What a run says before it begins, or stops: what is lost, what is to be known, what is in the way."""
    parts = [
        listed("What is lost against the papers:", report.fitted.losses),
        listed("To be known:", report.warnings),
        listed("Nothing was started, because:", report.problems),
    ]
    return "\n\n".join(filter(None, parts))

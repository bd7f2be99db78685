"""The whole plan of a TensorRT-LLM profile, which ``./run_all.sh --dry-run`` prints: what ``runbook.txt.j2`` shows."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import jinja2
import pandas as pd

from erlib import config, paths
from erlib.config import Configuration
from erlib.config.system import HAVE_GATEWAYS
from erlib.dgx import checkpoints, estimates, fit, layout, preflight, repository, tensorrt_llm
from erlib.dgx.fit import Fitted
from erlib.dgx.preflight import Report
from erlib.dgx.steps import Steps, commands, folded, table_of_steps
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
    memory = _memory(fitted)
    return _template().render(
        report=report,
        fitted=fitted,
        profile=profile,
        preliminary=[one.system for one in fitted.preliminary],
        machine=_machine(report),
        systems=_systems(fitted),
        memory=memory,
        sharing=_sharing(report),
        tight=[name for name, *_, left in memory if left.startswith("-")],
        tables=_tables(),
        steps=table_of_steps(steps),
        commands=commands(report, steps),
        servers=_servers(fitted),
        launches=_launches(fitted),
        load=_load(sweeps),
        hours=_hours_to_do(report, steps, sweeps),
        disk=[
            [where, f"{size / 1e9:,.0f}"] for where, size in preflight.disk_needs(report.asked, fitted.plans).items()
        ],
        notebooks=notebooks,
        assumptions=estimates.ASSUMPTIONS,
        llama=llama,
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (layout.columns, layout.indented, layout.listed, layout.table, layout.wrapped):
        environment.filters[function.__name__] = function
    return environment.get_template("runbook.txt.j2")


def _machine(report: Report) -> list[list[Any]]:
    gpus, fitted = report.gpus, report.fitted
    if gpus:
        each = f"{len(gpus)} x {gpus[0].name}, {gpus[0].memory_bytes / 2**20:,.0f} MiB, driver {gpus[0].driver}"
        used = f"{each}; {fitted.n_gpus} used"
    else:
        used = f"none; everything below is laid out for {fitted.n_gpus} x {fitted.gpu.name}"
    places = checkpoints.places(report.asked)
    rows: list[list[Any]] = [
        ["host", platform.node()],
        ["GPUs", used],
        ["cores", hardware.cores()],
        ["host memory", f"{hardware.free_memory_bytes() / 1e9:,.0f} GB free"],
    ]
    home = {"checkpoints": places.checkpoints, "engines": places.work, "records": paths.run_dir(report.asked.name)}
    for name, directory in home.items():
        rows.append([name, f"{directory}, {hardware.free_disk_bytes(directory) / 1e9:,.0f} GB free"])
    for version, runner in preflight.runners(fitted.plans, report.asked).items():
        state = (
            "" if runner.kind == "bare" else ", here" if runner.is_ready else f", {runner.image.size_gb:g} GB to load"
        )
        rows.append([f"TensorRT-LLM {version}", f"{runner.kind}: {runner.image.reference}{state}"])
    return rows


def _systems(fitted: Fitted) -> list[list[Any]]:
    return [
        [one.id, one.title, one.system.instances, f"TP{one.system.tensor_parallel}", one.system.batch_size,
         f"{llama.kv_tokens(one.system):,}", one.routing.replace("_", " ")]
        for one in fitted.load
    ]  # fmt: skip


def _memory(fitted: Fitted) -> list[list[str]]:
    """A row for each system, and for the largest of the preliminary ones."""
    rows, room = [], fitted.gpu.usable_bytes / 1e9
    widest = max(fitted.preliminary, key=lambda one: llama.gpu_memory(one.system).total, default=None)
    for one in [*fitted.load, *([widest] if widest else [])]:
        memory = llama.gpu_memory(one.system, one.per_gpu)
        left = room - memory.total / 1e9
        beside = f"{left - llama.GATEWAYS_GB_PER_GPU:.1f}" if one.routing in HAVE_GATEWAYS else ""
        parts = [*dataclasses.astuple(memory), memory.total]
        rows.append([one.id, *(f"{part / 1e9:.1f}" for part in parts), f"{left:.1f}", beside])
    return rows


def _sharing(report: Report) -> tuple[list[list[str]], list[str]]:
    """What would fit if experts shared GPUs, of the profile's systems and of those made for it; and headers."""
    asked, fitted = report.asked, report.fitted
    most = math.ceil(llama.GPUS / fitted.n_gpus)
    rows = []
    named = [*asked.paper1.configs, *asked.paper2.configs, asked.overhead.config]
    for name in dict.fromkeys([*named, *fit.MADE_TO_SHARE]):
        one = config.load_configuration(name)
        if one.paper is None or fit.sharing(one, fitted.n_gpus, most) == 1:
            continue
        if "fp8" in (one.system.dtype, one.system.kv_dtype) and not fitted.gpu.has_fp8:
            rows.append([name, one.title, *["no FP8"] * most])
            continue
        tokens = [fit.kv_tokens_shared(one, n, fitted.gpu.usable_bytes) for n in range(1, most + 1)]
        rows.append([name, one.title, *(f"{each:,}" if each else "-" for each in tokens)])
    return rows, ["", "", *(f"{n} on a GPU" for n in range(1, most + 1))]


def _tables() -> list[tuple[str, str, list[list[Any]], list[str]]]:
    """Of each paper: its number, its unit of weights, rows, and where print and arithmetic disagree."""
    tables = []
    for paper in get_args(Paper):
        printed, (unit, _) = table1.recomputed_table1(paper), llama.TABLE1_WEIGHTS_UNIT[paper]
        rows = [
            [row.config, f"{row.weights_gb_printed:g}", f"{row.loaded_gb * 1e9 / unit:.1f}",
             f"{row.loaded_gb * 1e9 / unit / row.weights_gb_printed - 1:+.1%}", "yes" if row.weights_agree else "NO",
             f"{row.kv_cache_gb_printed:g}", f"{row.kv_tokens:,}",
             "" if pd.isna(row.kv_tokens_printed) else f"{row.kv_tokens_printed:,}", row.batch_size, row.full_sequences]
            for row in printed.itertuples()
        ]  # fmt: skip
        found = [f"{row.config}: {row.discrepancy}" for row in printed.itertuples() if row.discrepancy]
        tables.append((paper[1], "GB of 10^9 bytes" if unit == 1e9 else "thousands of MiB", rows, found))
    return tables


def _servers(fitted: Fitted) -> list[list[Any]]:
    settings, rows, first = fitted.profile.serving, [], _first_port(fitted)
    for one in fitted.load:
        hosts = one.routing in HAVE_GATEWAYS
        count, width = one.system.instances, one.system.tensor_parallel
        gpus = _gpu_list(math.ceil(count / one.per_gpu), width) + f", {one.per_gpu} each" * (one.per_gpu > 1)
        gateways = f"{settings.base_port + 1}-{first - 1}"
        rows.append(
            [one.id, count, gpus, settings.base_port if hosts else "", gateways if hosts else "",
             *(_every(first + offset, count) for offset in range(TritonServer.PORTS))]
        )  # fmt: skip
    return rows


def _first_port(fitted: Fitted) -> int:
    """Of the servers, above NGINX's and the gateways'."""
    settings = fitted.profile.serving
    return settings.base_port + 1 + settings.gateways * Gateway.PORTS


def _launches(fitted: Fitted) -> list[str]:
    """How servers are started, once for all systems that have as many, as large."""
    alike: defaultdict[tuple[int, int, int], list[Configuration]] = defaultdict(list)
    for one in fitted.load:
        alike[one.system.instances, one.system.tensor_parallel, one.per_gpu].append(one)
    return [_launch(fitted, group, _first_port(fitted)) for group in alike.values()]


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
    lines = [f"# {', '.join(each.id for each in group)}: the first server", folded(words, plan.places)]
    if len(others) > 1:
        lines.append(f"# ... and so on to rank {len(others)}, each with a shared-memory prefix of its own")
    if len(plans) > 1:
        others_are = "the second" if len(plans) == 2 else f"the other {len(plans) - 1}"
        in_turn = ", each when the one before it on its GPU is ready" if one.per_gpu > 1 else ""
        lines.append(f"# {others_are}: the same, on the GPUs and ports above{in_turn}")
    return "\n".join(lines)


def _ranks(command: Sequence[str]) -> list[list[str]]:
    """One list of words per rank; the first also has what comes before."""
    ranks: list[list[str]] = [[]]
    for word in command:
        if word == ":":
            ranks.append([])
        ranks[-1].append(word)
    return ranks


def _load(sweeps: Sequence[estimates.Sweep]) -> list[list[str]]:
    """A row for each system in each experiment; the preliminary experiment's many are one."""
    together: defaultdict[tuple[str, str], list[estimates.Sweep]] = defaultdict(list)
    for each in sweeps:
        name = "" if each.experiment == "preliminary" else each.configuration.id
        together[each.experiment, name].append(each)
    return [
        [experiment, name or f"{len(group)} systems", f"{sum(each.points for each in group):,}", *_hours(group)]
        for (experiment, name), group in together.items()
    ]


def _hours(group: Sequence[estimates.Sweep]) -> list[str]:
    if any(each.seconds is None for each in group):
        return ["?", "? (no data sheet of this GPU here)"]
    longest = max(each.longest_point_s or 0 for each in group)
    return [f"{longest / 60:.1f}", f"{sum(each.seconds or 0 for each in group) / 3600:.1f}"]


def _hours_to_do(report: Report, steps: Steps, sweeps: Sequence[estimates.Sweep]) -> list[list[str]]:
    hours: defaultdict[str, float] = defaultdict(float)
    for plan, command in steps.missing:
        hours[command.purpose] += estimates.of_step(plan, command).seconds / 3600
    for runner in preflight.runners(report.fitted.plans, report.asked).values():
        if not runner.is_ready:
            hours["fetch"] += runner.image.size_gb * 1e9 / estimates.DOWNLOAD_BYTES_PER_S / 3600
    if all(each.seconds is not None for each in sweeps):
        hours["load"] = sum(each.seconds or 0 for each in sweeps) / 3600
    return [[what, f"{value:.1f}"] for what, value in [*hours.items(), ("together", sum(hours.values()))]]


def opening(report: Report) -> str:
    """What a run says before it begins, or stops: what is lost, what is to be known, what is in the way."""
    parts = [
        layout.listed(report.fitted.losses, "What is lost against the papers:"),
        layout.listed(report.warnings, "To be known:"),
        layout.listed(report.problems, "Nothing was started, because:"),
    ]
    return "\n\n".join(filter(None, parts))

"""How long will it take, and how much disk? Estimates before hours of GPU time are spent.

Nobody has measured them: each follows from an assumption that :data:`ASSUMPTIONS` names. Where a step has been run
here, its own duration stands instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from erlib import config
from erlib.config import Configuration, Mix, Profile
from erlib.config.system import EXPERTS_ON_GPUS
from erlib.dgx import builds
from erlib.dgx.checkpoints import CALIBRATION
from erlib.dgx.containers import Command
from erlib.dgx.tensorrt_llm import Plan
from erlib.engines import llama
from erlib.machine.hardware import Gpu
from erlib.paper_scale import steptimes
from erlib.paper_scale.steptimes import StepTimes
from erlib.workload import lengths, prompts

DOWNLOAD_BYTES_PER_S = 100e6
CONVERT_BYTES_PER_S = 0.5e9
CALIBRATE_S_PER_PARAMETER = 25e-9
AWQ_S_PER_PARAMETER = 60e-9
BUILD_S, BUILD_BYTES_PER_S = 180.0, 0.1e9
START_S, LOAD_BYTES_PER_S = 60.0, 4e9
POINT_S = 3.0
ADAPTER_S = 30.0
CALIBRATION_BYTES, TOOLKIT_BYTES = 2.5e9, 0.1e9
IMAGE_ON_DISK = 3.0
RECORD_BYTES_PER_TOKEN = 4.0
HOST_BYTES_PER_PARAMETER = 4.3
FP8_BYTES_PER_PARAMETER = 3.0

ASSUMPTIONS = {
    "download": f"{DOWNLOAD_BYTES_PER_S / 1e6:.0f} MB/s",
    "convert": f"{CONVERT_BYTES_PER_S / 1e9:g} GB/s read and written",
    "calibrate": f"{CALIBRATE_S_PER_PARAMETER * 1e9:.0f} s per 10^9 parameters (FP8 weights, FP8 and INT8 KV cache), "
    f"{AWQ_S_PER_PARAMETER * 1e9:.0f} s (AWQ)",
    "build": f"{BUILD_S / 60:.0f} minutes, and {BUILD_BYTES_PER_S / 1e6:.0f} MB/s of weights per GPU",
    "start": f"{START_S:.0f} s, and {LOAD_BYTES_PER_S / 1e9:.0f} GB/s of weights, all instances together",
    "load": "engines alone, from tables of H100 kernel times or a roofline; gateways and clients cost nothing; "
    f"engines that share a GPU take turns; {POINT_S:.0f} s between points; paper 2's answers as long as MLPerf's (its "
    "models may write on, up to the limit)",
    "disk": f"checkpoint as downloaded; converted checkpoint and engine as large as the weights; image times "
    f"{IMAGE_ON_DISK:.0f} where docker unpacks it; {RECORD_BYTES_PER_TOKEN:.0f} bytes of records per token",
    "host memory": f"{HOST_BYTES_PER_PARAMETER:g} bytes per parameter to convert (300 GB for 70B)",
    "GPU memory": f"{FP8_BYTES_PER_PARAMETER:g} bytes per parameter to calibrate FP8 (TensorRT-LLM: over 210 GB "
    "for 70B)",
}
"""What each kind of estimate rests on, in words."""


@dataclass(frozen=True)
class Cost:
    """What one step takes."""

    seconds: float
    disk_bytes: float
    measured: bool = False
    """Whether the seconds are those of an earlier run here."""


def of_step(plan: Plan, command: Command) -> Cost:
    """What a step of a plan takes; its duration is measured where it has been run here before."""
    measured_s = builds.seconds(command)
    seconds, size = _step(plan, command)
    return Cost(seconds if measured_s is None else measured_s, size, measured_s is not None)


def _step(plan: Plan, command: Command) -> tuple[float, float]:
    system, parameters = plan.system, llama.shape(plan.system.model).parameters
    loaded = llama.shape(system.model).loaded_bytes(system.dtype, system.tensor_parallel)
    downloaded = 2.0 * parameters
    if plan.adapters and command.makes.parent == plan.prefetched:
        size = plan.adapters.bytes / len(plan.adapters.folders)
        return ADAPTER_S, size
    match command.purpose:
        case "fetch":
            sizes = {plan.source: downloaded, plan.places.checkpoints / CALIBRATION: CALIBRATION_BYTES}
            size = sizes.get(command.makes, TOOLKIT_BYTES)
            return size / DOWNLOAD_BYTES_PER_S, size
        case "convert":
            calibration_s = CALIBRATE_S_PER_PARAMETER * parameters if system.kv_dtype == "int8" else 0.0
            return (downloaded + loaded) / CONVERT_BYTES_PER_S + calibration_s, loaded
        case "quantise":
            per_parameter = AWQ_S_PER_PARAMETER if system.dtype == "int4" else CALIBRATE_S_PER_PARAMETER
            return (downloaded + loaded) / CONVERT_BYTES_PER_S + per_parameter * parameters, loaded
        case "build":
            return BUILD_S + loaded / system.tensor_parallel / BUILD_BYTES_PER_S, loaded
        case _:
            return 0.0, 0.0


def host_memory_bytes(plan: Plan) -> float:
    """Host memory that converting a plan's checkpoint takes."""
    return HOST_BYTES_PER_PARAMETER * llama.shape(plan.system.model).parameters


def calibration_bytes(plan: Plan) -> float:
    """Memory that calibrating a plan's FP8 weights takes of all GPUs together."""
    return FP8_BYTES_PER_PARAMETER * llama.shape(plan.system.model).parameters


def start_s(configuration: Configuration) -> float:
    """Seconds until all servers of a configuration are ready."""
    system = configuration.system
    loaded = system.instances * llama.shape(system.model).loaded_bytes(system.dtype, system.tensor_parallel)
    return START_S + loaded / LOAD_BYTES_PER_S


# --- load ---------------------------------------------------------------------------------------------------------

_DATA_SHEETS = {"H200": steptimes.H200, "H100": steptimes.H100, "A100": steptimes.A100}


def step_times(configuration: Configuration, gpu: Gpu) -> StepTimes | None:
    """Step times of one instance: a table of H100 kernels, else a roofline; None for a GPU without data sheet here."""
    sheet = next((sheet for name, sheet in _DATA_SHEETS.items() if name in gpu.name), None)
    system = configuration.system
    if sheet is None:
        return None
    if sheet is steptimes.H100:
        try:
            return steptimes.for_configuration(configuration)
        except steptimes.OutOfRange:
            pass
    shape = llama.shape(system.model)
    return steptimes.Roofline(shape, sheet, system.dtype, system.kv_dtype, system.tensor_parallel)


@dataclass(frozen=True)
class Turn:
    """One request of every user, in tokens."""

    prompt: float
    answers: tuple[float, ...]
    """Ascending, at evenly spaced quantiles."""

    @property
    def answer(self) -> float:
        return float(np.mean(self.answers))

    def longest_of(self, requests: int) -> float:
        """Longest answer to expect of so many requests; of a single one, the middle one."""
        return float(np.quantile(self.answers, requests / (requests + 1)))


def turns(profile: Profile, workload: str) -> tuple[Turn, ...]:
    """What each user sends: paper 1's base prompt and its continuation, one prompt in the other experiments."""
    settings = profile.workload
    if workload == "p1":
        base, answer = settings.p1_input_tokens, settings.p1_output_tokens
        return tuple(Turn(prompt, (answer,)) for prompt in (base, base + answer))
    if workload == "preliminary":
        return (Turn(settings.p1_input_tokens, (settings.preliminary_output_tokens,)),)
    prompt = float(np.mean(lengths.input_tokens("p2", settings, 1000)))
    if workload == "overhead":
        return (Turn(prompt, (profile.overhead.output_tokens,)),)
    full = profile.model_copy(
        update={
            "scale": config.Scale(users=1, tokens=1),
            "workload": settings.model_copy(update={"p2_answers": "mlperf"}),
        }
    )
    answers, _ = lengths.answer_tokens("p2", full, 1000, np.random.default_rng(0))
    return (Turn(prompt, tuple(np.sort(answers))),)


def point_s(
    configuration: Configuration, steps: StepTimes, around: Sequence[Turn], users: int, share: float = 1.0
) -> float:
    """Seconds of one point, by its busiest instance, which has `share` of the users.

    Its requests take turns in its batch slots (or in what its KV cache holds): each wave lasts as long as reading its
    prompts and writing a mean answer at the mean context. The last wave thins out, until its longest answer is written.
    """
    system, seconds = configuration.system, 0.0
    mine = max(1, math.ceil(users * share))
    held = llama.kv_tokens(system)
    for turn in around:
        slots = max(1, min(mine, system.batch_size, int(held // (turn.prompt + turn.answers[-1]))))
        wave_s = slots * steps.prefill_s(round(turn.prompt))
        wave_s += turn.answer * _decode_s(steps, slots, turn.prompt + turn.answer / 2)
        longest = turn.longest_of(slots)
        tail_s = (longest - turn.answer) * _decode_s(steps, max(1, slots // 4), turn.prompt + longest)
        seconds += mine / slots * wave_s + max(0.0, tail_s)
    return seconds


def _decode_s(steps: StepTimes, batch: int, context: float) -> float:
    limits = steps.limits
    return steps.decode_s(int(min(batch, limits.batch)), round(min(context, limits.context)))


def busiest_share(configuration: Configuration, profile: Profile, mix: Mix) -> float:
    """Share of the requests that reach the busiest instance."""
    if configuration.routing != "expert_router" or configuration.adapters:
        return 1 / configuration.system.instances
    return float(prompts.mix_shares(mix, configuration.system.instances, profile.workload.sigma).max())


# --- the whole profile --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """One system in one experiment."""

    experiment: str
    configuration: Configuration
    points: int
    seconds: float | None
    """Of all points and one start; None where nothing is known about the GPU."""
    longest_point_s: float | None


def sweeps(
    profile: Profile, load: Sequence[Configuration], preliminary: Sequence[Configuration], gpu: Gpu
) -> list[Sweep]:
    """What the experiments of a profile take on `gpu`, in the order of the notebooks."""

    def sweep(
        experiment: str, one: Configuration, workload: str, users: Sequence[int], repeats: int,
        mixes: Sequence[Mix] = ("uniform",),
    ) -> Sweep:  # fmt: skip
        points = len(users) * repeats * len(mixes)
        steps, around = step_times(one, gpu), turns(profile, workload)
        if steps is None:
            return Sweep(experiment, one, points, None, None)
        each = [
            one.per_gpu * point_s(one, steps, around, level, busiest_share(one, profile, mix)) + POINT_S
            for mix in mixes
            for level in users
        ]
        return Sweep(experiment, one, points, repeats * sum(each) + start_s(one), max(each))

    found = [
        sweep("preliminary", one, "preliminary", profile.preliminary.users, profile.preliminary.repeats)
        for one in preliminary
    ]
    for paper, settings in {"p1": profile.paper1, "p2": profile.paper2}.items():
        for one in load:
            if one.id in settings.configs:
                # other mixes differ only where prompts are routed by cluster
                mixes = settings.mixes if one.routing == "expert_router" else settings.mixes[:1]
                found.append(sweep(f"load, paper {paper[1]}", one, paper, settings.users, settings.repeats, mixes))
    overhead, ways = profile.overhead, len(get_args(config.Relay))
    found += [
        sweep("overhead", one, "overhead", overhead.users, overhead.repeats * ways)
        for one in load
        if one.id == overhead.config
    ]
    served = profile.experts
    found += [
        sweep("experts", one, "p2", served.users, served.repeats)
        for one in load
        if served.users and one.id in EXPERTS_ON_GPUS
    ]
    return found


def records_bytes(profile: Profile) -> float:
    """Disk space of all records: most of it is one timestamp per token."""
    tokens = 0.0
    for workload, settings in {"p1": profile.paper1, "p2": profile.paper2}.items():
        answers = sum(turn.answer for turn in turns(profile, workload))
        tokens += len(settings.configs) * len(settings.mixes) * settings.repeats * sum(settings.users) * answers
    return tokens * RECORD_BYTES_PER_TOKEN

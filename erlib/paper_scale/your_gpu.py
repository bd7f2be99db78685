"""This machine's GPU: its step times beside an H100's, and eight such GPUs in virtual time.

Measuring is the work of ``scripts/measure_step_times.py``, which needs a PyTorch with CUDA and nothing of this
repository; the environment of this repository has one for CPUs. Where there is no GPU, everything is shown with a table
that is in the repository, and says so.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from erlib import config, paths
from erlib.config import ConfigError, Profile
from erlib.engines import llama
from erlib.load import published, records
from erlib.machine import hardware
from erlib.machine.progress import Bar, say
from erlib.paper_scale import measured_steps, steptimes, validation
from erlib.paper_scale.clock import HARDWARE
from erlib.paper_scale.fitting import Fitted
from erlib.paper_scale.measured_steps import FORM
from erlib.paper_scale.steptimes import PARTS, OutOfRange

SCRIPT = paths.ROOT / "scripts" / "measure_step_times.py"
H100 = paths.FACTS / "h100_pytorch_step_times.csv"
H200 = paths.FACTS / "h200_pytorch_step_times.csv"
"""Stands in where no GPU is; like the H100's, measured for this repository."""
H100_NAMES = {"PyTorch": "H100, PyTorch", "TensorRT-LLM": "H100, NVIDIA's table"}
"""What a table is held against: the same script's, and the one that simulations use."""

REPORTED = [
    ("TPOT [s]", 0.1, 0.1, "paper 1, B to D"),
    ("tokens/s", 200.0, 2000.0, "paper 1, B to D, time buckets"),
    ("routing [s]", 0.442 - 0.302, 0.442 + 0.302, "paper 2, mean and standard deviation"),
]
"""What the papers print of routed experts on eight H100s: quantity, from, to, where. Paper 2 prints no number for E."""

_ANSWERS_S = 60
_FAR = re.compile(r"(\d+)/(\d+) points")


@dataclass(frozen=True)
class StepTable:
    """Measured step times, and whose they are."""

    file: Path
    about: dict[str, Any]
    """What the script has written beside it."""
    here: bool
    """Whether they are of this machine's GPU."""

    @property
    def device(self) -> str:
        return str(self.about.get("device", "a device that its description does not name"))

    @property
    def label(self) -> str:
        """Whose, and whether they were measured here, in words that belong on whatever is made of them."""
        when = f"PyTorch {self.about.get('torch', '?')}, {self.about.get('date', 'undated')}"
        return f"{self.device}, measured {'here' if self.here else 'elsewhere'} ({when})"


def check(profile: Profile) -> None:
    """Refuse at once what :func:`step_table` would refuse, but for what only the GPU knows.

    Raises
    ------
    ConfigError
        In one line: if ``your_gpu.config`` is of a form that PyTorch does not measure, a model has no shape, or
        ``your_gpu.steps`` is no table of the script or of other models.
    """
    settings = profile.your_gpu
    system = config.load_configuration(settings.config).system
    if (system.dtype, system.kv_dtype) != ("fp16", "fp16"):
        raise ConfigError(
            f"your_gpu.config={settings.config} has {system.dtype.upper()} weights and {system.kv_dtype.upper()} KV "
            "cache; PyTorch alone measures attention in FP16: choose p2.E or p1.C"
        )
    for model in settings.models:
        llama.shape(model.partition(":")[0])
    if settings.steps:
        _checked(_described(Path(settings.steps), here=False), settings.config)


def step_table(profile: Profile) -> StepTable:
    """Step times of this machine's GPU, measured unless they have been; or others, and a line that says so.

    Raises
    ------
    ConfigError
        As :func:`check`, and if the GPU computes no FP8 or has too little memory.
    """
    check(profile)
    settings = profile.your_gpu
    if settings.steps:
        found = _described(Path(settings.steps), here=False)
    elif not (gpus := hardware.gpus()):
        say(
            "no CUDA GPU here (nvidia-smi is missing or finds none): what follows is an H200's, measured elsewhere; "
            "--set your_gpu.steps=FILE shows a table of your own"
        )
        found = _described(H200, here=False)
    elif not (python := _python_with_cuda(settings.python)):
        say(
            f"{gpus[0].name} is here, but no Python whose PyTorch sees it: what follows is an H200's. Name one with "
            "--set your_gpu.python=FILE, or run scripts/measure_step_times.py elsewhere and set your_gpu.steps"
        )
        found = _described(H200, here=False)
    else:
        found = _measured(gpus[0], python, profile)
    _checked(found, settings.config)
    print(f"step times: {found.label}")
    return found


def _checked(found: StepTable, name: str) -> None:
    try:
        measured_steps.read(found.file)
        steptimes.for_configuration(config.load_configuration(name), found.file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{_one_line(error)} (for your_gpu.config={name})") from None


def _described(file: Path, here: bool) -> StepTable:
    beside = file.with_suffix(".json")
    try:
        about = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{beside}, which says what {file.name} was measured on, cannot be read ({_one_line(error)}): "
            "scripts/measure_step_times.py writes both"
        ) from None
    return StepTable(file, about, here)


def _python_with_cuda(named: str | None) -> str | None:
    """The named one, or the first at hand, if its PyTorch sees a GPU."""
    candidates = [named] if named else [sys.executable, shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin")]
    asks = "import torch; raise SystemExit(not torch.cuda.is_available())"
    for python in filter(None, candidates):
        try:
            asked = subprocess.run([python, "-c", asks], capture_output=True, check=False, timeout=_ANSWERS_S)
        except (OSError, subprocess.SubprocessError):
            continue
        if asked.returncode == 0:
            return python
    return None


def _measured(gpu: hardware.Gpu, python: str, profile: Profile) -> StepTable:
    """Of this machine's GPU, by the script; what it has measured before is found."""
    settings = profile.your_gpu
    if not gpu.has_fp8 and (eight := [model for model in settings.models if ":fp8" in model]):
        raise ConfigError(f"{gpu.name} computes no FP8: leave {', '.join(eight)} out of your_gpu.models")
    file = paths.CACHE / "step_times" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.name.lower()).strip('-')}.csv"
    if file.exists() and file.with_suffix(".json").exists():
        known = _described(file, here=True)
        plans = {_plan(model) for model in settings.models}
        if plans <= set(known.about.get("complete", [])):
            say(f"step times found in {file}")
            return known
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [python, str(SCRIPT), str(file), "--models", *settings.models, "--budget-s", f"{settings.budget_s:g}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            said = list(_followed(process, gpu.name))
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        reason = (said or ["no reason given"])[-1].removeprefix("error: ")
        reason = reason.replace("name another file", "remove it, and everything is measured anew")
        raise ConfigError(f"{gpu.name} was not measured: {reason}")
    left_out = [line for line in said if " left out: " in line]
    if left_out:
        say(f"{len(left_out)} points left out, the first: {left_out[0]}")
    try:
        steptimes.for_configuration(config.load_configuration(settings.config), file)
    except OutOfRange as error:
        why = f"the first of {len(left_out)} that it could not: {left_out[0]}" if left_out else "the time was over"
        raise ConfigError(
            f"{gpu.name}: too little was measured for {settings.config} ({why}); run again, or choose a smaller model: "
            f"{_one_line(error)}"
        ) from None
    return _described(file, here=True)


def _plan(model: str) -> str:
    """As the script writes down what is complete: with its defaults."""
    return ":".join((*model.split(":"), *("fp16", "1")[model.count(":") :])[:3])


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _followed(process: subprocess.Popen[str], name: str) -> Iterator[str]:
    """What it says, line by line, with a bar for how far it is."""
    assert process.stdout is not None
    with Bar(unit="point", desc=f"step times of {name}") as bar:
        before = 0
        for line in process.stdout:
            if far := _FAR.search(line):
                done, bar.total = map(int, far.groups())
                bar.update(max(0, done - before))
                before = done
            yield line.strip()


def ceilings(table: StepTable) -> pd.DataFrame:
    """What the device does at best, beside an H100 and an H200: a large copy (GB/s), a large FP16 product (TFLOP/s)."""
    others = [_described(file, here=False) for file in (H100, H200) if file != table.file]
    rows = {one.label: one.about for one in (table, *others)}
    frame = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=["copy_gb_per_s", "fp16_tflops"])
    return frame.astype(float)


def beside_h100(table: StepTable) -> pd.DataFrame:
    """Each measured point beside an H100's, measured by the same script, and beside the table that simulations use.

    Returns
    -------
    DataFrame
        Columns of the measured table, ``beside`` (values of :data:`H100_NAMES`) and ``ratio`` (this over the H100).
    """
    rows = measured_steps.read(table.file)
    rows = rows[rows["part"].isin(PARTS)]
    keys = [*FORM, "part", "x", "y"]
    same = rows.merge(measured_steps.read(H100)[[*keys, "ms"]], on=keys, suffixes=("", "_h100"))
    same = same.assign(ratio=same["ms"] / same["ms_h100"], beside=H100_NAMES["PyTorch"]).drop(columns="ms_h100")
    nvidia = measured_steps.entry_by_entry(table.file)
    nvidia = nvidia[nvidia["part"].isin(PARTS)].assign(beside=H100_NAMES["TensorRT-LLM"]).drop(columns="table_ms")
    return pd.concat([same, nvidia], ignore_index=True)


def by_part(beside: pd.DataFrame) -> pd.DataFrame:
    """Per part: how many points, the median ratio, and the worst (the farthest from 1, whichever way)."""
    by = beside.groupby(["beside", "model", "dtype", "tensor_parallel", "part"], sort=False)["ratio"]
    return by.agg(points="size", median="median", worst=lambda ratio: ratio.loc[np.log(ratio).abs().idxmax()])


def eight_of_them(table: StepTable, profile: Profile) -> pd.DataFrame:
    """``your_gpu.config`` on eight such GPUs, one for each expert, beside the same with NVIDIA's table of the H100.

    See :func:`erlib.paper_scale.measured_steps.simulated_from`: nothing but engines and users around, prompts uniform
    over experts. A GPU with less memory than an H100 holds fewer tokens and runs fewer sequences.

    Raises
    ------
    ConfigError
        If its memory does not hold the system, or its table ends before a step that is asked for.
    """
    settings = profile.your_gpu
    full = config.at_paper_scale(profile)
    try:
        return measured_steps.simulated_from(
            *(settings.config, table.file, full, settings.users, settings.repeats), table.about.get("memory_bytes")
        )
    except OutOfRange as error:
        raise ConfigError(f"{error}: measure more (the same command goes on), or lower your_gpu.users") from None


def reported() -> pd.DataFrame:
    """What the papers print about routed experts on eight H100s."""
    return pd.DataFrame(REPORTED, columns=["quantity", "from", "to", "where"]).set_index("quantity")


def served_records(profile: Profile) -> pd.DataFrame:
    """Records of ``your_gpu.config`` under load: this machine's, if they will do, or those of the repository.

    Raises
    ------
    ConfigError
        If there are none.
    """
    name, folder = profile.your_gpu.config, paths.run_dir(profile.name) / "records"
    mine = _of(records.read(folder) if folder.is_dir() else pd.DataFrame(), name)
    why = f"no records of {name} here (05_load_sweep makes some)"
    if len(mine):
        try:
            Fitted(mine)
        except ValueError as error:
            why = f"this machine's {mine['point_hash'].nunique()} points of {name} are too few ({error})"
        else:
            print(f"records of {name}: this machine's, {mine['point_hash'].nunique()} points")
            return mine
    mine = _of(published.measured(config.load_profile("laptop")), name)
    if mine.empty:
        raise ConfigError(f"{why}, and none are published: measure more, or set your_gpu.config to another system")
    print(f"{why}: those published, of {mine['host'].iloc[0]}")
    return mine


def _of(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    if frame.empty:
        return frame
    its = (frame["config"] == name) & (frame["experiment"] == "load") & (frame["mix"] == "uniform")
    its &= (frame["source"] == "measured") & (frame["status"] == "ok")
    frame = frame[its]
    return frame[frame["profile_hash"] == frame["profile_hash"].iloc[-1]] if len(frame) else frame


def from_records(served: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """The same for any served engine: step times fitted to its records, and each expert on a machine of its own.

    Parameters
    ----------
    served : DataFrame
        Records of one configuration, one user and further loads among them.
    profile : Profile
        That measured them; one of another name is looked for by its name.

    Returns
    -------
    DataFrame
        By users: each of :data:`~erlib.paper_scale.measured_steps.METRICS` as measured, with all experts on one
        machine, and ``<metric>_apart``, simulated for the same requests with a machine for each expert.

    Raises
    ------
    ConfigError
        If there is too little in the records.
    """
    try:
        steps = Fitted(served)
    except ValueError as error:
        raise ConfigError(f"step times cannot be fitted to these records: {error}") from None
    steps.at_full_speed = np.inf
    steps.limits = replace(steps.limits, instances=np.inf)
    (name,) = served["config"].unique()
    (theirs,) = served["profile"].unique()
    at = profile if theirs == profile.name else config.load_profile(theirs)
    apart = validation.predict(served, validation.measured_system(name, at, steps), HARDWARE)
    return measured_steps.by_users(served).join(measured_steps.by_users(apart).add_suffix("_apart"))

"""Sections of a profile about what happens on hardware that is not there: simulated, emulated, asked for."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Field, PositiveInt, model_validator

from erlib.config.choices import REPEATS, USERS, Classifying, LeftOpen, Mix, Preset, Section, System
from erlib.config.system import Dtype, Paper
from erlib.config.values import Count, Divisor, LocalPath, Repeats, Seconds, Several, Users


class PaperScaleSettings(Section):
    """The simulation at the papers' own scale: 8 x H100, up to 1,000 users, 1,200 tokens."""

    users: Several[Users] = Field(
        [1, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000], description=f"{USERS}, not divided by scale.users"
    )
    repeats: Repeats = Field(2, description=REPEATS)
    prompts: Count = Field(4096, description="prompts per paper, routed by the profile's own clusterer")
    presets: Several[Preset] = Field(list(get_args(Preset)), description="what is assumed around the GPUs")


class SensitivitySettings(Section):
    """The same simulation under other values of what the papers leave open, and for systems that they left out."""

    unknowns: Several[LeftOpen] = Field(list(get_args(LeftOpen)), description="what is changed, one at a time")
    users: Several[Users] = Field([200, 900], description=f"{USERS}, not divided by scale.users")
    repeats: Repeats = Field(2, description=REPEATS)
    window_s: float = Field(60, gt=0, le=3600, description="Poisson requests arrive for so long; half of it in paper 2")
    precision: float = Field(1.1, gt=1, le=2, description="the most users and requests are found within this factor")
    gpu_hour: float = Field(1.0, gt=0, le=1e6, description="price of an hour of one GPU, in any currency")


class EmulationSettings(Section):
    """Engines that only keep time, as long as those of eight H100s would, behind the real gateways and clients."""

    configs: Several[System] = Field(["p2.D"], description="systems to emulate, of engines/*.yaml")
    users: Several[Users] = Field([1, 50, 200], description=USERS)
    repeats: Repeats = Field(1, description=REPEATS)
    slow_motion: Divisor = Field(
        4.0, description="wall seconds for one second of an H100; raise it where a point cannot keep pace"
    )
    prompts: Count = Field(512, description="prompts per paper, cut to the papers' own lengths")
    steps: LocalPath | None = Field(
        None, description="step times of other GPUs, of scripts/measure_step_times.py (none: NVIDIA's of the H100)"
    )


class AblationSettings(Section):
    """What did the papers measure? Clients x routers around one emulated system, in real time."""

    config: Classifying = Field("p1.B", description="the system to emulate, of engines/*.yaml")
    users: Several[Users] = Field([1, 25, 100, 200], description=USERS)
    stock_users: Users = Field(25, description="most users of the stock router, which takes minutes for more")
    repeats: int = Field(4, ge=2, le=1000, description=f"{REPEATS}: confidence intervals need two")
    output_tokens: Count = Field(64, description="per answer; base prompts only")
    terms: PositiveInt = Field(
        500_000, le=10**8, description="vocabulary, filled up to what a C4 shard is estimated to have"
    )
    gateways: PositiveInt = Field(
        4, le=1000, description="each holds the unpickled model, most of a gigabyte while it works"
    )


class ReplicaSettings(Section):
    """Replicas of hot experts on the real serving stack, around emulated engines."""

    config: Classifying = Field("p2.D", description="the system to emulate, of engines/*.yaml")
    added: Several[Annotated[int, Field(ge=0, le=1000)]] = Field(
        [0, 1, 2, 3, 4], description="GPUs added for replicas of the hottest experts"
    )
    users: Several[Users] = Field([200], description=USERS)
    repeats: Repeats = Field(1, description=REPEATS)
    output_tokens: Count = Field(48, description="per answer, all equally long")
    slow_motion: Divisor = Field(3.0, description="as emulation.slow_motion")


class YourGpuSettings(Section):
    """This machine's GPU: its step times, and what eight of it would do."""

    config: Classifying = Field("p2.E", description="the system that is simulated, FP16 with a GPU for each expert")
    models: Several[str] = Field(
        ["llama-3-8b:fp16"], description="what is measured, as scripts/measure_step_times.py names it"
    )
    steps: LocalPath | None = Field(
        None, description="a table of that script from another machine (none: this machine's GPU is measured)"
    )
    python: LocalPath | None = Field(
        None, description="a Python whose PyTorch has CUDA (none: this environment's, or the python3 on PATH)"
    )
    budget_s: Seconds = Field(600, description="seconds that measuring may take; the next run goes on")
    users: Several[Users] = Field([1, 10, 50, 100, 200, 500, 1000], description=f"{USERS}, not divided by scale.users")
    repeats: Repeats = Field(2, description=REPEATS)


class WhatIfSettings(Section):
    """The question of notebook 13: which way to serve a model on some GPUs. ``sensitivity.gpu_hour`` is their price."""

    model: str = Field("llama-3-8b", description="of data/llama_shapes.yaml")
    gpu: str = Field("h100", description="h100, h200, a100, h100-pytorch, h200-pytorch, or a file of step times")
    gpu_gb: float | None = Field(None, gt=0, le=10_000, description="its memory in GB (none: what it is known to have)")
    gpus: int = Field(8, ge=1, le=8, description="how many there are")
    formats: list[Dtype] = Field([], description="of weights (none: all that there are step times for)")
    experts: int | None = Field(None, ge=1, le=8, description="how many; the rest is replicas (none: one per server)")
    requests_per_s: float | None = Field(150, gt=0, le=1e6, description="Poisson arrivals (none: users)")
    users: Users | None = Field(None, description="who each ask again when they have an answer (none: arrivals)")
    lengths: Paper = Field("p2", description="whose prompts and answers")
    trace: LocalPath | None = Field(
        None, description="a file with requests of your own, in their place; its arrivals count unless a load is given"
    )
    spread: Mix = Field("normal", description="of the requests over the experts")
    ttft_s: Seconds = Field(2.0, description="bound of its p99: MLPerf's for Llama 2 70B")
    tpot_s: Seconds = Field(0.2, description="likewise")
    slots: int = Field(256, ge=1, le=10_000, description="sequences that an engine runs at a time, at most")
    adapters_slower: float = Field(
        1.35,
        ge=1,
        le=100,
        description="steps of engines with adapters, times those without: 1.28 to 1.40 on an H100 with PyTorch's "
        "kernels, which engines' own may beat",
    )

    @model_validator(mode="before")
    @classmethod
    def _comes_as_its_trace(cls, value: Any) -> Any:
        trace = value.get("trace") if isinstance(value, dict) else None
        its_own = trace not in (None, "", "none") and "requests_per_s" not in value
        return {**value, "requests_per_s": None} if its_own else value

    @model_validator(mode="after")
    def _has_one_load(self) -> WhatIfSettings:
        loads = (self.requests_per_s is not None) + (self.users is not None)
        if loads > 1 or not (loads or self.trace):
            raise ValueError("set one of requests_per_s and users, and the other one to none (null)")
        return self

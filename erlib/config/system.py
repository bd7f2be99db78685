"""A *configuration* (``engines/<id>.yaml``): one system of the papers, and what stands for it on a laptop.

They are called ``p1.A`` ... ``p2.E``, because the letters mean different systems in the two papers.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from erlib import paths
from erlib.config.keys import names_of
from erlib.config.reading import ConfigError, Settings, explain, nearest, read_mapping, shown

Paper = Literal["p1", "p2"]

Dtype = Literal["fp16", "fp8", "int8", "int4"]

Routing = Literal["direct", "round_robin", "expert_router", "replicas"]
"""direct: clients to the one server. round_robin: clients alternate between servers. expert_router: NGINX, gateway,
the cluster's expert. replicas: NGINX, gateway, the next server in turn (no classification)."""

HAVE_GATEWAYS: tuple[Routing, ...] = ("expert_router", "replicas")
"""Routings whose requests pass NGINX and gateways."""

EXPERTS_ON_GPUS = ("x1.L", "p2.E")
"""What notebook 11 serves on GPUs: all experts as adapters on every one, beside the same engines without."""

Flow = Literal["engine", "llmapi"]
"""How a TensorRT-LLM model comes about; see :mod:`erlib.dgx.tensorrt_llm`."""

Version = Literal["1.2.1", "0.21.0"]
"""Of TensorRT-LLM, the newest first: those that have an image and option tables."""

RunnerKind = Literal["bare", "docker", "apptainer", "enroot"]
"""What runs the tools of an image; ``bare``: they are installed here."""

KV_BLOCK_TOKENS = 32
"""Tokens per block of OpenVINO GenAI's paged KV cache on a CPU."""


class PaperSystem(Settings):
    """One row of a paper's Table I, as printed; or what such a row would say of a system that the papers lack."""

    model: Literal["llama-2-70b", "llama-2-13b", "llama-3-70b", "llama-3-8b", "llama-3.2-1b"]
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


class LaptopSystem(Settings):
    """What stands for it on a laptop: `size` names a depth-truncated SmolLM2-135M sibling, or the whole model."""

    size: Literal["large", "small", "whole"]
    dtype: Dtype
    kv_cache: Literal["f16", "u8"]
    instances: PositiveInt
    batch_size: PositiveInt | None = Field(None, description="per instance; None: the paper's, scaled")
    kv_blocks: PositiveInt | None = Field(
        None, description="KV blocks per instance; None: the paper's KV cache, scaled"
    )
    weights: Literal["alike", "trained"] = Field(
        "alike", description="trained: each instance has the adapter of its own cluster on top of the whole model"
    )

    @model_validator(mode="after")
    def _adapters_fit(self) -> LaptopSystem:
        if self.weights == "trained" and self.size != "whole":
            raise ValueError("weights: trained: adapters have all layers, so that size must be whole")
        return self


class Configuration(Settings):
    """One system under test: ``engines/<id>.yaml``."""

    id: str = Field(pattern=r"^[a-z0-9]+\.[A-Za-z0-9-]+$")
    title: str
    note: str = ""
    routing: Routing
    paper: PaperSystem | None = Field(None, description="absent for baselines that the papers lack")
    stands_beside: str | None = Field(None, description="configuration whose batch size and KV cache it shares")
    experts: Literal["servers", "adapters"] = Field(
        "servers", description="adapters: every server has all experts, on top of one model, and the gateway names one"
    )
    per_gpu: PositiveInt = Field(1, description="instances that share a GPU; each of the papers' has one of its own")
    laptop: LaptopSystem

    @model_validator(mode="after")
    def _has_size(self) -> Configuration:
        if (self.paper is None) == (self.stands_beside is None):
            raise ValueError("give either `paper` (a row of Table I) or `stands_beside` (a baseline of our own)")
        if self.experts == "adapters" and self.routing != "expert_router":
            raise ValueError("adapters are named by a gateway that classifies: routing must be expert_router")
        return self

    @property
    def adapters(self) -> bool:
        """Whether every server has all experts."""
        return self.experts == "adapters"

    @property
    def papers(self) -> tuple[Paper, ...]:
        """Whose workloads it serves: its own paper's, or both papers' if it has a size that neither has."""
        of_its_own = self.paper is not None and not self.id.startswith(("p1.", "p2."))
        return get_args(Paper) if of_its_own else (paper_of(self.id),)

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
        found = Configuration.model_validate({"id": name, **read_mapping(path)})
    except ValidationError as error:
        raise ConfigError(explain(error, path, names_of(Configuration))) from None
    beside = found.stands_beside
    if beside is not None and (beside not in config_ids() or "paper" not in read_mapping(path.with_stem(beside))):
        raise ConfigError(f"{shown(path)}: stands_beside: {beside!r} is no configuration with a row of Table I")
    return found

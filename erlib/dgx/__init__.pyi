"""Planning, building and serving TensorRT-LLM's engines on GPUs."""

from .builds import build_report as build_report

"""Planning, building and serving TensorRT-LLM's engines on GPUs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

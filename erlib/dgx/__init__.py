"""Planning, building and serving TensorRT-LLM's engines on GPUs."""

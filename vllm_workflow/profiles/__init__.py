"""GPUs, model shapes and measured latency profiles: data files, and how they are read."""

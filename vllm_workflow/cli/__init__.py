"""The `vllm-workflow` command."""

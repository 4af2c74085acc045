"""An emulated GPU under a real vLLM server: everything but the forward pass is real."""

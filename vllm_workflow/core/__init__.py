"""Decisions without I/O: no clock, no network, no randomness, no vLLM; standard library only."""

"""Measuring latency profiles: tables of timings, and probes of a live server."""

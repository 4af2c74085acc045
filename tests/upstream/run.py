"""Runs vLLM's own scheduler tests against this package's schedulers.

    python tests/upstream/run.py

The tests come from the source distribution of the installed vLLM version, which pip downloads
once into `.cache/`. What must hold: with our classes the same tests fail as with vLLM's own
(usually none), and deliberately broken classes are noticed. Exit status 0 if so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
PLUGIN_DIR = Path(__file__).parent

FILES = (
    "test_scheduler.py",
    "test_async_scheduler.py",
    "test_priority_preemption_bug.py",
    "test_deferred_block_free.py",
    "test_worker_slot_overflow.py",
    "test_output.py",
    "test_prefix_replay.py",
    "test_repetition_detection.py",
    "test_swa_inflight_window_free.py",
    "test_mamba_align_chunk_split.py",
)
SAME_AS_STOCK = ("shipped", "ordered")
MUTANTS = ("last_in_first_out", "keeps_blocks", "first_victim")
# What the tests ask for by name; of each only the configuration and a tokenizer are read.
STUB_MODELS = {
    "facebook/opt-125m": ("OPTConfig", "OPTForCausalLM"),
    "facebook/opt-350m": ("OPTConfig", "OPTForCausalLM"),
    "llava-hf/llava-1.5-7b-hf": ("LlavaConfig", "LlavaForConditionalGeneration"),
    "Qwen/Qwen2.5-VL-3B-Instruct": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--cache", type=Path, default=REPOSITORY / ".cache" / "vllm-tests",
        help="where downloaded tests are kept (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--variants", nargs="+", default=[*SAME_AS_STOCK, *MUTANTS], metavar="NAME",
        help="which classes to compare with vLLM's own (default: all)",
    )  # fmt: skip
    args = parser.parse_args()
    version = installed_version()
    directory = args.cache / version
    prepare(directory, version)
    print(f"vLLM {version}: {len(FILES)} files of its own scheduler tests\n")
    print(f"{'classes':20} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}  verdict")
    stock = run_tests(directory, "")
    verdicts = [report("vLLM's own", stock, stock, must_differ=False)]
    for name in args.variants:
        outcome = run_tests(directory, f"mutants:{name}")
        verdicts.append(report(name, outcome, stock, must_differ=name in MUTANTS))
    return 0 if all(verdicts) else 1


def installed_version() -> str:
    """Release number of the vLLM that this Python imports, without its build tag."""
    command = [sys.executable, "-c", "import vllm.version as v; print(v.__version__)"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return output.split()[-1].partition("+")[0]


def prepare(directory: Path, version: str) -> None:
    """Have the tests of a release, and the stub models they name, in a directory."""
    marker = directory / "complete"
    if marker.exists():
        return
    shutil.rmtree(directory, ignore_errors=True)
    download = directory / "download"
    download.mkdir(parents=True)
    # pip fails at the metadata of the sdist, which needs CMake; the tree is unpacked by then.
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-clean", "--no-deps"),
            *("--no-build-isolation", "--no-binary", ":all:", f"vllm=={version}", "-d", "."),
        ],
        cwd=download,
        env={**os.environ, "TMPDIR": str(download)},
        capture_output=True,
        check=False,
    )
    trees = list(download.glob("pip-download-*/vllm_*/tests"))
    if not trees:
        raise SystemExit(f"pip could not download the source distribution of vllm=={version}")
    shutil.copytree(trees[0], directory / "tests")
    shutil.rmtree(download)
    for name, (config, architecture) in STUB_MODELS.items():
        make_stub_model(directory / name, config, architecture)
    (directory / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")  # not this repository's
    marker.touch()


def make_stub_model(path: Path, config: str, architecture: str) -> None:
    """Save a configuration, and a tokenizer with one token per letter and one per image."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(i): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    image = {"image_token": "<image>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=["<image>"],
        extra_special_tokens=image,
    ).save_pretrained(path)
    getattr(transformers, config)(architectures=[architecture]).save_pretrained(path)
    if config == "LlavaConfig":
        values = json.loads((path / "config.json").read_text(encoding="utf-8"))
        values |= {"image_token_index": len(letters), "image_token_id": len(letters)}
        values["text_config"]["max_position_embeddings"] = 4096
        (path / "config.json").write_text(json.dumps(values), encoding="utf-8")
        preprocessor = {
            "image_processor_type": "CLIPImageProcessorPil",
            "processor_class": "LlavaProcessor",
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
        }
        (path / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")


def run_tests(directory: Path, variant: str) -> dict[str, str]:
    """Outcome of each test with the classes of `mutants.py` that `variant` names."""
    outcomes = directory / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    tests = [f"tests/v1/core/{f}" for f in FILES if (directory / "tests/v1/core" / f).exists()]
    path = [str(directory), str(PLUGIN_DIR), str(REPOSITORY)]
    if importlib.util.find_spec("torchvision") is None:
        path.append(str(PLUGIN_DIR / "without_torchvision"))
    if "PYTHONPATH" in os.environ:
        path.append(os.environ["PYTHONPATH"])
    start = time.monotonic()
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-c", "pytest.ini", "--noconftest", "-q", "--tb=no"),
            *("-p", "no:cacheprovider", "-p", "conformance", *tests),
        ],
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HUB_OFFLINE": "1",
            "WORKFLOW_CONFORMANCE": variant,
            "WORKFLOW_OUTCOMES": str(outcomes),
        },
        capture_output=True,
        text=True,
    )
    (directory / f"{variant.partition(':')[2] or 'stock'}.log").write_text(
        run.stdout + run.stderr, encoding="utf-8"
    )
    if not outcomes.exists():
        raise SystemExit(f"pytest did not run:\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}")
    result: dict[str, str] = json.loads(outcomes.read_text(encoding="utf-8"))
    result["seconds"] = f"{time.monotonic() - start:.0f}"
    return result


def report(name: str, outcome: dict[str, str], stock: dict[str, str], *, must_differ: bool) -> bool:
    """Print one row; whether it is as it should be."""
    failed, stock_failed = (
        {test for test, result in tests.items() if result == "failed"} for tests in (outcome, stock)
    )
    num_passed = sum(result == "passed" for result in outcome.values())
    num_skipped = sum(result == "skipped" for result in outcome.values())
    differs = failed != stock_failed
    if must_differ:
        verdict = "noticed" if differs else "NOT NOTICED"
    else:
        verdict = "DIFFERS" if differs else "same"
    if num_passed == 0:
        verdict, differs = "NOTHING RAN", not must_differ
    row = f"{num_passed:7} {len(failed):7} {num_skipped:8} {outcome['seconds']:>8}"
    print(f"{name:20} {row}  {verdict}", flush=True)
    if differs and not must_differ:
        for test in sorted(failed ^ stock_failed)[:20]:
            print(f"    {outcome.get(test, 'missing'):8} {test}")
    return differs == must_differ


if __name__ == "__main__":
    sys.exit(main())

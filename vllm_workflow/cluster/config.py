"""`cluster.yaml`: read and checked."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.yaml_config import Strict, read_yaml, validated

DEFAULT_COMMAND = "vllm serve {model} --port {port} --scheduler workflow"

_Port = Annotated[int, Field(ge=0, le=65535)]


def _words(value: Any) -> Any:
    """Split a command line; a list is taken word by word, numbers as they are written."""
    if isinstance(value, str):
        return shlex.split(value)
    if isinstance(value, list):
        return [str(x) if type(x) in {int, float} else x for x in value]
    return value


def _texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: str(v) if type(v) in {int, float} else v for k, v in value.items()}
    return value


_Words = Annotated[list[str], BeforeValidator(_words)]
_Env = Annotated[dict[str, str], BeforeValidator(_texts)]


class InstanceConfig(Strict):
    """One vLLM server to start."""

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    """Its name in headers, labels and logs; also the name of its log file."""
    port: _Port = 0
    """0 takes a free one."""
    model: str | None = None
    """Directory or name; that of the cluster by default."""
    command: _Words | None = None
    """With `{model}`, `{port}` and `{id}`; that of the cluster by default."""
    args: _Words = Field(default_factory=list)
    """Further words of the command line, after those of the cluster."""
    env: _Env = Field(default_factory=dict)
    """Environment variables, over those of the cluster."""
    cpus: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """CPUs that its processes and their threads are bound to (Linux)."""
    nice: Annotated[int, Field(ge=0, le=19)] = 0
    """How far it steps back for other processes."""
    gpus: list[Annotated[int, Field(ge=0)]] | None = None
    """GPUs that it sees, as `CUDA_VISIBLE_DEVICES`."""
    gpu: str = ""
    """Name of the GPU model, for people only."""
    latency: dict[str, float | int] = Field(default_factory=dict)
    """Step times as in `router.yaml`."""
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    """Calls side by side: told to the router and, by `--max-num-seqs`, to vLLM."""


class ClusterConfig(Strict):
    """Everything in `cluster.yaml`."""

    instances: Annotated[list[InstanceConfig], Field(min_length=1)]
    router: dict[str, Any] = Field(default_factory=dict)
    """Fields of `router.yaml` except `instances`; the router itself checks them."""
    model: str | None = None
    command: _Words = shlex.split(DEFAULT_COMMAND)
    args: _Words = Field(default_factory=list)
    """Further words of every instance's command line."""
    env: _Env = Field(default_factory=dict)
    """Environment variables of every instance."""
    log_dir: Path = Field(default=Path("logs"), strict=False)
    """One log per process, and the `router.yaml` that was made."""
    start_parallel: Annotated[int, Field(ge=1)] = 2
    """Instances that load at a time: loading takes much CPU, disk and memory."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """An instance that is not ready after this long has failed."""
    stop_grace_s: Annotated[float, Field(ge=0)] = 10.0
    """From the request to end until a process and all of its own are killed."""

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if "instances" in self.router:
            raise ValueError("router.instances: made from `instances`; leave it out")
        if "tls" in self.router:
            raise ValueError("router.tls: not on one machine; start `vllm-workflow router` itself")
        ids = [i.id for i in self.instances]
        if twice := {n for n in ids if ids.count(n) > 1} | ({"router"} & set(ids)):
            raise ValueError(f"instances: id taken: {sorted(twice)}")
        ports = [i.port for i in self.instances if i.port]
        ports += [p for p in [self.router.get("port")] if p]
        if taken := {n for n in ports if ports.count(n) > 1}:
            raise ValueError(f"instances: port declared twice: {sorted(taken)}")
        for n, instance in enumerate(self.instances):
            if not (instance.model or self.model) and "{model}" in " ".join(self.words(instance)):
                raise ValueError(f"instances.{n}.model: Field required, here or as `model`")
        return self

    def words(self, instance: InstanceConfig) -> list[str]:
        """Return the command line of an instance, its `{…}` not yet filled in."""
        seats = instance.max_num_seqs
        own = instance.command is not None
        return [
            *(self.command if instance.command is None else instance.command),
            *([] if seats is None or own else ["--max-num-seqs", str(seats)]),
            *self.args,
            *instance.args,
        ]

    def model_of(self, instance: InstanceConfig) -> str:
        return instance.model or self.model or ""

    @classmethod
    def from_mapping(
        cls, data: object, *, source: str, folder: Path | None = None
    ) -> ClusterConfig:
        """Check what YAML gave.

        Args:
            data: A mapping of fields.
            source: Where it came from, for error texts.
            folder: What relative paths are relative to; the current one by default.

        Raises:
            ConfigError: With the path to each field that does not fit.
        """
        config = validated(cls, data, source=source)
        try:
            return _located(config, folder or Path.cwd())
        except ConfigError as e:
            raise ConfigError(f"{source}: {e}") from None

    @classmethod
    def from_file(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
        """Read `cluster.yaml`; paths in it are relative to its folder.

        Raises:
            ConfigError: The file cannot be read, is not YAML, or does not fit.
        """
        data = read_yaml(path)
        if isinstance(data, dict):
            data |= overrides or {}
        return cls.from_mapping(data, source=str(path), folder=path.resolve().parent)


def executable(word: str) -> str:
    """Return the file that a command's first word names, first beside this Python.

    Raises:
        ConfigError: There is none.
    """
    beside = Path(sys.executable).parent / word
    found = str(beside) if "/" not in word and beside.is_file() else shutil.which(word)
    if found is None:
        raise ConfigError(
            f"command: no executable {word!r} beside {sys.executable} or on PATH"
            + ("; install vLLM, or give `command`" if word == "vllm" else "")
        )
    return found


def _located(config: ClusterConfig, folder: Path) -> ClusterConfig:
    """Return `config` with absolute paths.

    Raises:
        ConfigError: A model that can only be a directory is none.
    """
    instances = [
        i.model_copy(update={"model": _model(i.model, folder, f"instances.{n}.model")})
        for n, i in enumerate(config.instances)
    ]
    return config.model_copy(
        update={
            "instances": instances,
            "model": _model(config.model, folder, "model"),
            "log_dir": folder / config.log_dir.expanduser(),
        }
    )


def _model(model: str | None, folder: Path, where: str) -> str | None:
    if model is None:
        return None
    path = folder / Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{where}: {path} holds no config.json, so it is not a model")
        return str(path)
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ConfigError(f"{where}: there is no directory {path}")
    return model

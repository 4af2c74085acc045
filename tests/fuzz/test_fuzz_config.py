"""Whatever stands in `router.yaml`: a configuration, or an error that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_workflow.core.errors import ConfigError
from vllm_workflow.router.config import RouterConfig

SCALARS: Any = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["http://a:1", "https://[::1", "sha256:0:0:0", "*", "PATH", "/dev/null"])
)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)


def section(*names: str) -> st.SearchStrategy[Any]:
    """A section with some of its fields, of any value; or anything else."""
    return st.dictionaries(st.sampled_from(names), ANY, max_size=4) | ANY


KEY = section("tenant", "key_hash", "key_env", "key_file", "acts_for", "models", "name")
CONFIGS = st.fixed_dictionaries(
    {
        "instances": st.lists(
            section("url", "id", "models", "api_key_env", "tls", "latency", "num_kv_tokens"),
            max_size=2,
        )
        | st.just([{"url": "http://a:1"}])
    },
    optional={
        "auth": st.builds(lambda keys: {"keys": keys}, st.lists(KEY, max_size=2)) | ANY,
        "admin": section("host", "port", "key_hash", "key_env"),
        "tls": section("cert_file", "key_file", "client_ca_file"),
        "limits": section("max_headers", "max_bodies_mb", "header_timeout_s"),
        "workflows": ANY,
        "max_body_mb": ANY,
    },
)


def check_names(error: ConfigError, source: str) -> None:
    assert str(error).startswith(source)


@given(CONFIGS)
def test_any_mapping_is_a_configuration_or_an_error(data: Any) -> None:
    try:
        RouterConfig.from_mapping(data, source="router.yaml")
    except ConfigError as e:
        check_names(e, "router.yaml: ")


ODD = [
    b"a: 2020-99-99",
    b"a: !!int x",
    b"a: !!float x",
    b"a: !!timestamp x",
    b"a: !!binary \xc3\xa9",
    b"a: !!python/object:os.system x",
    b"? {a: 1}\n: 2",
    b"a: &a [*a]",
    b"a: &a {b: *a}",
    b"[" * 5000,
    b"a: 0x_",
    b"a: 1:99:99",
    b"<<: 5",
    b"instances: &i [*i]",
]


@given(
    st.sampled_from(ODD)
    | st.binary(max_size=200)
    | st.text(alphabet="{}[]:-&*!|>'\"#%@,a0 \n", max_size=60)
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_file_or_an_error(tmp_path: Path, raw: bytes | str) -> None:
    path = tmp_path / "router.yaml"
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    try:
        RouterConfig.from_file(path)
    except ConfigError as e:
        check_names(e, str(path))

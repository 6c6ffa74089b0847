"""docs/encryption-service-xks.md, the proxy's side: every command of it, and what it leads to."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from proxy.config import database_url
from proxy.encryption_service.access import Access
from proxy.encryption_service.call import Call, Peer
from proxy.encryption_service.core import Core
from proxy.encryption_service.credentials import SecretSealer
from proxy.encryption_service.dialects.xks import XksDialect
from proxy.encryption_service.limits import Limiter
from proxy.keys.cache import KeyCache
from proxy.tenants.directory import DirectoryStore
from runtime.audit import AuditLog
from runtime.clock import SystemClock
from tests.pki import make_tenant, write_certificate
from tests.proxy.encryption_service.aws_signer import Credentials, signed_headers
from tests.proxy.encryption_service.dialects.xks_rig import HEALTH_METADATA, judged
from tests.proxy.installation import Installation


@pytest.fixture
def installation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Installation:
    installation = Installation.make(tmp_path, capsys)
    root = write_certificate(make_tenant().root.certificate, tmp_path / "root.pem")
    installation.ask("tenant", "add", "acme", "--root", str(root))
    installation.ask("key", "add", "acme/orders", "--csr", str(tmp_path / "orders.csr"))
    return installation


def settings_file(path: Path, prefix: str, **more: Any) -> str:
    store = {"prefix": prefix, "keys": {"orders-1": "orders"}, **more}
    path.write_text(json.dumps({"stores": [store]}))
    return str(path)


def health(installation: Installation, console_file: Path) -> tuple[int, Any]:
    """What AWS KMS hears that was given *console_file*, of a process that read the directory just now."""
    given = json.loads(console_file.read_text())
    pair = given["XksProxyAuthenticationCredential"]
    signer = Credentials(access_key_id=pair["AccessKeyId"], secret=pair["RawSecretAccessKey"])
    clock = SystemClock()
    url = database_url(installation.settings().proxy)
    with DirectoryStore.open(url, installation.state_dir, clock=clock, migrate=False) as store:
        directory = store.snapshot().encryption_service
    access = Access(lambda: directory, clock, SecretSealer(installation.state_dir))
    limiter = Limiter(clock, credential_rate=lambda _name: None)
    audit = AuditLog.open(installation.path / "calls.log", clock)
    core = Core(keys=KeyCache(clock), access=access, directory=lambda: directory, audit=audit, clock=clock)
    dialect = XksDialect(core=core, access=access, limiter=limiter, directory=lambda: directory, clock=clock)
    body = json.dumps({"requestMetadata": HEALTH_METADATA}).encode()
    path = given["XksProxyUriPath"] + "/health"
    headers = signed_headers(signer, path=path, body=body, now_s=clock.wall_s())
    try:
        call = Call(method="POST", path=path, headers=headers, body=body, peer=Peer(address="127.0.0.1"))
        return judged(dialect.handle(call))
    finally:
        audit.close()


def test_a_key_store_is_set_up_and_its_credential_rotated(installation: Installation, tmp_path: Path) -> None:
    drawn = installation.ask("dialect", "new-prefix", "acme")
    prefix = drawn["prefix"]
    assert prefix.startswith("acme/")
    assert drawn["uri_path"] == f"/{prefix}/kms/xks/v1"
    settings = settings_file(tmp_path / "xks.json", prefix)
    installation.ask("dialect", "set", "acme", "xks", "--settings", settings)

    first = tmp_path / "first.json"
    issued = installation.ask(
        *("credential", "issue", "acme", "xks", "--label", "aws"),
        *("--endpoint", prefix, "--secret-file", str(first)),
    )
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    secret = json.loads(first.read_text())["XksProxyAuthenticationCredential"]["RawSecretAccessKey"]
    assert secret not in json.dumps(issued)
    for file in installation.state_dir.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    status, answer = health(installation, first)
    assert (status, answer["ekmFleetDetails"][0]["healthStatus"]) == (
        200,
        "UNAVAILABLE",
    )  # nothing pushed yet

    second = tmp_path / "second.json"
    old = issued["credential"]["id"]
    installation.ask("credential", "rotate", old, "--overlap", "1h", "--secret-file", str(second))
    assert health(installation, first)[0] == health(installation, second)[0] == 200
    installation.ask("credential", "revoke", old)
    assert health(installation, first)[0] == 401
    assert health(installation, second)[0] == 200
    installation.ask("dialect", "disable", "acme", "xks")
    assert health(installation, second)[0] == 404


@pytest.mark.parametrize(
    ("prefix", "more"),
    [
        ("a/../b", {}),
        ("p" * 200, {}),
        ("acme", {"keys": {"..": "orders"}}),
        ("acme", {"keys": {"k": "no-such-key"}}),
        ("acme", {"keys": {"a": "orders", "b": "orders"}}),
        ("acme", {"rules": [{"name": "all"}]}),
        ("acme", {"unknown": 1}),
    ],
)
def test_what_aws_would_not_take_is_refused_at_once(
    installation: Installation, tmp_path: Path, prefix: str, more: dict[str, object]
) -> None:
    settings = settings_file(tmp_path / "xks.json", prefix, **more)
    installation.refused("dialect", "set", "acme", "xks", "--settings", settings)
    installation.refused("dialect", "new-prefix", "a b")

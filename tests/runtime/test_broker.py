"""Settings of a broker, and what of its messages does not depend on one."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.errors import ProtocolError

from runtime.broker import (
    MOST_LINE_BYTES,
    BrokerError,
    BrokerSettings,
    connected,
    in_payloads,
    unusable_files,
)
from runtime.tls import TlsError
from tests.pki import issue_server, make_server_ca, make_tenant, write_certificate, write_credential
from tests.runtime.hostile_broker import FLOOD_BYTES, HostileBroker


def _settings(**changes: Any) -> BrokerSettings:
    files = {name: Path(name) for name in ("ca_file", "certificate_file", "key_file")}
    return BrokerSettings(**({"urls": ["tls://localhost:1"]} | files | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"urls": []},
        {"urls": ["nats://localhost:4222"]},
        {"urls": ["tls://a:1", "ws://b:2"]},
        {"receipt_timeout_s": 0.0},
        {"receipt_timeout_s": 31.0},
        {"stream": ""},
        {"stream": "a.b"},
        {"stream": "a b"},
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"nats\."):
        _settings(**changes)


def test_files_and_secrets_are_told_apart() -> None:
    files, secrets = unusable_files(_settings(credentials_file=Path("creds")))
    assert set(files) == {"nats.ca_file", "nats.certificate_file"}
    assert set(secrets) == {"nats.key_file", "nats.credentials_file"}


async def test_a_broker_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    certificate, key = write_credential(make_tenant().agent_tls(), tmp_path, "tls")
    ca = write_certificate(make_server_ca().certificate, tmp_path / "ca.pem")
    settings = _settings(ca_file=ca, certificate_file=certificate, key_file=key)
    with pytest.raises(BrokerError, match="tls://localhost:1"):
        async with connected(settings, name="test"):
            pass


async def test_files_that_are_missing_are_named() -> None:
    with pytest.raises(TlsError, match="ca_file"):
        async with connected(_settings(), name="test"):
            pass


def test_tokens_are_parted_by_size() -> None:
    tokens = ["a" * 4, "b" * 4, "c" * 4]
    assert list(in_payloads(tokens, most_bytes=10)) == [tokens[:2], tokens[2:]]
    assert list(in_payloads(tokens, most_bytes=100)) == [tokens]
    assert list(in_payloads([], most_bytes=10)) == []
    with pytest.raises(BrokerError, match="does not fit"):
        list(in_payloads(["x" * 10], most_bytes=10))


async def test_whoever_asks_for_no_tls_gets_no_connection(tmp_path: Path) -> None:
    """Somebody between us and the broker, who cannot have its certificate: strips what he cannot speak."""
    certificate, key = write_credential(make_tenant().agent_tls(), tmp_path, "tls")
    ca = write_certificate(make_server_ca().certificate, tmp_path / "ca.pem")
    async with HostileBroker(answer=lambda _: b"{}") as broker:
        settings = _settings(
            urls=[f"tls://localhost:{broker.port}"], ca_file=ca, certificate_file=certificate, key_file=key
        )
        with pytest.raises(BrokerError, match=f"tls://localhost:{broker.port}"):
            async with connected(settings, name="test"):
                pass
        assert not broker.received, "not a byte in the clear"


@pytest.mark.parametrize("begins", [b"MSG x 1 999999999999\r\n", b"HMSG x 1 12 999999999999\r\n"])
async def test_a_message_that_has_no_end_is_not_kept(tmp_path: Path, begins: bytes) -> None:
    """It would fill our memory before it is whole; the connection is ended, and tried again."""
    async with _hostile(tmp_path, floods=begins) as (broker, client), asyncio.timeout(60):
        await broker.flood_ended.wait()
        assert len(client._ps.buf) <= 2 * MOST_LINE_BYTES, "the library's, where it would be kept"
    assert FLOOD_BYTES > 8 * MOST_LINE_BYTES


async def test_what_is_neither_a_message_nor_a_line_is_not_kept(tmp_path: Path) -> None:
    async with _hostile(tmp_path) as (_, client):
        parser = client._ps
        await parser.parse(b"MSG x 9 5\r\nhello\r\nINFO " + b"A" * (MOST_LINE_BYTES - 5))
        with pytest.raises(ProtocolError):
            await parser.parse(b"A")


async def test_a_line_of_blanks_holds_up_nobody(tmp_path: Path) -> None:
    """Looked at with each number of blanks for a beginning, a megabyte of them would take an hour."""
    async with _hostile(tmp_path) as (_, client):
        parser = client._ps
        await parser.parse(b"INFO" + b" " * (MOST_LINE_BYTES - 4))
        with pytest.raises(ProtocolError):
            await parser.parse(b" ")


@asynccontextmanager
async def _hostile(path: Path, *, floods: bytes = b"") -> AsyncIterator[tuple[HostileBroker, Any]]:
    """A broker that cannot be believed, and a client of ours that is connected to it."""
    ca = make_server_ca()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*write_credential(issue_server(ca), path, "server"))
    certificate, key = write_credential(make_tenant().agent_tls(), path, "tls")
    async with HostileBroker(lambda _: b"{}", context, floods=floods) as broker:
        settings = _settings(
            urls=[f"tls://localhost:{broker.port}"],
            ca_file=write_certificate(ca.certificate, path / "ca.pem"),
            certificate_file=certificate,
            key_file=key,
        )
        async with connected(settings, name="test") as client:
            yield broker, client

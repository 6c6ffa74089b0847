"""A key server as the agent meets it: its settings, its worker, and the kill switch at the server itself."""

import asyncio
import re
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.keys import NetworkService
from key_agent import config
from key_agent.errors import KeySourceError, UnsupportedError
from key_agent.sources.key_server import KeyServerSource, KmipSettings, OpenBaoSettings
from key_agent.sources.servers.server import name_of
from key_agent.sources.source import KekReference, KekType, Verdict
from runtime.settings import SettingsError
from tests.key_agent.sources.conftest import REFERENCE, MakeSource, new_keys
from tests.key_agent.test_agent_softhsm import Site, _init, _provision, site, until  # noqa: F401 - a fixture
from tests.key_servers import BaoServer, KmipServer

S3 = NetworkService("acme", "s3")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"url": "http://127.0.0.1:8200"}, "https"),
        ({"url": "https://u:p@bao:8200"}, "https"),
        ({"url": "https://bao:8200/?x=1"}, "https"),
        ({"mount": "/transit"}, "slash"),
        ({"mount": ""}, "slash"),
        ({"key_file": Path("/k")}, "both or none"),
        ({"batch_s": 6.0}, "half"),
        ({"request_timeout_s": 0.0}, "greater than 0"),
    ],
)
def test_settings_of_openbao_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    good: dict[str, Any] = {"url": "https://bao:8200", "token_file": Path("/t")}
    OpenBaoSettings(**good)
    with pytest.raises(ValueError, match=said):
        OpenBaoSettings(**(good | changes))


@pytest.mark.parametrize(("changes", "said"), [({"host": ""}, "host"), ({"port": 0}, "port")])
def test_settings_of_kmip_that_do_not_fit(changes: dict[str, Any], said: str) -> None:
    good: dict[str, Any] = {"host": "kmip", "ca_file": "/c", "certificate_file": "/p", "key_file": "/k"}
    with pytest.raises(ValueError, match=said):
        KmipSettings(**(good | changes))


_AGENT = """
[agent]
id = "hq"
tenant = "acme"
environment_id = "main"
state_dir = "/var/lib/x"
root_certificate_file = "root.pem"
[signing]
certificate_file = "s.pem"
key_file = "s.key"
[tls]
certificate_file = "t.pem"
key_file = "t.key"
"""
_BAO = '[openbao]\nurl = "https://bao:8200"\ntoken_file = "token"\n'
_KMIP = '[kmip]\nhost = "kmip"\nca_file = "c"\ncertificate_file = "p"\nkey_file = "k"\n'


def test_there_is_one_source(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    for sections in ("", _BAO + _KMIP):
        path.write_text(_AGENT + sections)
        with pytest.raises(SettingsError, match="exactly one"):
            config.load(path, {})
    path.write_text(_AGENT + _BAO)
    settings = config.load(path, {})
    files, secrets = config.source_files(settings)
    assert (files, list(secrets)) == ({}, ["openbao.token_file"])
    assert secrets["openbao.token_file"] == tmp_path / "token"
    path.write_text(_AGENT + _KMIP)
    files, secrets = config.source_files(config.load(path, {}))
    assert (list(files), list(secrets)) == (["kmip.ca_file", "kmip.certificate_file"], ["kmip.key_file"])


async def test_only_what_a_server_can_be(make_source: MakeSource, openbao_server: BaoServer) -> None:
    source: Any = make_source(openbao_server.settings())
    with pytest.raises(UnsupportedError, match="aes-256"):
        await source.create_kek(REFERENCE, kek_type=KekType.RSA_3072)


@pytest.mark.parametrize("name", ["openbao", "kmip"])
async def test_a_server_that_hangs_is_an_outage_and_costs_a_worker_at_most(
    request: pytest.FixtureRequest, make_source: MakeSource, name: str
) -> None:
    server: BaoServer | KmipServer = request.getfixturevalue(f"{name}_server")
    server.clear()
    settings = msgspec.structs.replace(server.settings(), request_timeout_s=4.0)
    source: Any = make_source(settings)
    assert isinstance(source, KeyServerSource)
    kek = await source.create_kek(REFERENCE)
    server.freeze()
    try:
        found = await source.diagnose(kek)
        assert found.verdict is Verdict.UNREACHABLE
        with pytest.raises(KeySourceError) as caught:
            await source.generate(kek, new_keys(1))
        assert caught.value.verdict is Verdict.UNREACHABLE
    finally:
        server.thaw()
    async with asyncio.timeout(200):
        # Its starts are spaced now.
        while (await source.diagnose(kek)).verdict is not Verdict.OK:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.2)


async def test_a_token_file_that_others_can_read_is_not_used(
    make_source: MakeSource, openbao_server: BaoServer, tmp_path: Path
) -> None:
    open_to_all = tmp_path / "token"
    open_to_all.write_text("s.secret-token")
    open_to_all.chmod(0o644)
    source: Any = make_source(openbao_server.settings(token_file=open_to_all))
    with pytest.raises(KeySourceError) as caught:
        await source.create_kek(REFERENCE)
    assert "secret-token" not in str(caught.value)


def _openbao_section(server: BaoServer) -> str:
    return (
        f'[openbao]\nurl = "{server.url}"\ntoken_file = "{server.token_file}"\nca_file = "{server.ca_file}"\n'
    )


def _kmip_section(server: KmipServer) -> str:
    return (
        f'[kmip]\nhost = "127.0.0.1"\nport = {server.port}\nca_file = "{server.ca_file}"\n'
        f'certificate_file = "{server.certificate_file}"\nkey_file = "{server.key_file}"\n'
    )


@pytest.mark.parametrize("name", ["openbao", "kmip"])
async def test_revoking_the_key_at_the_server_is_the_kill_switch(
    request: pytest.FixtureRequest,
    site: Site,  # noqa: F811
    name: str,
) -> None:
    """A real agent process, a real server; what the proxy holds is looked at from outside."""
    server: BaoServer | KmipServer = request.getfixturevalue(f"{name}_server")
    server.clear()
    await _init(site)
    section = _openbao_section(server) if isinstance(server, BaoServer) else _kmip_section(server)
    text = site.config.read_text()
    site.config.write_text(re.sub(r"\[pkcs11\].*?(?=\[refresh\])", section + "\n", text, flags=re.DOTALL))
    assert (await site.command("doctor", exit_code=1))["checks"]
    await site.command("kek", "create")
    await _provision(site)
    kek = await site.kek()
    async with site.running() as process:
        await until(lambda: site.proxy.valid_keys(S3))
        # An outage takes nothing back.
        server.freeze()
        try:
            await _until_said(site, "unreachable")
            assert site.proxy.valid_keys(S3)
        finally:
            server.thaw()
        await _until_said(site, "ok")
        reference = KekReference(
            kek_id="its name there does not hold it",
            label=kek["label"],
            object_id=bytes.fromhex(kek["object_id"]),
            environment_id="main",
        )
        server.destroy(name_of(reference))
        await until(lambda: not site.proxy.valid_keys(S3))
        status = await site.command("status")
        assert (status["standing"], status["diagnosis"]["verdict"]) == ("revoked", "kek_destroyed")
        process.send_signal(signal.SIGTERM)


async def _until_said(site: Site, verdict: str) -> None:  # noqa: F811
    async with asyncio.timeout(60):
        while ((await site.command("status"))["diagnosis"] or {}).get("verdict") != verdict:  # noqa: ASYNC110
            await asyncio.sleep(0.2)

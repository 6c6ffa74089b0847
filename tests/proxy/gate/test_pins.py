"""Start only on the engine the gate was tested with: versions, sources, names."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from mitmproxy.proxy.layers import http

from proxy import gate
from proxy.gate import pinned, pins
from proxy.gate.stream import GuardedStream


def test_the_installed_engine_is_the_tested_one() -> None:
    gate.check_versions()


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pinned.VERSIONS, "mitmproxy", "12.2.2")
    with pytest.raises(gate.UnknownEngineError, match=r"mitmproxy 12\.2\.3 instead of 12\.2\.2"):
        gate.check_versions()


@pytest.mark.parametrize("name", sorted(pinned.TABLE))
def test_a_changed_source_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pinned.TABLE, name, "0" * 64)
    with pytest.raises(gate.UnknownEngineError) as caught:
        gate.check_versions()
    assert caught.value.differences == [f"{name} has another source"]


def test_a_source_that_is_not_recorded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(pinned.TABLE, "mitmproxy.proxy.layers.http:HttpStream")
    with pytest.raises(gate.UnknownEngineError, match="HttpStream is not recorded"):
        gate.check_versions()


def test_a_name_that_somebody_has_replaced_before_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = SimpleNamespace(__module__="json", __qualname__="loads", __wrapped__=None)
    del stranger.__wrapped__
    kept = tuple(thing for thing in pins.PINNED if thing is not http.HttpStream)
    monkeypatch.setattr(pins, "PINNED", (*kept, stranger))
    with pytest.raises(gate.UnknownEngineError) as caught:
        gate.check_versions()
    assert "json:loads is not recorded" in caught.value.differences


def test_what_is_replaced_in_memory_does_not_change_the_answer() -> None:
    gate.install()
    try:
        gate.check_versions()
    finally:
        gate.uninstall()


def test_install_is_idempotent_and_undone() -> None:
    stock = http.HttpStream
    for _ in range(2):
        gate.install()
        gate.install()
        assert http.HttpStream is GuardedStream
        gate.uninstall()
        gate.uninstall()
        assert http.HttpStream is stock


def test_the_printed_table_is_the_recorded_one() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "proxy.gate.pins"], capture_output=True, text=True, check=True
    ).stdout
    for name, digest in pinned.TABLE.items():
        assert f'"{name}": "{digest}",' in printed


async def test_the_self_test_passes_with_the_gate_and_any_levers() -> None:
    for levers in (gate.ALL, frozenset[gate.Lever]()):
        for backpressure in (True, False):
            gate.install(levers=levers, http2_backpressure=backpressure)
            try:
                await gate.self_test()
            finally:
                gate.uninstall()


async def test_the_self_test_fails_without_the_gate() -> None:
    with pytest.raises(gate.SelfTestError, match="the addon raises: plaintext reached the origin"):
        await gate.self_test()


@pytest.mark.parametrize("missing", ["HttpStream", "ProxyConnectionHandler"])
async def test_the_self_test_fails_if_a_part_is_undone(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mitmproxy.proxy import mode_servers

    owner = http if missing == "HttpStream" else mode_servers
    stock = getattr(owner, missing)
    gate.install()
    try:
        monkeypatch.setattr(owner, missing, stock)
        with pytest.raises(gate.SelfTestError):
            await gate.self_test()
    finally:
        monkeypatch.undo()
        gate.uninstall()

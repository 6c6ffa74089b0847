"""Debian's litmus through the encrypting proxy: every test says what it says without it."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.webdav_site import StartServer, dav_site
from tests.referees.apache import apache
from tests.referees.litmus import litmus
from tests.referees.wsgidav import wsgidav

EVERY = 104
"""Tests of litmus 0.13's five suites."""
# Apache's own shortcomings. Neither hides anything: the same is asked of all ways.
KNOWN: Mapping[str, Mapping[str, list[str]]] = {
    "wsgidav": {},
    "apache": {
        "locks/cond_put_corrupt_token": ["WARNING: PUT failed with 400 not 423"],
        "locks/unmapped_lock": ["WARNING: LOCK on unmapped url returned 200 not 201 (RFC4918:S7.3)"],
    },
}
# It opens a socket of its own, which speaks no TLS.
OVER_TLS = {"http/expect100": ["SKIPPED (skipping for SSL server)"]}


@pytest.mark.parametrize("start", [wsgidav, apache])
async def test_litmus_passes_as_it_passes_directly(tmp_path: Path, start: StartServer) -> None:
    def place(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    async with dav_site(tmp_path, start) as site:
        direct = await litmus(place("direct"), site.server.url + "/")
        judged = {name: said for name, said in direct.items() if set(said) != {"pass"}}
        assert sum(len(said) for said in direct.values()) == EVERY
        assert judged == {**KNOWN[site.server.name], **OVER_TLS}

        forward = await litmus(place("forward"), site.server.url + "/", proxy=site.proxy_url("forward"))
        assert forward == direct
        # TLS ends at the proxy, under another name: Destination and If name that one.
        reverse = await litmus(place("reverse"), site.base("reverse") + "/")
        assert reverse == direct
        # TLS has ended before the proxy: the client speaks of http.
        in_clear = site.base("reverse").replace("https:", "http:")
        bare = await litmus(place("bare"), in_clear + "/")
        assert bare == {**direct, "http/expect100": ["pass"]}

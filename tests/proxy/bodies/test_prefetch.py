"""Reading ahead never leads elsewhere and never reads much (ranges themselves: tests/integration)."""

import asyncio
import ssl
from pathlib import Path

import pytest

from envelope.keys import NetworkService
from proxy.bodies.prefetch import Prefetch, PrefetchError, Source
from proxy.plans.conversing import StoredKind
from proxy.tenants.model import LegacyPolicy, ServiceEntry, Upstream
from tests.fakes.origin import Exchange, RecordingOrigin, Reply


def source(port: int, target: str = "/x", *fields: tuple[bytes, bytes], owner: str = "acme/files") -> Source:
    service = ServiceEntry(
        owner=NetworkService.parse(owner),
        upstream=Upstream.parse(f"http://127.0.0.1:{port}"),
        profile="generic",
        legacy=LegacyPolicy.STRICT,
        reverse_listen=None,
        certificate=None,
        key_file=Path("/unused"),
    )
    return Source(service=service, target=target, fields=fields)


def ranged(content: bytes, etag: str | None = '"v1"') -> Reply:
    headers = [("Content-Range", f"bytes 0-87/{len(content)}")] + ([("ETag", etag)] if etag else [])
    return Reply(206, headers, [content[:88]])


async def test_the_clients_credentials_go_along_and_its_conditions_do_not() -> None:
    async with RecordingOrigin().listening() as origin, Prefetch(ssl.create_default_context()) as prefetch:
        origin.reply = ranged(bytes(200))
        begin = await prefetch.beginning(
            source(
                origin.port,
                "/a%20b?x=%2F",
                (b"Authorization", b"Basic eDp5"),
                (b"Cookie", b"a=1"),
                (b"Cookie", b"b=2"),
                (b"If-None-Match", b'"v1"'),
                (b"Range", b"bytes=5-6"),
                (b"Host", b"public.example"),
                (b"Accept-Encoding", b"gzip"),
            )
        )
    assert begin is not None
    assert (begin.data, begin.stored_bytes, begin.etag) == (bytes(88), 200, '"v1"')
    asked = origin.exchanges[0]
    assert (asked.method, asked.path) == ("GET", "/a%20b?x=%2F")
    assert asked.header("authorization") == "Basic eDp5"
    assert [value for name, value in asked.headers if name.lower() == "cookie"] == ["a=1; b=2"]
    assert asked.header("if-none-match") is None
    assert asked.header("range") == "bytes=0-87"
    assert asked.header("host") == f"127.0.0.1:{origin.port}"
    assert asked.header("accept-encoding") == "identity"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(200, [], [bytes(500_000)]),
        Reply(404, [], [b"no"]),
        Reply(302, [("Location", "http://127.0.0.1:1/")], []),
        Reply(206, [("Content-Range", "bytes 1-87/200")], [bytes(87)]),
        Reply(206, [("Content-Range", "bytes 0-99/200")], [bytes(100)]),
        Reply(206, [("Content-Range", "bytes 0-87/*")], [bytes(88)]),
        Reply(206, [], [bytes(88)]),
        Reply(206, [("Content-Range", "bytes 0-87/200"), ("Content-Encoding", "gzip")], [bytes(88)]),
    ],
)
async def test_any_other_answer_tells_nothing(reply: Reply) -> None:
    async with RecordingOrigin().listening() as origin, Prefetch(ssl.create_default_context()) as prefetch:
        origin.reply = reply
        assert await prefetch.beginning(source(origin.port)) is None
        assert len(origin.exchanges) == 1


@pytest.mark.parametrize(
    ("reply", "is_empty"),
    [
        (Reply(416, [("Content-Range", "bytes */0")], [b"no"]), True),
        (Reply(416, [], []), True),
        (Reply(200, [], []), True),
        (Reply(200, [], [b"x"]), False),
        (Reply(404, [], []), False),
        (Reply(204, [], []), False),
    ],
    ids=["refused", "refused-without-size", "whole", "not-empty", "missing", "no-content"],
)
async def test_an_object_of_no_bytes_begins_with_none(reply: Reply, is_empty: bool) -> None:
    async with RecordingOrigin().listening() as origin, Prefetch(ssl.create_default_context()) as prefetch:
        origin.reply = reply
        assert await prefetch.beginning(source(origin.port)) is None
        begin = await prefetch.beginning(source(origin.port), may_be_empty=True)
        assert (begin is not None) is is_empty
        if begin is not None:
            assert (begin.data, begin.stored_bytes) == (b"", 0)


async def test_trouble_is_one_error() -> None:
    async with RecordingOrigin().listening() as origin, Prefetch(ssl.create_default_context()) as prefetch:
        origin.reply = Reply(206, [("Content-Range", "bytes 0-87/200")], [bytes(40), bytes(48)], cut_after=1)
        with pytest.raises(PrefetchError):
            await prefetch.beginning(source(origin.port))
        dead = source(origin.port)
    async with Prefetch(ssl.create_default_context()) as prefetch:
        with pytest.raises(PrefetchError):
            await prefetch.beginning(dead)
    with pytest.raises(PrefetchError):
        await prefetch.beginning(dead)


@pytest.mark.parametrize("target", ["@127.0.0.2/", ".evil.example/", "0/"])
async def test_a_target_that_names_another_host_is_not_asked(target: str) -> None:
    async with RecordingOrigin().listening() as origin, Prefetch(ssl.create_default_context()) as prefetch:
        with pytest.raises(PrefetchError):
            await prefetch.beginning(source(origin.port, target, (b"Authorization", b"secret")))
        assert origin.connections == 0


async def test_what_an_object_is_is_remembered_for_its_version_only() -> None:
    sealed = b"\x89SGT\r\n\x1a\n" + bytes(200)
    async with RecordingOrigin().listening() as origin, Prefetch(ssl.create_default_context()) as prefetch:
        origin.reply = ranged(sealed)
        for _ in range(2):
            assert await prefetch.kind(source(origin.port), '"v1"') is StoredKind.SIMPLE
        assert len(origin.exchanges) == 1
        assert await prefetch.kind(source(origin.port), '"v2"') is None
        origin.reply = ranged(bytes(200), etag=None)
        for _ in range(2):
            assert await prefetch.kind(source(origin.port), None) is StoredKind.OTHER
        assert len(origin.exchanges) == 4
        assert await prefetch.kind(source(origin.port, "/other"), '"v1"') is None


async def test_few_things_are_remembered() -> None:
    def reply(exchange: Exchange) -> Reply:
        return ranged(bytes(200), etag=f'"{exchange.path}"')

    async with (
        RecordingOrigin().listening() as origin,
        Prefetch(ssl.create_default_context(), max_proven=2) as prefetch,
    ):
        origin.reply = reply
        for name in ("/a", "/b", "/c", "/a"):
            assert await prefetch.kind(source(origin.port, name), f'"{name}"') is StoredKind.OTHER
        assert len(origin.exchanges) == 4


async def test_a_service_that_hangs_takes_no_connection_from_another() -> None:
    """All connections of one tenant's service hang; another tenant's, at the same host, is asked at once."""

    def reply(exchange: Exchange) -> Reply:
        whole = ranged(bytes(200))
        return Reply(206, whole.headers, whole.pieces, stall_after=0) if exchange.path == "/slow" else whole

    async with RecordingOrigin().listening() as origin, Prefetch(ssl.create_default_context()) as prefetch:
        origin.reply = reply
        slow = [asyncio.create_task(prefetch.beginning(source(origin.port, "/slow"))) for _ in range(40)]
        try:
            await origin.until(lambda: len(origin.exchanges) >= 32)
            async with asyncio.timeout(5):
                assert await prefetch.beginning(source(origin.port, owner="evil/files")) is not None
            assert len(origin.exchanges) == 33
        finally:
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)

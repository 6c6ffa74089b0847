"""The configuration, judged by HAProxy, and what HAProxy does with each answer of the agent-check."""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from key_agent.load_balancing.haproxy_config import BODY_WAIT_S, haproxy_config
from key_agent.load_balancing.settings import Rule, Settings
from tests.key_agent.load_balancing.balanced import (
    HAPROXY,
    Caller,
    DataPlane,
    haproxy_running,
    planes_running,
    problem_code,
    settings_for,
    until_answers,
)

type Lines = dict[str, str]


@contextlib.asynccontextmanager
async def checks(settings: Settings, lines: Lines) -> AsyncIterator[None]:
    """Answers agent-checks with *lines*: what the lb-agent would say."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            name = (await reader.readuntil(b"\n")).decode().strip()
            writer.write(lines.get(name, "down #unknown\n").encode())
            await writer.drain()
        writer.close()

    mine = settings.lb_agent
    async with await asyncio.start_server(answer, mine.host, mine.port):
        yield


@contextlib.asynccontextmanager
async def balanced(
    planes: list[DataPlane],
    lines: Lines,
    directory: Path,
    *,
    rule: Rule = Rule.RANDOM,
    strict_geo: bool = False,
) -> AsyncIterator[Caller]:
    settings = settings_for(planes, directory, rule=rule, strict_geo=strict_geo)
    async with (
        planes_running(planes),
        checks(settings, lines),
        haproxy_running(haproxy_config(settings), directory),
        Caller(settings.frontend.bind) as caller,
    ):
        yield caller


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("strict_geo", [True, False])
def test_haproxy_takes_it(tmp_path: Path, rule: Rule, strict_geo: bool) -> None:
    planes = [DataPlane("a", "us"), DataPlane("b", "eu"), DataPlane("c", "eu")]
    text = haproxy_config(settings_for(planes, tmp_path, rule=rule, strict_geo=strict_geo))
    file = tmp_path / "haproxy.cfg"
    file.write_text(text)
    done = subprocess.run([HAPROXY, "-c", "-f", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cookie" not in text
    assert "stick" not in text


async def test_nothing_is_sent_before_the_first_up_and_random_spreads(tmp_path: Path) -> None:
    planes = [DataPlane(name) for name in "abc"]
    lines: Lines = {}
    async with balanced(planes, lines, tmp_path) as caller:
        async with asyncio.timeout(30):
            while (await caller.ask())[0] == 0:  # noqa: ASYNC110 - HAProxy has no event for it
                await asyncio.sleep(0.05)
        status, text, retry_after = await caller.ask()
        assert (status, problem_code(text), retry_after) == (503, "no_environment", "2")
        assert sum(plane.served + plane.refused for plane in planes) == 0, "a cold start sends nothing"
        lines |= dict.fromkeys("abc", "up ready 100%\n")
        await until_answers(caller, {"a", "b", "c"})
        found = await caller.count(600)
        # chi-square of three equal parts: 13.8 is p = 0.001 with two degrees of freedom.
        assert sum((found[name] - 200) ** 2 / 200 for name in "abc") < 13.8, found


@pytest.mark.parametrize("down", ["down #healing\n", "drain\n", "maint\n", "down #unknown\n"])
async def test_what_takes_an_environment_out_and_brings_it_back(tmp_path: Path, down: str) -> None:
    planes = [DataPlane(name) for name in "abc"]
    lines = dict.fromkeys("abc", "up ready 100%\n")
    async with balanced(planes, lines, tmp_path) as caller:
        await until_answers(caller, {"a", "b", "c"})
        lines["a"] = down
        await until_answers(caller, {"b", "c"})
        lines["a"] = "up ready 100%\n"
        await until_answers(caller, {"a", "b", "c"})
        lines |= dict.fromkeys("abc", down)
        await until_answers(caller, {"503"})
        status, text, _ = await caller.ask()
        assert (status, problem_code(text)) == (503, "no_environment")


@pytest.mark.parametrize(
    "path",
    ["/sealgate/v1/keys/files/encrypt", "/v1/transit/encrypt/files", "/a1b2c3/kms/xks/v1/keys/files/encrypt"],
)
async def test_self_refusal_costs_no_caller_anything(tmp_path: Path, path: str) -> None:
    """B-23's barrier: the environment refuses at once, HAProxy asks another one."""
    planes = [DataPlane(name) for name in "abc"]
    lines = dict.fromkeys("abc", "up ready 100%\n")
    async with balanced(planes, lines, tmp_path) as caller:
        await until_answers(caller, {"a", "b", "c"})
        planes[0].serves = False  # the agent-check still says that it is up
        assert {(await caller.ask(path=path))[1] for _ in range(120)} == {"b", "c"}
        assert planes[0].refused > 0, "it was asked, and another one answered"
        # Too large for the buffer: that caller is told to come again (B-24).
        answers = [await caller.ask(path=path, body=b"x" * 200_000) for _ in range(24)]
        assert {status for status, _, _ in answers} <= {200, 503}
        assert all(retry == "2" for status, _, retry in answers if status == 503)
        # What is nobody's to repeat is not repeated.
        assert 503 in [(await caller.ask(path="/dav/file"))[0] for _ in range(60)]


_PATHS_THAT_WAIT = [
    "/sealgate/v1/keys/files/encrypt",
    "/v1/transit/encrypt/files",
    "/a1/kms/xks/v1/keys/k/encrypt",
]


async def _in_pieces(
    bind: str, path: str, pieces: list[bytes], *, expects: bool = False, missing_bytes: int = 0
) -> tuple[int, str]:
    """Head and body in packets of their own, as a real network brings them: status and who."""
    host, _, port = bind.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    expect = "Expect: 100-continue\r\n" if expects else ""
    size_bytes = sum(len(piece) for piece in pieces) + missing_bytes
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\n{expect}Content-Length: {size_bytes}\r\n\r\n".encode())
    try:
        async with asyncio.timeout(60):
            if expects:
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
            for piece in pieces:
                await asyncio.sleep(0.05)
                writer.write(piece)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length:")[2].partition("\r")[0])
            return int(head.split()[1]), (await reader.readexactly(length)).decode()
    finally:
        writer.close()


@pytest.mark.parametrize("path", _PATHS_THAT_WAIT)
@pytest.mark.parametrize("expects", [False, True])
async def test_a_body_that_comes_in_pieces_goes_to_another_environment_as_a_whole(
    tmp_path: Path, path: str, expects: bool
) -> None:
    """HAProxy would send the head alone, and could not send that again (B-24)."""
    planes = [DataPlane(name) for name in "abc"]
    async with balanced(planes, dict.fromkeys("abc", "up ready 100%\n"), tmp_path) as caller:
        await until_answers(caller, {"a", "b", "c"})
        planes[0].serves = False  # the agent-check still says that it is up
        pieces = [b"x" * 16_000] * 3
        calls = (_in_pieces(caller.bind, path, pieces, expects=expects) for _ in range(60))
        assert set(await asyncio.gather(*calls)) == {(200, "b"), (200, "c")}
        assert planes[0].refused > 0


async def test_a_body_that_does_not_come_is_not_waited_for_without_end(tmp_path: Path) -> None:
    planes = [DataPlane("a")]
    settings = settings_for(planes, tmp_path)
    text = haproxy_config(settings)
    assert f"time {BODY_WAIT_S}s" in text
    async with (
        planes_running(planes),
        checks(settings, {"a": "up ready 100%\n"}),
        haproxy_running(text.replace(f"time {BODY_WAIT_S}s", "time 1s"), tmp_path),
        Caller(settings.frontend.bind) as caller,
    ):
        await until_answers(caller, {"a"})
        served = planes[0].served
        status, told = await _in_pieces(caller.bind, _PATHS_THAT_WAIT[0], [b"x"], missing_bytes=1)
        assert (status, problem_code(told)) == (408, "request_timeout")
        assert planes[0].served == served
        # What is nobody's to repeat is sent on as it comes, however long that takes.
        assert await _in_pieces(caller.bind, "/dav/file", [b"x"] * 30) == (200, "a")


@pytest.mark.parametrize("strict_geo", [False, True])
async def test_geography(tmp_path: Path, strict_geo: bool) -> None:
    planes = [DataPlane("a", "us"), DataPlane("b", "eu"), DataPlane("c", "eu")]
    lines = dict.fromkeys("abc", "up ready 100%\n")
    async with balanced(planes, lines, tmp_path, rule=Rule.GEO, strict_geo=strict_geo) as caller:
        await until_answers(caller, {"a", "b", "c"})
        assert set(await caller.count(20, "US")) == {"a"}
        assert set(await caller.count(40, "eu")) == {"b", "c"}
        lines["a"] = "down #healing\n"
        await until_answers(caller, {"b", "c"})
        found = await caller.count(20, "us")
        assert set(found) == ({"503"} if strict_geo else {"b", "c"})


async def test_a_slow_environment_gets_less(tmp_path: Path) -> None:
    planes = [DataPlane(name) for name in "abc"]
    lines = {"a": "up ready 100%\n", "b": "up ready 17%\n", "c": "up ready 100%\n"}
    async with balanced(planes, lines, tmp_path, rule=Rule.LATENCY) as caller:
        await until_answers(caller, {"a", "b", "c"})
        found = await caller.count(600)
        assert 0 < found["b"] < 120, found


async def test_a_restart_sends_nothing_to_an_environment_that_heals(tmp_path: Path) -> None:
    """B-51: even if it would serve."""
    planes = [DataPlane(name) for name in "ab"]
    settings = settings_for(planes, tmp_path)
    lines = {"a": "down #healing\n", "b": "up ready 100%\n"}
    text = haproxy_config(settings)
    async with planes_running(planes), checks(settings, lines):
        for _ in range(2):
            async with haproxy_running(text, tmp_path), Caller(settings.frontend.bind) as caller:
                await until_answers(caller, {"b"})
    assert planes[0].served == 0


async def test_a_server_that_is_killed_is_left_at_once(tmp_path: Path) -> None:
    planes = [DataPlane(name) for name in "ab"]
    settings = settings_for(planes, tmp_path)
    lines = dict.fromkeys("ab", "up ready 100%\n")
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(checks(settings, lines))
        await stack.enter_async_context(planes_running(planes[1:]))
        first = planes_running(planes[:1])
        await first.__aenter__()
        await stack.enter_async_context(haproxy_running(haproxy_config(settings), tmp_path))
        caller = await stack.enter_async_context(Caller(settings.frontend.bind))
        await until_answers(caller, {"a", "b"})
        await first.__aexit__(None, None, None)
        began_s = time.monotonic()
        assert set(await caller.count(60)) == {"b"}
        assert time.monotonic() - began_s < 30


@pytest.mark.parametrize("name", ["a b", "a\nserver x", 'a"', "", "-a", "a" * 64])
def test_names_cannot_become_configuration(tmp_path: Path, name: str) -> None:
    raw = msgspec.to_builtins(settings_for([DataPlane("a")], tmp_path), enc_hook=str)
    raw["servers"][0]["name"] = name
    with pytest.raises(msgspec.ValidationError, match="name"):
        msgspec.convert(raw, type=Settings, dec_hook=lambda kind, value: kind(value))

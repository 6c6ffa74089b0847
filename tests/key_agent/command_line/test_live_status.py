"""`status --watch`: the table as a function, the loop, and the real command in a real terminal (a pty)."""

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from key_agent.command_line import live_status
from key_agent.command_line.live_status import Line, Mark, table
from tests.children import output_of
from tests.fakes.clock import ManualClock
from tests.softhsm import SoftHsm

NOW_MS = 1_800_000_000_000


def place(state: str = "valid", *, proxy: str = "edge-1", **changes: Any) -> dict[str, Any]:
    return {
        "proxy": proxy,
        "state": state,
        "acknowledged_at_ms": NOW_MS - 43_000,
        "valid_until_ms": NOW_MS + 287_000,
        "valid_for_s": 287.0 if state == "valid" else None,
        "withdrawn_at_ms": None,
        "may_hold_keys_until_ms": None,
        "error": None,
        "error_at_ms": None,
        **changes,
    }


def proxy(name: str = "edge-1", **changes: Any) -> dict[str, Any]:
    return {
        "proxy": name,
        "url": "https://edge-1.example:8444",
        "last_push_at_ms": NOW_MS - 43_000,
        "outcome": "accepted",
        "error": None,
        "failures_in_a_row": 0,
        "answers": True,
        "answers_since_ms": NOW_MS,
        "answers_error": None,
        **changes,
    }


def status(**changes: Any) -> dict[str, Any]:
    return {
        "agent": "hq",
        "tenant": "acme",
        "environment": "main",
        "leads": True,
        "term": 7,
        "time_ms": NOW_MS,
        "standing": "consented",
        "since_ms": NOW_MS - 3_600_000,
        "diagnosis": {"verdict": "ok", "detail": "the KEK opened its canary", "at_ms": NOW_MS},
        "kek": {"id": "5f0c", "state": "active", "reason": None},
        "problems": [],
        "rotations": [],
        "ending": [],
        "services": [{"service": "acme/s3", "keys": 1, "unreadable_keys": 0, "proxies": [place()]}],
        "proxies": [proxy()],
        **changes,
    }


def drawn(
    view: dict[str, Any], *, notes: tuple[str, ...] = (), width: int = 120, height: int = 40
) -> list[Line]:
    lines = table(view, lambda _: list(notes), width=width, height=height)
    assert len(lines) <= height
    assert all(len(line.text) <= width and line.text.isprintable() for line in lines)
    return lines


def text(lines: list[Line]) -> str:
    return "\n".join(line.text for line in lines)


def test_all_is_well() -> None:
    lines = drawn(status())
    assert {line.mark for line in lines} == {Mark.HEAD, Mark.PLAIN}
    shown = text(lines)
    assert "agent hq of acme, environment main: leads, term 7" in shown
    assert "consented for 1h 00m, KEK ok (the KEK opened its canary)" in shown
    assert re.search(r"acme/s3 +edge-1 +valid +4m 47s +07:59:17$", shown, re.MULTILINE)
    assert re.search(r"edge-1 +accepted +07:59:17 +0 +yes$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("changes", "wanted", "mark"),
    [
        ({"leads": False}, "does NOT lead", Mark.BAD),
        ({"standing": "revoked"}, "consent: revoked", Mark.BAD),
        (
            {"standing": "silent", "diagnosis": {"verdict": "unreachable", "detail": "time-out"}},
            "unreachable",
            Mark.BAD,
        ),
        ({"kek": None}, "KEK: none", Mark.BAD),
        ({"kek": {"id": "5f0c", "state": "revoked", "reason": "gone"}}, "revoked (gone)", Mark.BAD),
        ({"problems": ["the watch stands still"]}, "problem: the watch stands still", Mark.BAD),
    ],
)
def test_what_is_wrong_is_marked(changes: dict[str, Any], wanted: str, mark: Mark) -> None:
    assert [line.mark for line in drawn(status(**changes)) if wanted in line.text] == [mark]


@pytest.mark.parametrize(
    ("row", "mark"),
    [
        (place("expired"), Mark.BAD),
        (place("never"), Mark.BAD),
        (place("withdrawing", may_hold_keys_until_ms=NOW_MS + 90_000), Mark.BAD),
        (place("withdrawn"), Mark.PLAIN),
        (place(valid_for_s=30.0), Mark.WARNING),
        (place(error="time: clocks differ"), Mark.WARNING),
    ],
)
def test_a_place(row: dict[str, Any], mark: Mark) -> None:
    service = {"service": "acme/s3", "keys": 1, "unreadable_keys": 0, "proxies": [row]}
    [line] = [line for line in drawn(status(services=[service])) if line.text.startswith("acme/s3")]
    assert line.mark is mark
    assert row["state"] in line.text
    assert (row["error"] or "") in line.text
    if row["may_hold_keys_until_ms"]:
        assert "1m 30s" in line.text


def test_what_needs_eyes_stands_first_and_the_rest_is_counted() -> None:
    rows = [place(proxy=f"edge-{number:03}") for number in range(100)]
    rows[57] = place("expired", proxy="edge-057")
    rows[99] = place(proxy="edge-099", error="unreachable")
    proxies = [proxy(f"edge-{number:03}") for number in range(100)]
    proxies[98] = proxy("edge-098", failures_in_a_row=4, error="timeout")
    service = {"service": "acme/s3", "keys": 1, "unreadable_keys": 0, "proxies": rows}
    lines = drawn(status(services=[service], proxies=proxies), height=24)
    assert len(lines) == 24
    shown = [line.text for line in lines]
    first = shown.index(next(line for line in shown if line.startswith("SERVICE")))
    assert "edge-057" in shown[first + 1]
    assert "edge-099" in shown[first + 2]
    second = shown.index(next(line for line in shown if line.startswith("PROXY")))
    assert "edge-098" in shown[second + 1]
    rests = [int(line.split()[2]) for line in shown if line.startswith("... and")]
    assert len(rests) == 2
    assert sum(rests) + sum("edge-" in line for line in shown) == 200
    # However small the window is, it is filled and no more.
    for height in range(1, 24):
        drawn(status(services=[service], proxies=proxies), height=height, width=20)


def test_notes_stand_above_the_table() -> None:
    shown = text(drawn(status(), notes=("rotation: acme/s3: distributing",)))
    assert shown.index("rotation: acme/s3") < shown.index("SERVICE")


def test_texts_of_others_cannot_move_the_cursor() -> None:
    evil = "\x1b[2J\x1b]0;owned\x07\r\nconsent: consented\x9b31m"
    service = {"service": "acme/s3", "keys": 1, "unreadable_keys": 0, "proxies": [place(error=evil)]}
    lines = drawn(status(services=[service], problems=[evil]))
    assert "?[2J?]0;owned???consent" in text(lines)


def test_without_an_answer_it_says_why() -> None:
    view = {"error": {"cause": "agent hq stands by: agent b on host-b leads", "next_step": "go there"}}
    lines = drawn(view)
    assert lines[0] == Line("key-agent: agent hq stands by: agent b on host-b leads", Mark.BAD)
    assert "go there" in lines[1].text


async def test_without_an_agent_nothing_is_opened(tmp_path: Path) -> None:
    view: Any = await live_status.ask(tmp_path / "control.sock")
    assert (view["error"]["code"], view["error"]["exit_code"]) == ("not-running", 4)


class _Recorded:
    def __init__(self) -> None:
        self.seen: list[object] = []

    def begin(self) -> None:
        self.seen.append("begin")

    def show(self, view: dict[str, object]) -> None:
        self.seen.append(view["number"])

    def redraw(self) -> None:
        self.seen.append("redraw")

    def end(self) -> None:
        self.seen.append("end")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_loop_looks_each_second_and_ends_well(number: signal.Signals) -> None:
    clock, display = ManualClock(), _Recorded()
    looks = iter(range(100))

    async def look() -> dict[str, object]:
        return {"number": next(looks)}

    watching = asyncio.create_task(live_status.watch(look, display, clock))
    await clock.wait_for_sleepers()
    await clock.advance(2.5)
    os.kill(os.getpid(), signal.SIGWINCH)
    await _until(lambda: display.seen[-1] == "redraw")
    os.kill(os.getpid(), number)
    await asyncio.wait_for(watching, 30)
    assert display.seen == ["begin", 0, 1, 2, "redraw", "end"]


async def test_an_error_gives_the_terminal_back() -> None:
    display = _Recorded()

    async def look() -> dict[str, object]:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        await live_status.watch(look, display, ManualClock())
    assert display.seen == ["begin", "end"]


# --- the command ---


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[tuple[list[str], dict[str, str]]]:
    """`key-agent run` with a KEK in SoftHSM2, and how to give it commands."""
    from tests import pki

    hsm = await asyncio.to_thread(SoftHsm.create, tmp_path / "hsm")
    tenant = pki.make_tenant("acme")
    pki.write_certificate(tenant.root.certificate, tmp_path / "root.pem")
    pki.write_credential(tenant.agent_signing("hq"), tmp_path, "signing")
    pki.write_credential(tenant.agent_tls("hq"), tmp_path, "tls")
    (tmp_path / "state").mkdir(mode=0o700)
    config = tmp_path / "key-agent.toml"
    config.write_text(f"""
        [agent]
        id = "hq"
        tenant = "acme"
        environment_id = "main"
        state_dir = "{tmp_path / "state"}"
        root_certificate_file = "root.pem"
        [signing]
        certificate_file = "signing.pem"
        key_file = "signing.key"
        [tls]
        certificate_file = "tls.pem"
        key_file = "tls.key"
        [pkcs11]
        module_path = "{hsm.module}"
        token_label = "{hsm.label}"
        pin_file = "{hsm.pin_file}"
        [admin]
        port = 0
    """)
    command = [sys.executable, "-m", "key_agent.cli", "--config", str(config)]
    environment = os.environ | hsm.environment | {"PYTHONPATH": str(Path(__file__).parents[3])}
    made = await asyncio.create_subprocess_exec(*command, "kek", "create", env=environment)
    assert await made.wait() == 0
    running = await asyncio.create_subprocess_exec(*command, "run", env=environment)
    await _until((tmp_path / "state" / "control.sock").exists)
    yield command, environment
    running.terminate()
    assert await asyncio.wait_for(running.wait(), 30) == 0


async def _until(condition: Callable[[], object], *, timeout_s: float = 30) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.01)


async def test_in_a_terminal(agent: tuple[list[str], dict[str, str]]) -> None:
    command, environment = agent
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    shown = b""

    def screen(wanted: bytes, *, after: int = 0) -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError, OSError):
            while piece := os.read(ours, 65536):
                shown += piece
        return wanted in shown[after:]

    def resize(rows: int, columns: int) -> None:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    resize(30, 140)
    process = subprocess.Popen(  # noqa: ASYNC220 - with a terminal of its own, which asyncio has no word for
        [*command, "status", "--watch"],
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - single-threaded child
    )
    os.close(theirs)
    try:
        await _until(lambda: screen(b"agent hq of acme, environment main: leads, term"))
        assert shown.startswith(b"\x1b[?1049h\x1b[?25l")
        await _until(lambda: screen(b"consent: consented for"))
        seen = len(shown)
        await _until(lambda: screen(b"\x1b[H", after=seen))  # redrawn
        resize(10, 24)
        seen = len(shown)
        await _until(lambda: screen("…".encode(), after=seen))
        narrow = shown[shown.rindex(b"\x1b[H") :].decode()
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", narrow)
        assert all(len(line) <= 24 for line in re.split(r"\r+\n", plain))
        os.write(ours, b"\x03")  # Ctrl-C
        assert await asyncio.to_thread(process.wait, 30) == 0
        screen(b"")
        assert shown.endswith(b"\x1b[?25h\x1b[?1049l")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours)


async def test_as_lines_of_json(agent: tuple[list[str], dict[str, str]]) -> None:
    command, environment = agent
    process = await asyncio.create_subprocess_exec(
        *command, "--json", "status", "--watch", env=environment, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        first, second = [json.loads(await process.stdout.readline()) for _ in range(2)]
    assert first["standing"] == second["standing"] == "consented"
    assert second["time_ms"] > first["time_ms"]
    process.send_signal(signal.SIGINT)
    assert await asyncio.wait_for(process.wait(), 30) == 0
    # Into a file there is no table.
    refused = await asyncio.create_subprocess_exec(
        *command, "status", "--watch", env=environment, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, error = await output_of(refused)
    assert refused.returncode == 2
    assert b"--json" in error

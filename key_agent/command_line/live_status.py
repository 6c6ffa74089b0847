"""`key-agent status --watch`: what the agent says, once a second, as a table or as lines of JSON.

1. It asks the agent that runs and does nothing itself: no login to the HSM, no lock. Where none runs, or one
   does not answer, it says so and goes on asking.
2. What needs eyes stands first; what does not fit is counted.
3. Texts of others (what a proxy answered) cannot move the cursor: what is not printable is replaced.
4. The terminal is given back as it was, whatever ends the loop. Ctrl-C is how one leaves: exit code 0.
"""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Final, Protocol, TextIO, cast

from key_agent.api import client
from key_agent.operations.commands import Json
from runtime.cli import CommandError, ExitCode
from runtime.clock import Clock

EVERY_S: Final = 1.0
ANSWER_S: Final = 5.0
SOON_S: Final = 60.0
"""Keys that end within it and were not renewed: more than a tenth of the interval is missing."""

_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME, _END_LINE, _END_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


class Mark(Enum):
    """How a line is drawn: SGR parameters."""

    PLAIN = ""
    HEAD = "1"
    WARNING = "33"
    BAD = "31;1"


@dataclass(frozen=True, slots=True)
class Line:
    text: str
    mark: Mark = Mark.PLAIN


class Display(Protocol):
    def begin(self) -> None: ...
    def show(self, view: Json) -> None: ...
    def redraw(self) -> None: ...
    def end(self) -> None: ...


# --- asking ---


async def ask(socket: Path) -> Json:
    """The agent's status; or `{"error": {...}}`, as a command would end with."""
    error: CommandError
    try:
        async with asyncio.timeout(ANSWER_S):
            answer = await client.call(socket, "status", {})
        if answer is not None:
            return answer
        error = CommandError(
            f"no agent runs here ({socket})",
            "`key-agent run`, or run this as the agent's user",
            ExitCode.UNAVAILABLE,
            code="not-running",
        )
    except TimeoutError:
        error = CommandError(
            f"the agent did not answer within {ANSWER_S:g} s",
            "see its log",
            ExitCode.UNAVAILABLE,
            code="no-answer",
        )
    except CommandError as refusal:
        error = refusal
    return error.as_json()


async def watch(look: Callable[[], Awaitable[Json]], display: Display, clock: Clock) -> None:
    """Show what *look* finds until SIGINT or SIGTERM."""
    loop, task = asyncio.get_running_loop(), cast("asyncio.Task[None]", asyncio.current_task())
    handlers: dict[signal.Signals, Callable[[], object]] = {
        signal.SIGINT: task.cancel,
        signal.SIGTERM: task.cancel,
        signal.SIGWINCH: display.redraw,
    }
    for number, act in handlers.items():
        loop.add_signal_handler(number, act)
    display.begin()
    try:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                display.show(await look())
                await clock.sleep(EVERY_S)
        task.uncancel()
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)
        display.end()


# --- showing ---


class JsonLines:
    """One document per line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def begin(self) -> None:
        """Nothing stands before the first line."""

    def show(self, view: Json) -> None:
        self._out.write(json.dumps(view, ensure_ascii=False) + "\n")
        self._out.flush()

    def redraw(self) -> None:
        """Lines have no width."""

    def end(self) -> None:
        """Nothing stands after the last line."""


class Screen:
    """The terminal behind *out*. *notes*: what of a status is told in a sentence, by the CLI's words."""

    def __init__(self, out: TextIO, *, notes: Callable[[Json], list[str]], is_coloured: bool) -> None:
        self._out = out
        self._notes = notes
        self._is_coloured = is_coloured
        self._view: Json | None = None

    def begin(self) -> None:
        self._write(_ENTER)

    def show(self, view: Json) -> None:
        self._view = view
        self.redraw()

    def redraw(self) -> None:
        if self._view is None:
            return
        size = os.get_terminal_size(self._out.fileno())
        lines = table(self._view, self._notes, width=max(size.columns, 20), height=max(size.lines, 4))
        # From top to bottom over what stood there: no flicker, and nothing left of a wider screen.
        drawn = (_END_LINE + "\r\n").join(self._drawn(line) for line in lines)
        self._write(_HOME + drawn + _END_LINE + _END_SCREEN)

    def end(self) -> None:
        self._write(_LEAVE)

    def _drawn(self, line: Line) -> str:
        if line.mark is Mark.PLAIN or not self._is_coloured:
            return line.text
        return f"\x1b[{line.mark.value}m{line.text}\x1b[0m"

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def table(view: Any, notes: Callable[[Any], list[str]], *, width: int, height: int) -> list[Line]:
    """At most *height* lines of at most *width* columns."""
    if "error" in view:
        error = view["error"]
        lines = [Line(f"key-agent: {error['cause']}", Mark.BAD), Line(f"  next: {error['next_step']}")]
    else:
        lines = [*_head(view), *(Line(note, Mark.WARNING) for note in notes(view)), Line("")]
        places = sorted(_places(view), key=lambda row: (_RANK[row.mark], row.cells))
        proxies = sorted(_proxies(view), key=lambda row: (_RANK[row.mark], row.cells))
        # Services get what proxies leave, and proxies at least a third: there are fewer of them.
        room = max(height - len(lines) - 1, 2)
        below = min(len(proxies) + 1, max(room // 3, room - len(places) - 1))
        lines += _rows(("SERVICE", "PROXY", "STATE", "LEFT", "ACKNOWLEDGED", ""), places, room - below)
        lines += [Line(""), *_rows(("PROXY", "LAST PUSH", "AT", "FAILED", "ANSWERS", ""), proxies, below)]
    return [Line(_fitting(line.text, width), line.mark) for line in lines[:height]]


_RANK: Final = {Mark.BAD: 0, Mark.WARNING: 1, Mark.PLAIN: 2, Mark.HEAD: 3}


@dataclass(frozen=True, slots=True)
class _Row:
    cells: tuple[str, ...]
    mark: Mark


def _head(view: Any) -> Iterator[Line]:
    leads = f"leads, term {view['term']}" if view["leads"] else "does NOT lead"
    yield Line(
        f"agent {view['agent']} of {view['tenant']}, environment {view['environment']}: {leads}"
        f"  {_clock(view['time_ms'])}Z",
        Mark.HEAD if view["leads"] else Mark.BAD,
    )
    found, kek = view["diagnosis"], view["kek"]
    verdict = f", KEK {found['verdict']} ({found['detail']})" if found else ""
    consents = view["standing"] == "consented" and (found is None or found["verdict"] == "ok")
    yield Line(
        f"consent: {view['standing']} for {_span((view['time_ms'] - view['since_ms']) / 1000)}{verdict}",
        Mark.PLAIN if consents else Mark.BAD,
    )
    if kek is None:
        yield Line("KEK: none", Mark.BAD)
    elif kek["state"] != "active":
        yield Line(f"KEK {kek['id']}: {kek['state']} ({kek['reason']})", Mark.BAD)
    for problem in view["problems"]:
        yield Line(f"problem: {problem}", Mark.BAD)


def _places(view: Any) -> Iterator[_Row]:
    for service in view["services"]:
        for place in service["proxies"]:
            left_s, state = place["valid_for_s"], place["state"]
            mark = Mark.PLAIN
            if state not in {"valid", "withdrawn"}:
                mark = Mark.BAD
            elif place["error"] or (left_s is not None and left_s < SOON_S):
                mark = Mark.WARNING
            until_ms = place["may_hold_keys_until_ms"]
            if state == "withdrawing" and until_ms is not None:
                left_s = (until_ms - view["time_ms"]) / 1000
            yield _Row(
                (
                    service["service"],
                    place["proxy"],
                    state,
                    "-" if left_s is None else _span(left_s),
                    _clock(place["acknowledged_at_ms"]),
                    place["error"] or "",
                ),
                mark,
            )


def _proxies(view: Any) -> Iterator[_Row]:
    for proxy in view["proxies"]:
        is_silent, failed = proxy["answers"] is False, proxy["failures_in_a_row"]
        mark = Mark.BAD if failed else Mark.WARNING if is_silent else Mark.PLAIN
        answers = {True: "yes", False: "no", None: "-"}[proxy["answers"]]
        yield _Row(
            (
                proxy["proxy"],
                proxy["outcome"] or "-",
                _clock(proxy["last_push_at_ms"]),
                str(failed),
                answers,
                proxy["error"] or proxy["answers_error"] or "",
            ),
            mark,
        )


def _rows(titles: tuple[str, ...], rows: list[_Row], room: int) -> Iterator[Line]:
    """The first of *rows* under *titles* in *room* lines; the last one says how many there are more."""
    left_out = len(rows) - (room - 1)
    shown = rows if left_out <= 0 else rows[: max(room - 2, 0)]
    widths = [max(map(len, column)) for column in zip(titles, *(row.cells for row in shown), strict=True)]
    yield Line(_aligned(titles, widths), Mark.HEAD)
    for row in shown:
        yield Line(_aligned(row.cells, widths), row.mark)
    if left_out > 0:
        rest = rows[len(shown) :]
        bad = sum(row.mark is not Mark.PLAIN for row in rest)
        yield Line(f"... and {len(rest)} more, {bad} of them not well", Mark.WARNING if bad else Mark.PLAIN)


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _fitting(text: str, width: int) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _span(seconds: float) -> str:
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours:02}h"
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"


def _clock(at_ms: int | None) -> str:
    return "-" if at_ms is None else datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%H:%M:%S")

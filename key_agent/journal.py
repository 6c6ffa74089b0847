"""The audit log, written beside the event loop: a disk that hangs stops nothing but what must be audited
first.

1. `record` returns when the event is on disk, and raises if it cannot be: then the operation is refused.
2. `note` is for what has happened already, or must happen whatever the disk does (a withdrawal): it never
   raises.
3. One thread, first come, first written: the order in the log is the order of the calls.
4. What waits while the disk syncs is written together and shares the next sync; if that fails, none of it
   counts as written.
5. An event is written however long the words of others are that it quotes: they are cut, it is not lost.
"""

import asyncio
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import structlog

from runtime.audit import AuditLog, AuditUnavailableError

log = structlog.get_logger(__name__)

type Value = str | int | None
type _Event = tuple[str, str, dict[str, Value], "Future[None]"]
_CLOSE_PATIENCE_S: Final = 5.0
_MOST_CHARACTERS: Final = 4000
"""Of all fields together; one character can take 12 bytes of a line, which holds 64 KiB."""
_CUT_CHARACTERS: Final = 250


class Journal:
    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="audit")
        self._waiting: deque[_Event] = deque()
        self._is_called = False
        """The thread has been told of what waits, and has not looked yet: a thousand events are one call."""
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        """Why the last event could not be written; None if it could."""
        return self._failure

    async def record(self, action: str, *, outcome: str = "ok", **fields: Value) -> None:
        """Write one event, durably. AuditUnavailableError if that fails."""
        await asyncio.wrap_future(self._submit(action, outcome, fields))

    def note(self, action: str, *, outcome: str = "ok", **fields: Value) -> None:
        """Have one event written; if that fails, the log and `failure` say so."""
        self._submit(action, outcome, fields).add_done_callback(_report)

    async def close(self) -> None:
        """Write what was noted, then let the file go. A disk that hangs is not waited for long."""
        self._writer.shutdown(wait=False)
        last = asyncio.get_running_loop().run_in_executor(None, self._writer.shutdown)
        try:
            async with asyncio.timeout(_CLOSE_PATIENCE_S):
                await asyncio.shield(last)
        except TimeoutError:
            log.error("the audit log does not answer")  # noqa: TRY400 - nothing to trace
        else:
            self._audit.close()

    def _submit(self, action: str, outcome: str, fields: dict[str, Value]) -> "Future[None]":
        written: Future[None] = Future()
        self._waiting.append((action, outcome, _fitting(fields), written))
        if not self._is_called:
            self._is_called = True
            try:
                self._writer.submit(self._write_waiting)
            except RuntimeError:  # closed: this one says so, and so does the next
                self._is_called = False
                raise
        return written

    def _write_waiting(self) -> None:
        self._is_called = False  # first: what is put there from now on may not be seen by this call
        events = [self._waiting.popleft() for _ in range(len(self._waiting))]
        # Whoever gave up before the first byte was written gets no event.
        events = [event for event in events if event[3].set_running_or_notify_cancel()]
        unsynced: list[Future[None]] = []
        for number, (action, outcome, fields, written) in enumerate(events, start=1):
            is_last = number == len(events)
            try:
                self._audit.append(action, outcome=outcome, durable=is_last, **fields)
            except Exception as error:  # noqa: BLE001 - handed on to whoever asked
                self._failure = str(error) if isinstance(error, AuditUnavailableError) else repr(error)
                for one in [written, *(unsynced if is_last else ())]:
                    one.set_exception(error)
            else:
                unsynced.append(written)
                if is_last:
                    self._failure = None
                    for one in unsynced:
                        one.set_result(None)


def _fitting(fields: dict[str, Value]) -> dict[str, Value]:
    """Rule 5."""
    if sum(len(value) for value in fields.values() if isinstance(value, str)) <= _MOST_CHARACTERS:
        return fields
    return {name: _cut(value) if isinstance(value, str) else value for name, value in fields.items()}


def _cut(text: str) -> str:
    left = len(text) - _CUT_CHARACTERS
    return text if left <= 0 else f"{text[:_CUT_CHARACTERS]}... and {left} characters more"


def _report(written: "Future[None]") -> None:
    if (error := written.exception()) is not None:
        log.error("an audit event is lost", error=str(error))

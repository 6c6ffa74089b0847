"""A document that streams to a client, entry by entry: what is the same for XML and for JSON.

1. A rewriter (xml_rewriting.py, json_rewriting.py) finds the entries; a profile's judge edits each. What it
   has to find out first is a question; the answer waits for it, and a few are asked at the same time.
2. A document that cannot be rewritten, and whatever a judge or a question raises, refuses the answer; what
   has left by then stays without an end.
3. A piece is gone through slice by slice, and others have their turn in between: a quarter of a mebibyte of
   the smallest entries is a second's work.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from typing import Final, Protocol

from proxy import refusals
from proxy.refusals import Refusal, RefusedError

_WAITING: Final = 8
"""Entries of one answer that are looked into at the same time."""
_SLICE_BYTES: Final = 4096

type Question = Callable[[], Awaitable[None]]
"""What has to be found out before an entry can go on; it makes the edits itself."""


class Rendered(Protocol):
    """An entry, held whole."""

    def render(self) -> bytes:
        """As it goes on, edits applied."""


class Rewriter[Entry](Protocol):
    """Finds entries in what comes, in any pieces."""

    def feed(self, piece: bytes) -> list[bytes | Entry]: ...

    def finish(self) -> list[bytes | Entry]: ...


class EntryMapper[Entry: Rendered]:
    """A `plan.BodyMapper`. *kind* is the entries' class, *error* the rewriter's: it becomes *refusal*."""

    def __init__(
        self,
        rewriter: Rewriter[Entry],
        kind: type[Entry],
        judge: Callable[[Entry], Question | None],
        *,
        error: type[Exception],
        refusal: Refusal = refusals.SERVICE_ANSWER,
    ) -> None:
        self._rewriter = rewriter
        self._kind = kind
        self._judge = judge
        self._error = error
        self._refusal = refusal
        self._queue: list[bytes | Entry] = []
        self._questions: list[Question] = []
        self._waits = memoryview(b"")
        """Of the last piece: what was not looked at yet."""
        self._made = bytearray()

    @property
    def pending(self) -> bool:
        return bool(self._questions or self._waits)

    def feed(self, piece: bytes) -> bytes:
        if self.pending:
            raise RefusedError(refusals.INTERNAL)
        self._waits = memoryview(piece)
        self._go_on()
        return self._take()

    def finish(self) -> bytes:
        """No entry is found complete here: its end was there when it came."""
        if self.pending:
            raise RefusedError(refusals.INTERNAL)
        self._through(self._rewriter.finish)
        if self._questions:
            raise RefusedError(refusals.INTERNAL)
        return self._take()

    def _go_on(self) -> None:
        """One slice further."""
        piece, self._waits = bytes(self._waits[:_SLICE_BYTES]), self._waits[_SLICE_BYTES:]
        self._through(lambda: self._rewriter.feed(piece))

    def _through(self, step: Callable[[], list[bytes | Entry]]) -> None:
        try:
            for part in step():
                if isinstance(part, self._kind) and (question := self._judge(part)) is not None:
                    self._questions.append(question)
                self._queue.append(part)
            if not self._questions:
                self._render()
        except self._error as error:
            raise RefusedError(self._refusal) from error

    def _render(self) -> None:
        queue, self._queue = self._queue, []
        for part in queue:
            self._made += part if isinstance(part, bytes) else part.render()

    def _take(self) -> bytes:
        """What is rendered, unless something is to be waited for."""
        if self.pending:
            return b""
        made, self._made = self._made, bytearray()
        return bytes(made)

    async def settle(self) -> None:
        await self._answered()
        while self._waits:
            await asyncio.sleep(0)
            self._go_on()
            await self._answered()

    async def _answered(self) -> None:
        """What the entries wait for is known, and they are rendered."""
        if not self._questions:
            return
        questions, self._questions = iter(self._questions), []
        try:
            while batch := list(islice(questions, _WAITING)):
                async with asyncio.TaskGroup() as group:
                    for question in batch:
                        group.create_task(_asked(question), name="entry")
        except* self._error as errors:
            raise RefusedError(self._refusal) from errors
        except* RefusedError as errors:
            raise next(_leaves(errors)) from None
        self._render()


async def _asked(question: Question) -> None:
    await question()


def _leaves(group: BaseExceptionGroup[RefusedError]) -> Iterator[RefusedError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error

"""Large bodies: sealed and opened while they pass, as objects of the format SGT-1 (docs/format.md 2).

1. Constant memory: a piece in, a piece out; who does not read is not read from.
2. Not a byte leaves before its record has verified, and the answer's head waits for the first one: what is no
   object of this key's is an error, not a cut answer.
3. Key, credential and validity are asked at every piece, and all of it again before the last one: without it
   no object is whole. A body that ends before its end, or a key that ends meanwhile, cuts the answer.
4. The record is written before the first byte leaves; a cut leaves a second one that says why.
5. More pays more: every MiB takes quota, and waits for it rather than fail.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import ExitStack
from typing import Final, Self

from envelope.errors import FormatError, IntegrityError, SealgateError
from envelope.objects import Bind, Header, Opener, Sealer
from proxy.encryption_service.access import Caller
from proxy.encryption_service.core import Core, Ticket
from proxy.encryption_service.dialects.bearer import BYTES_PER_UNIT, BearerCalls, Work
from proxy.encryption_service.errors import DoesNotVerify, QuotaExceeded, ServiceError
from proxy.keys.data_key import DataKey

QUOTA_STEP_BYTES: Final = 1 << 20


class Stream:
    """One body under way: both directions share what must hold while it runs."""

    def __init__(
        self,
        calls: BearerCalls,
        work: Work,
        ticket: Ticket,
        caller: Caller,
        body: AsyncIterator[bytes],
        *,
        name: bytes = b"",
    ) -> None:
        """*name*: what the object is bound to; empty: nothing."""
        self._calls = calls
        self._core: Core = calls.core
        self._work = work
        self._ticket = ticket
        self._caller = caller
        self._body = body
        self._bind = Bind.CALLER if name else Bind.NOTHING
        self._name = name
        self._owed_bytes = 0
        self._busy_s = 0.0

    def seal(self) -> AsyncIterator[bytes]:
        """The sealed object's pieces. Raises as `Core.object_key` before the first one."""
        key = self._use(self._core.object_key(self._ticket))
        sealer = Sealer(key.object_key, key.owner, key.key_id, bind=self._bind, name=self._name)
        self._record()
        return self._passing(sealer.update, sealer.finalize, None)

    async def open(self) -> AsyncIterator[bytes]:
        """The plaintext's pieces, as soon as the first has verified. DoesNotVerify; as `Core.object_key`."""
        opener = Opener(self._ticket.key.owner, self._find, bind=self._bind, name=self._name)
        first = b""
        try:
            async for piece in self._body:
                await self._pay(len(piece))
                first = self._step(opener.update, piece)
                if first:
                    break
            else:
                first = self._step(lambda _none: opener.finalize(), b"")
                self._record()
                return _only(first)
        except (FormatError, IntegrityError):
            raise DoesNotVerify from None
        self._record()
        return self._passing(opener.update, opener.finalize, first)

    def _find(self, header: Header) -> memoryview:
        return self._use(self._core.object_key(self._ticket, header.key_id)).object_key

    def _use(self, key: DataKey) -> DataKey:
        self._work.used(key.version, key.key_id)
        return key

    def _record(self) -> None:
        self._work.busy_s = self._busy_s
        self._calls.finish(self._work, self._ticket)

    async def _passing(
        self,
        update: Callable[[bytes], bytes | bytearray],
        finalize: Callable[[], bytes],
        first: bytes | None,
    ) -> AsyncIterator[bytes]:
        try:
            if first:
                yield first
            async for piece in self._body:
                await self._pay(len(piece))
                yield self._step(update, piece)
            last = self._step(lambda _none: finalize(), b"")
            self._core.confirm(self._ticket)
            yield last
        except GeneratorExit:
            self._record_cut("client-gone")
            raise
        except BaseException as error:
            self._record_cut(_why(error))
            raise

    def _step(self, work: Callable[[bytes], bytes | bytearray], piece: bytes) -> bytes:
        started_s = self._calls.clock.boot_s()
        self._core.confirm(self._ticket)
        out = bytes(work(piece))
        self._busy_s += self._calls.clock.boot_s() - started_s
        return out

    async def _pay(self, size_bytes: int) -> None:
        self._owed_bytes += size_bytes
        while self._owed_bytes >= QUOTA_STEP_BYTES:
            try:
                self._calls.admit_more(self._caller, QUOTA_STEP_BYTES // BYTES_PER_UNIT)
            except QuotaExceeded as error:
                await self._calls.clock.sleep(min(error.retry_after_s, 1.0))
                self._core.confirm(self._ticket)
            else:
                self._owed_bytes -= QUOTA_STEP_BYTES

    def _record_cut(self, why: str) -> None:
        cut = Work(self._work.started_s)
        cut.operation, cut.caller, cut.key = f"{self._work.operation}-cut", self._caller, self._work.key
        cut.version, cut.key_id, cut.resource = self._work.version, self._work.key_id, self._work.resource
        cut.busy_s = self._busy_s
        self._calls.record_refusal(cut, why)


class Pieces:
    """The pieces of an answer, and the place its call holds until they are out, or will not be asked for."""

    def __init__(self, pieces: AsyncIterator[bytes], held: ExitStack) -> None:
        self._pieces = pieces
        self._held = held

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._pieces)
        except BaseException:
            self._held.close()
            raise

    async def aclose(self) -> None:
        self._held.close()
        if isinstance(self._pieces, AsyncGenerator):
            await self._pieces.aclose()


async def _only(last: bytes) -> AsyncIterator[bytes]:
    yield last


def _why(error: BaseException) -> str:
    match error:
        case ServiceError():
            return error.code
        case FormatError() | IntegrityError():
            return "does-not-verify"
        case SealgateError():
            return "refused"
    return "body-cut"

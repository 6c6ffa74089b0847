"""A profile that uses every extension point there is, one by path, for tests of what carries them out.

It signs all that leaves: `X-Signature` over method, target and what is in `X-Signed`.
"""

import hashlib
import hmac
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import ClassVar, Final, override

from envelope.multipart import Manifest, Part, upload_ref
from envelope.objects import Sealer, sealed_length
from proxy import refusals
from proxy.asking import Outgoing
from proxy.messages.message import AnswerHead, Fields, RequestHead, byte_range
from proxy.plans.answer_plan import AnswerPlan, MapBody, MapWhole, Pass
from proxy.plans.conversing import Conversation, PartOf, Reply, Sealed, Sealing
from proxy.plans.plan import (
    Answer,
    Converse,
    Decision,
    EmptyBody,
    Forward,
    Going,
    HeadSize,
    NewSealer,
    Open,
    OpenRange,
    PassBody,
    Proceed,
    RequestPlan,
    Reshape,
    Seal,
)
from proxy.plans.request import Edits, Request
from proxy.profiles.profile import Limitation, Profile
from proxy.refusals import Refusal, RefusedError, Shaped

SECRET: Final = b"the client's"
FRAME: Final = b"|"


def signature(method: str, target: str) -> str:
    return hmac.new(SECRET, f"{method} {target}".encode(), "sha256").hexdigest()


def sign(leaving: Outgoing) -> Outgoing:
    kept = [field for field in leaving.fields if field[0].lower() != b"x-signature"]
    made = signature(leaving.method, leaving.target).encode()
    return replace(leaving, fields=(*kept, (b"X-Signature", made)))


class Unframing:
    """Undoes `framed`: plaintext, then FRAME and its SHA-256."""

    def __init__(self) -> None:
        self._held = b""
        self._digest = hashlib.sha256()

    def feed(self, piece: bytes) -> bytes:
        data = self._held + piece
        ready, self._held = data[:-65], data[-65:]
        self._digest.update(ready)
        return ready

    def finish(self) -> bytes:
        rest, _, digits = self._held.rpartition(FRAME)
        self._digest.update(rest)
        if digits.decode() != self._digest.hexdigest():
            raise RefusedError(refusals.BAD_DIGEST)
        return rest


def framed(content: bytes) -> bytes:
    return content + FRAME + hashlib.sha256(content).hexdigest().encode()


class Wrapping:
    """Keeps the first line as it is, seals what follows; its length is known once the line is."""

    def __init__(self, new_sealer: NewSealer, in_bytes: int | None) -> None:
        self.out_bytes: int | None = None
        self._sealer: Sealer = new_sealer()
        self._in_bytes = in_bytes
        self._line: bytes | None = b""

    def feed(self, piece: bytes) -> bytes:
        if self._line is None:
            return bytes(self._sealer.update(piece))
        self._line += piece
        head, end, rest = self._line.partition(b"\n")
        if not end:
            return b""
        self._line = None
        if self._in_bytes is not None:
            self.out_bytes = len(head) + 1 + sealed_length(self._in_bytes - len(head) - 1)
        return head + end + bytes(self._sealer.update(rest))

    def finish(self) -> bytes:
        if self._line is not None:
            raise RefusedError(refusals.BAD_MESSAGE)
        return bytes(self._sealer.finalize())


class Looking:
    """Puts the plaintext length behind each path that stands alone on its line."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self._line = b""
        self._waiting: list[bytes] = []
        self._made = b""
        self.pending = False

    def feed(self, piece: bytes) -> bytes:
        *lines, self._line = (self._line + piece).split(b"\n")
        self._waiting += lines
        self.pending = bool(self._waiting)
        made, self._made = self._made, b""
        return made

    async def settle(self) -> None:
        for line in self._waiting:
            path, etag, stored = line.decode().split()
            size = await self._talk.composite_bytes(path, etag=etag, stored_bytes=int(stored))
            self._made += f"{path} {size}\n".encode()
        self._waiting = []
        self.pending = False

    def finish(self) -> bytes:
        return self._made + self._line


class ProbingProfile(Profile):
    name: ClassVar[str] = "probing"
    summary: ClassVar[str] = "every extension point"
    encrypts: ClassVar[str] = "all"
    sizes: ClassVar[str] = "all"
    validators: ClassVar[str] = "all"
    digests: ClassVar[str] = "all"
    operations: ClassVar[tuple[tuple[str, str], ...]] = (("all", "probed"),)
    limitations: ClassVar[tuple[Limitation, ...]] = ()
    makes_composites: ClassVar[bool] = True

    @override
    def plan(self, request: Request) -> RequestPlan:
        head, edits = request.head, request.edits
        size = request.frame.length_bytes
        match (head.method, head.target.partition("?")[0].split("/")[1]):
            case ("PUT", "framed"):
                plain_bytes = None if size is None else size - 65
                edits = _sized(edits, plain_bytes)
                return Seal(
                    edits=edits, plain_bytes=plain_bytes, empty=EmptyBody.SEAL, decoder=Unframing, sign=sign
                )
            case ("PUT", "part"):
                upload, number = head.target.split("/")[2:4]
                return Seal(
                    edits=_sized(edits, size),
                    plain_bytes=size,
                    empty=EmptyBody.SEAL,
                    part=PartOf(upload_ref=upload_ref(upload), number=int(number)),
                    record_digests=("md5",),
                    after=after,
                    sign=sign,
                )
            case ("PUT", "spooled"):
                sealing = Seal(edits=edits, plain_bytes=size, empty=EmptyBody.SEAL, sign=sign)
                return Converse(
                    edits=edits, handler=send_spooled, limit_bytes=1 << 30, spool=sealing, sign=sign
                )
            case ("PUT", "wrapped"):
                return Reshape(edits=edits, make=lambda new: Wrapping(new, size), sign=sign)
            case ("PUT", "control"):
                return PassBody(edits=edits, limit_bytes=100, sign=sign)
            case ("POST", "complete"):
                return Converse(edits=edits, handler=complete, limit_bytes=1000, sign=sign)
            case ("POST", "copy"):
                return Converse(edits=edits, handler=copy, sign=sign)
            case ("POST", "raise"):
                return Converse(edits=edits, handler=fails, sign=sign)
            case ("OPTIONS", "local"):
                return Answer(reply=Reply(status=200, fields=(("X-Local", "yes"),), body=b"from here"))
            case ("GET", "list"):
                return Forward(edits=edits, memo=MapBody(make=Looking), sign=sign)
            case ("GET", "small"):
                return Forward(edits=edits, memo=MapWhole(limit_bytes=100, function=upper), sign=sign)
            case ("GET", _) if (wanted := byte_range(head.fields)) is not None:
                edits = edits.also(drop=("range", "if-range"))
                return OpenRange(
                    edits=edits, wanted=wanted, if_range=head.fields.first("if-range"), sign=sign
                )
            case ("GET", _):
                return Open(edits=edits.also(drop=("range",)), sign=sign)
            case ("HEAD", "list"):
                return Forward(edits=edits, memo=MapBody(make=Looking), sign=sign)
            case ("HEAD", _):
                return HeadSize(edits=edits, sign=sign)
            case _:
                raise RefusedError(refusals.UNKNOWN_ROUTE)

    @override
    def plan_answer(
        self, request: Request, plan: Going, answer: AnswerHead, proposed: AnswerPlan
    ) -> AnswerPlan:
        if isinstance(proposed, Pass) and isinstance(plan.memo, MapBody | MapWhole):
            return replace(proposed, body=plan.memo)
        return proposed

    @override
    def shape(self, refusal: Refusal, head: RequestHead) -> Shaped:
        body = f"{head.method} {refusal.code}".encode()
        return Shaped(content_type="text/probe", body=body, fields=(("x-probe-error", refusal.code),))


def _sized(edits: Edits, plain_bytes: int | None) -> Edits:
    if plain_bytes is None:
        return edits
    return edits.also(put=(("content-length", str(sealed_length(plain_bytes))),))


async def after(_talk: Conversation, answer: AnswerHead, sealed: Sealed) -> Edits:
    if answer.fields.first("x-fail") is not None:
        raise RefusedError(refusals.SERVICE_ANSWER)
    told = f"{sealed.stored_bytes} {sealed.commitment.hex()} {sealed.digests['md5'].hex()}"
    return Edits(put=(("x-sealed", told),))


async def complete(talk: Conversation) -> Decision:
    """Body: upload id, target, then `path number stored commitment` of each part, a line each."""
    first, *lines = talk.body.decode().splitlines()
    upload, target = first.split()
    listed = [line.split() for line in lines]
    parts = tuple(Part(int(number), int(size), bytes.fromhex(mark)) for _, number, size, mark in listed)
    ending = await talk.ending(Manifest(upload_ref(upload), parts))
    async with talk.ask("PUT", f"/ending/{upload}", body=ending) as answer:
        await answer.read(100)
        if answer.status != 201:
            raise RefusedError(refusals.SERVICE_ANSWER)
    paths = [path for path, *_ in listed] + [f"/ending/{upload}"]
    plan = Forward(edits=talk.request.edits, target=f"/join?{target}", sign=sign)
    return Proceed(plan=plan, body="\n".join(paths).encode())


async def copy(talk: Conversation) -> Decision:
    """`/copy/to` with X-Source and maybe X-Source-Range: opened and sealed again, as a part if X-Part."""
    fields: Fields = talk.request.head.fields
    ranged = fields.first("x-source-range")
    wanted = byte_range(Fields([(b"range", ranged.encode())])) if ranged is not None else None
    source, target = fields.first("x-source") or "/", talk.request.head.target.removeprefix("/copy")
    async with talk.opened(source, wanted=wanted) as opened:
        sealing = await talk.sealing(opened.pieces, opened.plain_bytes, target=target)
        async with talk.ask("PUT", target, body=_pieces(sealing), body_bytes=sealing.stored_bytes) as answer:
            await answer.read(1000)
            told = f"{opened.plain_bytes}/{opened.object_bytes} {sealing.sealed.commitment.hex()}"
            return Answer(reply=Reply(status=answer.status, body=told.encode()))


async def _pieces(sealing: Sealing) -> AsyncIterator[bytes]:
    async for piece in sealing:
        yield piece


async def send_spooled(talk: Conversation) -> Decision:
    held = talk.spooled
    assert held is not None
    assert held.sealed is not None
    assert held.read(56, 88) == held.sealed.commitment
    async with talk.ask("PUT", body=held.pieces(), body_bytes=held.stored_bytes) as answer:
        return Answer(reply=await talk.relay(answer))


async def fails(_talk: Conversation) -> Decision:
    raise RuntimeError("scripted failure")


async def upper(_talk: Conversation, answer: AnswerHead, body: bytes) -> Reply:
    return Reply(status=answer.status + 1, fields=(("x-mapped", "yes"),), body=body.upper())

"""GET and HEAD of one part (`partNumber`): of those that the client sent, whatever the service has.

1. The service's parts hold ciphertext, and one holds the manifest. What a part is to the client, the manifest
   says: a range of the plaintext. It is asked for as any other range.
2. Parts are counted from 1 in their order, as services do that number them anew when they are joined.
3. An object that was put at once is one part, and says nothing of parts.
"""

from dataclasses import dataclass, replace
from typing import Final

from proxy import refusals
from proxy.messages.message import ByteRange
from proxy.plans.answer_plan import AnswerPlan, OpenPart
from proxy.plans.conversing import Conversation, Inspected, Reply, StoredKind
from proxy.plans.plan import (
    Answer,
    Converse,
    Decision,
    Forward,
    HeadSize,
    Open,
    OpenRange,
    Proceed,
    RequestPlan,
)
from proxy.plans.request import Edits
from proxy.profiles.s3.addressing import without_parameters
from proxy.profiles.s3.call import Call, reply_of
from proxy.refusals import RefusedError

_PARAMETER: Final = "partNumber"
_RANGES: Final = ("if-range", "range")
_DATES: Final = ("if-modified-since", "if-unmodified-since")
_TAGS: Final = ("if-match", "if-none-match")
_COUNT: Final = "x-amz-mp-parts-count"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPart:
    """The memo of a read of [first, last] of *total_bytes*. `count`: of parts; None: it was put at once."""

    first: int
    last: int
    total_bytes: int
    count: int | None

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        return () if self.count is None else ((_COUNT, str(self.count)),)


def plan_read_part(call: Call) -> RequestPlan:
    """RefusedError for a number that is none, or beside a range."""
    text = call.parameters[_PARAMETER]
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 5 else 0
    if not 0 < number <= 10_000:
        raise RefusedError(refusals.PART_NOT_THERE)
    if "range" in call.fields:
        raise RefusedError(refusals.BAD_MESSAGE)
    edits = call.edits.also(drop=_RANGES)
    return Converse(
        edits=edits,
        target=without_number(call.request.head.target),
        sign=call.sign,
        handler=lambda talk: _read_part(talk, call, edits, number),
        limit_bytes=0,
    )


def without_number(target: str) -> str:
    """*target* without the parameter, every other byte as it was."""
    return without_parameters(target, lambda name: name == _PARAMETER)


async def _read_part(talk: Conversation, call: Call, edits: Edits, number: int) -> Decision:
    target = without_number(call.request.head.target)
    found = await talk.inspect(target)
    if found is not None and found.kind is StoredKind.OTHER:
        # It lies there as it was sent: the service knows its parts.
        return Proceed(plan=Forward(edits=edits, sign=call.sign))
    is_head = call.request.head.method == "HEAD"
    if found is None or (found.plain_bytes == 0 and number == 1):
        whole = HeadSize if is_head else Open
        return Proceed(plan=whole(edits=edits, target=target, sign=call.sign))
    memo = part_of(found, number)
    if is_head:
        return Answer(reply=await _head_of_part(talk, call, target, memo))
    wanted = ByteRange(first=memo.first, last=memo.last)
    return Proceed(
        plan=OpenRange(edits=edits, target=target, sign=call.sign, memo=memo, wanted=wanted, if_range=None)
    )


def part_of(found: Inspected, number: int) -> ReadPart:
    """What part *number* is of the plaintext. RefusedError(PART_NOT_THERE) if it has none."""
    if found.manifest is None:
        if number != 1:
            raise RefusedError(refusals.PART_NOT_THERE)
        return ReadPart(first=0, last=found.plain_bytes - 1, total_bytes=found.plain_bytes, count=None)
    sizes = [part.plain_bytes for part in found.manifest.parts]
    if number > len(sizes) or not sizes[number - 1]:
        raise RefusedError(refusals.PART_NOT_THERE)
    first = sum(sizes[: number - 1])
    return ReadPart(
        first=first,
        last=first + sizes[number - 1] - 1,
        total_bytes=sum(sizes),
        count=len(sizes),
    )


async def _head_of_part(talk: Conversation, call: Call, target: str, part: ReadPart) -> Reply:
    """206, as S3 has it: not what a HEAD of the whole is answered with."""
    conditions = [item for item in call.edits.put if item[0] in _TAGS]  # as the service knows them
    async with talk.ask("HEAD", target, fields=conditions, keep=_DATES) as answer:
        if answer.status != 200:
            return reply_of(answer)
        reply = reply_of(answer, status=206)
    own = [
        ("content-length", str(part.last - part.first + 1)),
        ("content-range", f"bytes {part.first}-{part.last}/{part.total_bytes}"),
        *part.fields,
    ]
    return replace(reply, fields=(*(item for item in reply.fields if item[0] != "content-range"), *own))


def plan_part_read(memo: ReadPart, proposed: AnswerPlan) -> AnswerPlan:
    """The answer says how many parts there are."""
    if isinstance(proposed, OpenPart):
        return replace(proposed, edits=proposed.edits.also(put=memo.fields))
    return proposed

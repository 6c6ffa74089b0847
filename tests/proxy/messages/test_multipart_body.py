"""What both readers of multipart bodies find, and refuse, however the bytes come."""

from collections.abc import Callable
from itertools import batched

import pytest

from envelope.objects import Sealer
from proxy import refusals
from proxy.messages.multipart_body import DelimitedBody
from proxy.messages.multipart_form import PASS, FormRewriter
from proxy.profiles.gcs.related import Related, RelatedBody
from proxy.refusals import Refusal, RefusedError
from tests.envelope.samples import KEY_ID, OBJECT_KEY, OWNER

HEADS = {
    "form": (b'Content-Disposition: form-data; name="a"', b'Content-Disposition: form-data; name="b"'),
    "related": (b"Content-Type: application/json", b"Content-Type: a/b"),
}
READERS: dict[str, Callable[[], DelimitedBody]] = {
    "form": lambda: FormRewriter(b"boundary", lambda _part: PASS),
    "related": lambda: RelatedBody(b"boundary", Related(), Sealer(OBJECT_KEY, OWNER, KEY_ID)),
}


def body(
    reader: str,
    *,
    before: bytes = b"",
    line_end: bytes = b"\r\n",
    behind: bytes = b"\r\n",
    head: bytes = b"",
    content: bytes = b"some -- content\r\n--boundarx",
) -> bytes:
    first, second = HEADS[reader]
    return (
        before + b"--boundary\r\n" + first + head + b"\r\n\r\n{}"
        + line_end + b"--boundary\r\n" + second + b"\r\n\r\n" + content
        + b"\r\n--boundary--" + behind
    )  # fmt: skip


def fed(reader: DelimitedBody, data: bytes, step: int) -> None:
    for piece in batched(data, step):
        reader.feed(bytes(piece))


def refused(reader: str, data: bytes) -> Refusal:
    """By each way in which it may come; and whoever has refused something takes nothing more."""
    found = set()
    for step in (1, 2, 7, 100_000):
        made = READERS[reader]()
        with pytest.raises(RefusedError) as caught:
            fed(made, data, step)
        found.add(caught.value.refusal)
        with pytest.raises(RefusedError):
            made.feed(b"")
    [refusal] = found
    return refusal


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("step", [1, 2, 3, 16, 100_000])
@pytest.mark.parametrize("before", [b"", b"\r\n"], ids=["at-once", "behind-a-line-end"])
@pytest.mark.parametrize("behind", [b"", b"\r\n"], ids=["no-line-end", "line-end"])
def test_what_is_one(reader: str, step: int, before: bytes, behind: bytes) -> None:
    fed(READERS[reader](), body(reader, before=before, behind=behind), step)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "change",
    [
        {"before": b"preamble\r\n"},
        {"before": b"\n"},
        {"before": b"\r\n\r\n"},
        {"line_end": b"\n"},
        {"line_end": b"\r"},
        {"line_end": b""},
        {"behind": b"\r\n\r\n"},
        {"behind": b"\n"},
        {"behind": b"\r\nepilogue"},
        {"content": b"a --boundary b"},
        {"content": b"a\n--boundary"},
    ],
    ids=lambda change: "-".join(f"{name}-{value!r}" for name, value in change.items()),
)
def test_what_readers_take_differently_is_refused(reader: str, change: dict[str, bytes]) -> None:
    assert refused(reader, body(reader, **change)) is refusals.BAD_MESSAGE


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["no-end", "end"])
def test_a_head_without_end_is_not_kept(reader: str, end: bytes) -> None:
    assert refused(reader, b"--boundary\r\n" + b"x: " + b"y" * 20_000 + end) is refusals.TOO_LARGE


@pytest.mark.parametrize("reader", READERS)
def test_a_content_is_never_held(reader: str) -> None:
    made = READERS[reader]()
    fed(made, body(reader).partition(b"some")[0], 100)
    for _ in range(200):
        made.feed(bytes(65_536))
        assert len(made._pending) < 100

"""Files that a page sends in chunks are noticed before one of them is stored."""

import pytest

from proxy.messages.message import Fields, RequestHead
from proxy.profiles.web.chunks import is_in_chunks, says_chunk


def head(target: str, *fields: tuple[bytes, bytes]) -> RequestHead:
    return RequestHead(method="POST", target=target, fields=Fields(fields))


@pytest.mark.parametrize(
    "target", ["/up?resumableChunkNumber=1&resumableTotalChunks=3", "/up?%66lowTotalChunks=2", "/u?chunks=02"]
)
def test_by_the_query(target: str) -> None:
    assert is_in_chunks(head(target))


def test_by_a_field() -> None:
    assert is_in_chunks(head("/up", (b"Content-Range", b"bytes 0-99/300")))


@pytest.mark.parametrize(
    "target", ["/up", "/up?chunks=1", "/up?resumableTotalChunks=", "/up?dztotalchunkcount=0"]
)
def test_a_file_in_one_piece_is_none(target: str) -> None:
    assert not is_in_chunks(head(target, (b"Content-Type", b"text/plain")))


@pytest.mark.parametrize("name", ["dzTotalChunkCount", "chunks", "qqtotalparts", "resumableTotalChunks"])
def test_by_a_part_of_the_form(name: str) -> None:
    assert says_chunk(name, "2")
    assert says_chunk(name, "many"), "what is no number is no single chunk either"
    assert not says_chunk(name, " 1\n")
    assert not says_chunk("total" + name, "2")

"""Documents that list blocks: what clients send, what services answer."""

import pytest

from proxy import refusals
from proxy.profiles.azure_blob import block_lists
from proxy.profiles.azure_blob.block_lists import (
    MAX_BLOCKS,
    Listed,
    Shown,
    Source,
    block_list_document,
    read_block_list,
    shown_block_list,
    stored_names,
)
from proxy.refusals import RefusedError

ANSWER = (
    b'<?xml version="1.0" encoding="utf-8"?>\n<BlockList><CommittedBlocks>'
    b"<Block><Name>QQ==</Name><Size>120</Size></Block><Block><Name>Qg==</Name><Size>121</Size></Block>"
    b"</CommittedBlocks><UncommittedBlocks>"
    b"<Block><Name>Qw==</Name><Size>122</Size></Block></UncommittedBlocks></BlockList>"
)


def test_a_list_is_read_as_it_is_written() -> None:
    entries = [
        Listed(Source.COMMITTED, "QQ=="),
        Listed(Source.UNCOMMITTED, "Qg=="),
        Listed(Source.LATEST, "Qw=="),
    ]
    assert read_block_list(block_list_document(entries)) == entries
    assert read_block_list(b"<BlockList/>") == []
    spaced = b"\xef\xbb\xbf<?xml version='1.0'?>\n<BlockList>\n  <Latest> Q&#81;== </Latest>\n</BlockList>"
    assert read_block_list(spaced) == [Listed(Source.LATEST, "QQ==")]


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"<BlockList>",
        b"<Other><Latest>QQ==</Latest></Other>",
        b"<BlockList><Newest>QQ==</Newest></BlockList>",
        b"<BlockList>text</BlockList>",
        b"<BlockList><Latest><Name>QQ==</Name></Latest></BlockList>",
        b"<BlockList/>trailing",
        b'<!DOCTYPE BlockList [<!ENTITY a "QQ==">]><BlockList><Latest>&a;</Latest></BlockList>',
        b"<BlockList><Latest>" + b"A" * 1000 + b"</Latest></BlockList>",
        block_list_document([Listed(Source.LATEST, "QQ==")] * (MAX_BLOCKS + 1)),
    ],
    ids=["none", "open", "root", "element", "text", "deeper", "trailing", "dtd", "name", "many"],
)
def test_what_is_no_list(document: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        read_block_list(document)
    assert caught.value.refusal == refusals.MALFORMED_DOCUMENT


def test_an_answer_names_what_lies_there() -> None:
    assert stored_names(ANSWER) == ["QQ==", "Qg=="]
    assert stored_names(b"<BlockList><CommittedBlocks /></BlockList>") == []


def test_an_answer_is_shown() -> None:
    shown = shown_block_list(
        ANSWER,
        committed={"QQ==": Shown("YQ==", 16)}.get,
        uncommitted={"Qw==": Shown("Yw==", 18)}.get,
    )
    assert shown == ANSWER.replace(b"<Block><Name>Qg==</Name><Size>121</Size></Block>", b"").replace(
        b"QQ==</Name><Size>120", b"YQ==</Name><Size>16"
    ).replace(b"Qw==</Name><Size>122", b"Yw==</Name><Size>18")


def test_blocks_that_are_none_of_ours() -> None:
    """Committed ones stay as they are; of waiting ones nobody could make a blob here."""
    shown = shown_block_list(ANSWER, committed=None, uncommitted=lambda _name: None)
    assert b"QQ==</Name><Size>120" in shown
    assert b"Qw==" not in shown


@pytest.mark.parametrize("answer", [b"", b"no xml", b"<BlockList><CommittedBlocks>", b"<!DOCTYPE a><a/>"])
def test_an_answer_that_is_none(answer: bytes) -> None:
    with pytest.raises(RefusedError) as caught:
        stored_names(answer)
    assert caught.value.refusal == refusals.SERVICE_ANSWER


def test_an_entry_without_a_name() -> None:
    broken = ANSWER.replace(b"<Name>QQ==</Name>", b"")
    with pytest.raises(RefusedError) as caught:
        shown_block_list(broken, committed=lambda _name: None, uncommitted=lambda _name: None)
    assert caught.value.refusal == refusals.SERVICE_ANSWER


def _listing(blocks: int) -> bytes:
    made = "".join(f"<Block><Name>Q{n:07}</Name><Size>{n}</Size></Block>" for n in range(blocks))
    return f"<BlockList><CommittedBlocks>{made}</CommittedBlocks></BlockList>".encode()


def test_a_list_of_several_slices_is_whole() -> None:
    long = _listing(5000)
    assert stored_names(long) == [f"Q{n:07}" for n in range(5000)]
    assert shown_block_list(long, committed=None, uncommitted=lambda _name: None) == long


def test_no_service_makes_us_hold_more_blocks_than_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_lists, "MAX_SHOWN", 3000)
    assert len(stored_names(_listing(3000))) == 3000
    for read in (stored_names, lambda it: shown_block_list(it, committed=None, uncommitted=lambda _: None)):
        with pytest.raises(RefusedError) as caught:
            read(_listing(3001))
        assert caught.value.refusal == refusals.SERVICE_ANSWER

"""Nothing changes but what is replaced; nothing is held but one entry; only plain XML passes."""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterable
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import refusals
from proxy.profiles.entry_mapping import Question
from proxy.profiles.xml_rewriting import (
    Entry,
    EntryRule,
    Limits,
    XmlError,
    XmlMapper,
    XmlRewriter,
    document_root,
    rewrite,
)
from proxy.refusals import RefusedError

S3 = "http://s3.amazonaws.com/doc/2006-03-01/"
LIST = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<!-- a list --><?php nothing?>\n'
    b"<ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"\n  xmlns:x='urn:x'>"
    b"<Name>b &amp; c</Name><Size>7</Size>"
    b'<Contents a="/>"><Key>a&#x62;c</Key><Size >104</Size ><ETag>&quot;x&quot;</ETag>'
    b"<x:Size>9</x:Size></Contents >"
    b"<Contents><Size/><Key><![CDATA[<Size>]]>d</Key></Contents>"
    b"<Contents/><Contents></Contents>\r\n"
    b"<Contents><Owner><Size>5</Size></Owner><Size><!-- c -->1&#48;0</Size></Contents>"
    b"</ListBucketResult>\n<!-- end -->\n"
)
SIZE, KEY = (S3, "Size"), (None, "Key")
CONTENTS = EntryRule(
    at=((S3, "ListBucketResult"), (S3, "Contents")),
    leaves=frozenset({(SIZE,), (KEY,), ((None, "ETag"),)}),
)


def in_pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    at = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    return [data[low:high] for low, high in itertools.pairwise(at) if low < high]


def through(rewriter: XmlRewriter, pieces: Iterable[bytes], judge: Callable[[Entry], None]) -> bytes:
    out = bytearray()
    parts = [part for piece in pieces for part in rewriter.feed(piece)]
    for part in (*parts, *rewriter.finish()):
        if isinstance(part, Entry):
            judge(part)
            out += part.render()
        else:
            out += part
    return bytes(out)


def leave(_entry: Entry) -> None: ...


def set_size(entry: Entry) -> None:
    for leaf in entry.all(SIZE):
        entry.replace(leaf, "1<2")


@given(cuts=st.lists(st.integers(0, len(LIST)), max_size=40))
def test_what_is_not_replaced_is_identical_in_whatever_pieces(cuts: list[int]) -> None:
    assert through(XmlRewriter([CONTENTS]), in_pieces(LIST, cuts), leave) == LIST
    assert through(XmlRewriter(), in_pieces(LIST, cuts), leave) == LIST


@pytest.mark.parametrize("step", [1, 2, 3, 7, 64, 10_000])
def test_replacements_are_splices(step: int) -> None:
    expected = (
        LIST.replace(b"<Size >104</Size >", b"<Size >1&#60;2</Size >")
        .replace(b"<Size/>", b"<Size>1&#60;2</Size>")
        .replace(b"<!-- c -->1&#48;0", b"1&#60;2")
    )
    pieces = in_pieces(LIST, range(0, len(LIST), step))
    assert through(XmlRewriter([CONTENTS]), pieces, set_size) == expected
    ET.fromstring(expected)


def test_entries_tell_their_texts() -> None:
    entries: list[Entry] = []
    through(XmlRewriter([CONTENTS]), [LIST], entries.append)
    assert [(entry.text(KEY), entry.text(SIZE), len(entry.leaves)) for entry in entries] == [
        ("abc", "104", 3),
        ("<Size>d", "", 2),
        (None, None, 0),
        (None, None, 0),
        (None, "100", 1),
    ]
    assert entries[0].text((None, "ETag")) == '"x"'


def test_removing_takes_the_whole_element() -> None:
    def remove(entry: Entry) -> None:
        for leaf in entry.all(SIZE):
            entry.remove(leaf)

    out = rewrite(LIST, [CONTENTS], remove)
    assert out == LIST.replace(b"<Size >104</Size >", b"").replace(b"<Size/>", b"").replace(
        b"<Size><!-- c -->1&#48;0</Size>", b""
    )


def test_an_empty_element_keeps_its_attributes_and_prefix_when_it_is_filled() -> None:
    document = b"<r xmlns:p='u'><p:e a = 'b/>' /><p:e\n/></r>"
    rule = EntryRule(at=(("", "r"),), leaves=frozenset({(("u", "e"),)}))

    def fill(entry: Entry) -> None:
        for leaf in entry.leaves:
            entry.replace(leaf, "é")

    out = rewrite(document, [rule], fill)
    assert out == b"<r xmlns:p='u'><p:e a = 'b/>'>&#233;</p:e><p:e>&#233;</p:e></r>"


def test_an_element_is_appended_behind_what_is_there() -> None:
    rule = EntryRule(at=(("", "r"),), leaves=frozenset({(("", "s"),)}))

    def append(entry: Entry) -> None:
        for leaf in entry.leaves:
            entry.append(leaf, b"<n/>")

    document = b"<r><s><a/>t</s><s a='1'/><s></s></r>"
    out = b"<r><s><a/>t<n/></s><s a='1'><n/></s><s><n/></s></r>"
    assert rewrite(document, [rule], append) == out


def test_the_root_can_be_the_entry_and_names_can_be_meant_anywhere() -> None:
    document = b" <r xmlns='u'><a><b><h>1</h></b></a><h>2</h><b><h><h>3</h></h></b></r> \n".lstrip()
    found: list[str] = []
    rule = EntryRule(at=(("u", "r"),), anywhere=frozenset({("u", "h")}))
    assert (
        rewrite(document, [rule], lambda entry: found.extend(leaf.text for leaf in entry.leaves)) == document
    )
    assert found == ["1", "2", "", "3"]


def test_a_namespace_is_what_it_is_bound_to_and_not_how_it_is_called() -> None:
    document = b"<q:r xmlns:q='u'><q:e><s>1</s><t:s xmlns:t='u'>2</t:s></q:e></q:r>"
    rule = EntryRule(at=(("u", "r"), ("u", "e")), leaves=frozenset({(("u", "s"),)}))
    texts: list[str | None] = []
    rewrite(document, [rule], lambda entry: texts.append(entry.text((None, "s"))))
    assert texts == ["2"]


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"text",
        b"<a>",
        b"<a></b>",
        b"<a/><b/>",
        b"<a><Contents></a>",
        b"<a>&nope;</a>",
        b"<p:a/>",
        b"<a b='1' b='2'/>",
        b"<!DOCTYPE a><a/>",
        b'<!DOCTYPE a [<!ENTITY l "ha">]><a>&l;</a>',
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
        b'<?xml version="1.0" encoding="ISO-8859-1"?><a/>',
        b'<?xml version="1.1"?><a/>',
        "<a>é</a>".encode("latin-1"),
        "<a/>".encode("utf-16"),
        b"<a>\x00</a>",
        b"<a" * 65 + b">",
        b"<a>" * 65 + b"</a>" * 65,
    ],
)
@pytest.mark.parametrize("step", [1, 1000])
def test_refused(document: bytes, step: int) -> None:
    rewriter = XmlRewriter([CONTENTS])
    pieces = in_pieces(document, range(0, len(document), step))
    with pytest.raises(XmlError):
        through(rewriter, pieces, leave)
    with pytest.raises(XmlError):
        rewriter.feed(b"<a/>")


LAUGHS = (
    b'<!DOCTYPE r [<!ENTITY a "ha">'
    + b"".join(b'<!ENTITY %c "%s">' % (98 + i, b"&%c;" % (97 + i) * 10) for i in range(9))
    + b"]><r>&j;</r>"
)


@pytest.mark.parametrize(
    "document", [LAUGHS, LAUGHS.replace(b"]>", b'<!ENTITY % p SYSTEM "http://127.0.0.1:1/">%p;]>')]
)
def test_bombs_are_refused_before_an_entity_is_declared(document: bytes) -> None:
    with pytest.raises(XmlError, match="document type"):
        document_root(document)


@pytest.mark.parametrize("depth", [63, 64, 65])
def test_depth_is_bounded(depth: int) -> None:
    document = b"<a>" * depth + b"</a>" * depth
    if depth <= 64:
        assert document_root(document) == ("", "a")
    else:
        with pytest.raises(XmlError, match="deep"):
            document_root(document)


@pytest.mark.parametrize("begin", [b"<r><!--", b"<r a='", b"<r><?p ", b"<r><", b"<", b"<r></"])
def test_a_token_without_end_is_refused_early(begin: bytes) -> None:
    rewriter = XmlRewriter([CONTENTS], limits=Limits(token_bytes=20_000))
    taken: list[int] = []

    def feed_all() -> None:
        rewriter.feed(begin)
        for fed in range(0, 100_000, 1000):
            rewriter.feed(b"x" * 1000)
            taken.append(fed)

    with pytest.raises(XmlError):
        feed_all()
    assert len(taken) < 45


@pytest.mark.parametrize("begin", [b"<r><!--", b"<r a='", b"<r><?p ", b"<r><e><!--"])
def test_a_long_token_byte_by_byte_is_no_work_without_end(begin: bytes) -> None:
    """Each byte would have expat read all of it again: half a gigabyte for 32 KiB."""
    limits = Limits(again_bytes=1 << 20, again_factor=64)
    rewriter = XmlRewriter([CONTENTS], limits=limits)
    rewriter.feed(begin)
    fed = 0

    def feed_all() -> None:
        nonlocal fed
        for _ in range(100_000):
            rewriter.feed(b"x")
            fed += 1

    with pytest.raises(XmlError, match="small pieces"):
        feed_all()
    assert fed < 2000


def test_an_honest_document_may_come_byte_by_byte() -> None:
    document = b"<ListBucketResult xmlns='%s'>%s</ListBucketResult>" % (
        S3.encode(),
        b"<Contents a='%s'><Size>104</Size></Contents>" % (b"v" * 1000) * 100,
    )
    pieces = in_pieces(document, range(len(document)))
    assert through(XmlRewriter([CONTENTS]), pieces, leave) == document


def test_elements_of_an_entry_are_bounded() -> None:
    rule = EntryRule(at=(("", "r"),), anywhere=frozenset({("", "s")}))
    for count in (100, 101):
        document = b"<r>" + b"<s/><o/>" * count + b"</r>"
        rewriter = XmlRewriter([rule], limits=Limits(entry_leaves=100))
        if count == 100:
            assert through(rewriter, [document], leave) == document
        else:
            with pytest.raises(XmlError, match="too many elements"):
                through(rewriter, [document], leave)


@pytest.mark.parametrize("begin", [b"<r>", b"<r><e><s>", b"<r><![CDATA["])
def test_text_streams_and_an_entry_is_bounded(begin: bytes) -> None:
    rule = EntryRule(at=(("", "r"), ("", "e")), leaves=frozenset({(("", "s"),)}))
    rewriter = XmlRewriter([rule], limits=Limits(entry_bytes=50_000))
    held = fed = len(begin)
    rewriter.feed(begin)

    def feed_all() -> None:
        nonlocal held, fed
        for _ in range(500):
            fed += 1000
            held = max(held, fed)
            for part in rewriter.feed(b"y" * 1000):
                assert isinstance(part, bytes)
                fed -= len(part)

    if b"<e>" in begin:
        with pytest.raises(XmlError, match="entry"):
            feed_all()
        assert held < 52_000
    else:
        feed_all()
        assert held < 3000


def test_errors_do_not_quote_the_document() -> None:
    with pytest.raises(XmlError) as caught:
        document_root(b"<secret-canary")
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize("text", ["\x00", "\x1f", "\ud800", "\uffff"])
def test_a_replacement_that_xml_cannot_hold_is_an_error(text: str) -> None:
    rule = EntryRule(at=(("", "r"),), leaves=frozenset({(("", "s"),)}))
    with pytest.raises(XmlError):
        rewrite(b"<r><s>1</s></r>", [rule], lambda entry: entry.replace(entry.leaves[0], text))


@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff")))
def test_a_replacement_reads_back_as_it_was_meant(text: str) -> None:
    rule = EntryRule(at=(("", "r"),), leaves=frozenset({(("", "s"),)}))
    out = rewrite(b"<r><s>1</s></r>", [rule], lambda entry: entry.replace(entry.leaves[0], text))
    assert (ET.fromstring(out).findtext("s") or "") == text


def test_elements_are_no_text_and_replacements_do_not_overlap() -> None:
    rule = EntryRule(at=(("", "r"),), anywhere=frozenset({("", "s")}))

    def replace_outer(entry: Entry) -> None:
        entry.replace(entry.leaves[0], "1")

    def remove_both(entry: Entry) -> None:
        for leaf in entry.leaves:
            entry.remove(leaf)

    for judge in (replace_outer, remove_both):
        with pytest.raises(XmlError):
            rewrite(b"<r><s><s>1</s></s></r>", [rule], judge)


# ---- generated documents


def make_element(draw: random.Random, depth: int) -> bytes:
    names = [b"Contents", b"Size", b"Key", b"x:Size", b"Other"]
    name = draw.choice(names)
    attributes = draw.choice([b"", b" a='>/>'", b' b="&lt;"', b" "])
    if draw.random() < 0.2:
        return b"<" + name + attributes + b"/>"
    inner = b"".join(
        make_element(draw, depth - 1)
        if depth and draw.random() < 0.5
        else draw.choice(
            [
                b"12",
                b"&amp;",
                b"&#62;",
                b"<![CDATA[</x>]]>",
                b"<!-- > -->",
                b"<?p /> ?>",
                b"\r\n",
                "ü".encode(),
            ]
        )
        for _ in range(draw.randrange(4))
    )
    return b"<" + name + attributes + b">" + inner + b"</" + name + b" >"


def tree(element: ET.Element) -> tuple[object, ...]:
    return (
        element.tag,
        element.attrib,
        element.text or "",
        element.tail or "",
        [tree(child) for child in element],
    )


@settings(max_examples=150)
@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 3000), max_size=10))
def test_an_independent_parser_sees_the_replaced_sizes_and_nothing_else(seed: int, cuts: list[int]) -> None:
    draw = random.Random(seed)
    inner = b"".join(make_element(draw, 3) for _ in range(4))
    document = b"<ListBucketResult xmlns='%s' xmlns:x='urn:x'>%s</ListBucketResult>" % (S3.encode(), inner)

    def replace(entry: Entry) -> None:
        for leaf in entry.all(SIZE):
            if not leaf.has_children:
                entry.replace(leaf, "99")

    out = through(XmlRewriter([CONTENTS]), in_pieces(document, cuts), replace)
    expected = ET.fromstring(document)
    for size in expected.findall(f"{{{S3}}}Contents/{{{S3}}}Size"):
        if not len(size):
            size.text = "99"
    assert tree(ET.fromstring(out)) == tree(expected)


# ---- the mapper


async def test_the_mapper_waits_for_what_it_asks_and_keeps_the_order() -> None:
    asked: list[str] = []

    def judge(entry: Entry) -> Question | None:
        size = entry.first(SIZE)
        if size is None or size.text != "104":
            return None

        async def find_out() -> None:
            asked.append(size.text)
            entry.replace(size, "0")

        return find_out

    mapper = XmlMapper([CONTENTS], judge)
    out = b""
    for piece in in_pieces(LIST, range(0, len(LIST), 50)):
        made = mapper.feed(piece)
        if mapper.pending:
            assert made == b""
            await mapper.settle()
            assert not mapper.pending
        out += made
    out += mapper.finish()
    assert asked == ["104"]
    assert out == LIST.replace(b">104<", b">0<")


@settings(max_examples=100, deadline=None)
@given(
    entries=st.lists(
        st.tuples(st.integers(0, 10**6), st.sampled_from(["ask", "leave", "set", "nothing"])), max_size=25
    ),
    cuts=st.lists(st.integers(0, 3000), max_size=20),
    order=st.randoms(use_true_random=False),
)
def test_whatever_waits_for_whatever_every_entry_goes_on_once_and_in_its_place(
    entries: list[tuple[int, str]], cuts: list[int], order: random.Random
) -> None:
    """Questions that answer in any order, pieces of any size, entries that nobody asks about among them."""
    document = b"<ListBucketResult xmlns='%s'>%s</ListBucketResult>" % (
        S3.encode(),
        b"".join(
            b"<Contents><Key>%d %s</Key>%s</Contents> "
            % (index, kind.encode(), b"" if kind == "nothing" else b"<Size>%d</Size>" % size)
            for index, (size, kind) in enumerate(entries)
        ),
    )
    asked: list[str] = []
    running = most = 0

    def judge(entry: Entry) -> Question | None:
        size, key = entry.first(SIZE), entry.text(KEY) or ""
        if size is None or key.endswith("leave"):
            return None
        if key.endswith("set"):
            entry.replace(size, "set")
            return None

        async def find_out() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            for _ in range(order.randrange(4)):
                await asyncio.sleep(0)
            running -= 1
            asked.append(key)
            entry.replace(size, f"asked {key}")

        return find_out

    async def run() -> bytes:
        mapper, out = XmlMapper([CONTENTS], judge), b""
        for piece in in_pieces(document, cuts):
            made = mapper.feed(piece)
            while mapper.pending:
                assert made == b"", "nothing overtakes an entry that waits"
                await mapper.settle()
                made = mapper.feed(b"")
            out += made
        return out + mapper.finish()

    expected = document
    for index, (size, kind) in enumerate(entries):
        new = {"ask": f"asked {index} ask", "set": "set"}.get(kind, str(size))
        old = f"<Key>{index} {kind}</Key><Size>{size}</Size>".encode()
        expected = expected.replace(old, f"<Key>{index} {kind}</Key><Size>{new}</Size>".encode())
    assert asyncio.run(run()) == expected
    assert sorted(asked) == sorted(f"{index} ask" for index, (_, kind) in enumerate(entries) if kind == "ask")
    assert most <= 8


async def test_what_the_mapper_cannot_rewrite_refuses_the_answer() -> None:
    mapper = XmlMapper([CONTENTS], lambda _entry: None)
    with pytest.raises(RefusedError) as caught:
        mapper.feed(b"<html><br></html>")
    assert caught.value.refusal is refusals.SERVICE_ANSWER

    async def fail() -> None:
        raise RefusedError(refusals.UPSTREAM)

    mapper = XmlMapper([CONTENTS], lambda _entry: fail)
    mapper.feed(LIST)
    with pytest.raises(RefusedError) as caught:
        await mapper.settle()
    assert caught.value.refusal is refusals.UPSTREAM

"""JSON that passes: edits are splices, lists stream, and whatever is not well formed is an error."""

import asyncio
import json
import random
from typing import Any

import pytest

from proxy import refusals
from proxy.profiles.entry_mapping import Question
from proxy.profiles.json_rewriting import (
    JsonError,
    JsonListMapper,
    JsonListRewriter,
    JsonObject,
    Limits,
)
from proxy.refusals import RefusedError

STRICT = json.JSONDecoder(parse_constant=lambda text: 1 / 0)


def document(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(9 if depth < 4 else 6)
    if kind >= 7:
        names = ("a", "b\u00e9", 'c"', "d\\", "", "items", "\ud800", "\U0001f600", "x" * 40)
        return {dice.choice(names): document(dice, depth + 1) for _ in range(dice.randrange(4))}
    if kind == 6:
        return [document(dice, depth + 1) for _ in range(dice.randrange(4))]
    values = (None, True, dice.randrange(-9, 10**18), dice.random(), '\\"}{][,:\u2028\x00', "\U0001f600")
    return values[kind]


def written(value: Any, dice: random.Random) -> str:
    """With white space wherever it may stand, and escapes where they need not."""
    space = "".join(dice.choice((" ", "\t", "\r\n", "", "", "")) for _ in range(2))
    ascii_only = dice.random() < 0.5

    def text(one: str) -> str:
        if ascii_only or any("\ud800" <= character <= "\udfff" for character in one):
            return json.dumps(one)
        return json.dumps(one, ensure_ascii=False)

    if isinstance(value, dict):
        members = (f"{space}{text(name)}{space}:{space}{written(one, dice)}" for name, one in value.items())
        return "{" + ",".join(members) + space + "}"
    if isinstance(value, list):
        return "[" + ",".join(space + written(one, dice) + space for one in value) + space + "]"
    return text(value) if isinstance(value, str) else json.dumps(value)


# ---- one object


def test_what_is_not_edited_stays_byte_by_byte() -> None:
    dice = random.Random(1)
    for _ in range(500):
        value = {"first": document(dice), "second": document(dice)}
        data = f" {written(value, dice)}\n".encode()
        parsed = JsonObject(data)
        assert parsed.render() == data
        assert {name: parsed.value(name) for name in parsed.names()} == value


def test_edits_change_what_they_name_alone() -> None:
    dice = random.Random(2)
    for _ in range(500):
        names = ["a", "b", "c", "d"][: dice.randrange(1, 5)]
        value = {name: document(dice) for name in names}
        parsed, wanted = JsonObject(written(value, dice)), dict(value)
        for name in ("a", "b", "c", "d", "e"):
            match dice.randrange(4):
                case 0:
                    parsed.remove(name)
                    wanted.pop(name, None)
                case 1:
                    parsed.put(name, [name, 1])
                    wanted[name] = [name, 1]
                case 2 if name in parsed:
                    parsed.replace(name, '\u2028"')
                    wanted[name] = '\u2028"'
        made = STRICT.decode(parsed.render().decode())
        assert made == wanted
        assert {name: parsed.edited(name) for name in parsed.names()} == {
            name: one for name, one in wanted.items() if name in value
        }


def test_an_object_in_an_object() -> None:
    parsed = JsonObject(b'{"m" : { "x":1, "y": "2" } , "n":[ 1 ]}')
    inner = parsed.inner("m")
    assert inner is not None
    inner.remove("x")
    inner.put("z", None)
    assert parsed.render() == b'{"m" : { "y": "2", "z": null } , "n":[ 1 ]}'
    assert parsed.inner("n") is None
    assert parsed.inner("absent") is None
    inner.remove("y")
    assert parsed.render() == b'{"m" : {"z": null} , "n":[ 1 ]}'


def test_an_object_of_very_many_members() -> None:
    """Each is looked at once: looked up among the others, these would take longer than a test may."""
    members = ",".join(f'"{number:x}":1' for number in range(100_000))
    parsed = JsonObject(f'{{"m":{{{members}}}}}'.encode(), limits=Limits(members=100_000))
    inner = parsed.inner("m")
    assert inner is not None
    inner.remove("0", "186a0")
    inner.put("z", 2)
    made = parsed.render().decode()
    assert made == f'{{"m":{{{members.removeprefix('"0":1,')}, "z": 2}}}}'
    for limit in (99_999, Limits().members):  # edited, it would hold everybody else up
        with pytest.raises(JsonError, match="too many"):
            JsonObject(f"{{{members}}}".encode(), limits=Limits(members=limit))


def test_texts() -> None:
    parsed = JsonObject(b'{"a": "b", "c": 1}')
    assert (parsed.text("a"), parsed.text("c"), parsed.text("d")) == ("b", None, None)
    assert "a" in parsed
    parsed.remove("a", "d")
    assert "a" not in parsed
    assert parsed.text("a") is None
    with pytest.raises(KeyError):
        parsed.replace("d", 1)


@pytest.mark.parametrize(
    "data",
    [
        b"", b" ", b"null", b"[]", b'"a"', b"1", b"{", b"}", b"{}}", b"{} {}", b'{"a"}', b'{"a":}',
        b'{"a":1,}', b'{,"a":1}', b"{a:1}", b"{'a':1}", b'{"a":1 "b":2}', b'{"a":01}', b'{"a":+1}',
        b'{"a":.5}', b'{"a":NaN}', b'{"a":Infinity}', b'{"a":-Infinity}', b'{"a":"\x01"}', b'{"a":"\\x"}',
        b'{"a":"\\u12"}', b'{"a":tru}', b'{"a":1,"a":2}', b'{"a":1,"\\u0061":2}', b'{"a":"\xff"}',
        b"\xef\xbb\xbf{}", b'{"a":[1,]}', b'{"a":[}',
        b"{1:2}", b"{null:1}", b"{[]:1}", b'{"a";1}', b'{"a":1;"b":2}',
        b"{/**/}", b'{"a":1}\x00', b'{"a":"', b'{"a":"\\', b'{"\\ud800":1}x',
    ],
)  # fmt: skip
def test_what_is_no_object(data: bytes) -> None:
    with pytest.raises(JsonError):
        JsonObject(data)
    if data.strip():  # and in a list what is no object is none either
        with pytest.raises(JsonError):
            rewritten(b'{"items":[' + data + b"]}", 1000)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
@pytest.mark.parametrize("depth", [63, 64, 65, 100_000])
def test_depth_is_limited(opening: bytes, depth: int) -> None:
    closing = {b"[": b"]", b'{"a":': b"}"}[opening]
    data = b'{"v":' + opening * depth + b"1" + closing * depth + b"}"
    if depth < 64:
        JsonObject(data)
    else:
        with pytest.raises(JsonError):
            JsonObject(data)


def test_numbers_too_long_to_be_read() -> None:
    with pytest.raises(JsonError):
        JsonObject(b'{"a":' + b"9" * 5000 + b"}")


# ---- a list that streams


def rewritten(data: bytes, steps: random.Random | int, name: str = "items") -> tuple[bytes, list[Any]]:
    rewriter, out, seen, at = JsonListRewriter(name), bytearray(), [], 0
    while at < len(data):
        step = steps if isinstance(steps, int) else steps.randrange(1, 60)
        for part in rewriter.feed(data[at : at + step]):
            if isinstance(part, JsonObject):
                seen.append({one: part.value(one) for one in part.names()})
                out += part.render()
            else:
                out += part
        at += step
    rewriter.finish()
    return bytes(out), seen


@pytest.mark.parametrize("step", [1, 2, 7, 10_000])
def test_all_that_is_not_edited_passes(step: int) -> None:
    dice = random.Random(3)
    for _ in range(60):
        items = [value for _ in range(dice.randrange(5)) if isinstance(value := document(dice), dict)]
        before, behind = document(dice), document(dice)
        data = written({"kind": before, "items": items, "next": behind}, dice).encode()
        assert rewritten(data, step) == (data, items)


def test_documents_cut_anywhere_are_errors() -> None:
    data = b' {"kind": "a\\"b", "items": [ {"x": [1, {"y": "]"}]} , {} ], "n": -1.5e3, "t": true} '
    whole = len(data.rstrip())
    for stop in range(whole):
        with pytest.raises(JsonError):
            rewritten(data[:stop], 3)
    assert rewritten(data, 3)[0] == data


def test_any_flipped_byte_is_seen_or_harmless() -> None:
    """Whoever reads what has passed reads JSON, or we have refused it."""
    dice = random.Random(4)
    data = b'{"k": {"a": [1, "x\\n", null]}, "items": [{"s": "1"}, {"s": 2.5}], "n": false}'
    refused = 0
    for _ in range(5000):
        changed = bytearray(data)
        for _ in range(dice.randrange(1, 3)):
            changed[dice.randrange(len(changed))] = dice.choice(b'{}[]",:\\0aelu- \x00\xc3\xa9')
        try:
            passed, seen = rewritten(bytes(changed), dice)
        except JsonError:
            refused += 1
            continue
        assert passed == changed
        try:
            parsed = STRICT.decode(passed.decode())
        except (ValueError, ZeroDivisionError):
            continue  # a string or scalar of what only passes: no reader takes it for another document
        if isinstance(parsed.get("items"), list) and b'"items"' in passed:
            assert [one for one in parsed["items"] if isinstance(one, dict)] == seen
    assert refused > 1000


@pytest.mark.parametrize(
    "data",
    [
        b'{"items": [], "items": []}',
        b'{"items": [1]}',
        b'{"items": ["a"]}',
        b'{"items": [[]]}',
        b'{"items": [{} {}]}',
        b'{"items": [{},]}',
        b'{"items": [,{}]}',
        b'{"items": [{"a": 1, "a": 2}]}',
        b'{"items": [{}]',
        b'{"items": [{}]} {}',
        b'[{"items": []}]',
        b'["items": []}',
        b'["a": 1}',
        b"{1: 2}",
        b'{"a": 1, 2: 3}',
        b'{"a"; 1}',
        b'{"a": 1; "b": 2}',
        b'{"a": 1]',
        b'{"items": (]}',
        b'{"items": [}}',
        b'{"items": [{}}}',
        b'{"items": [{}; {}]}',
        b'{"items": [{}, ({}]}',
    ],
)
def test_lists_that_are_none(data: bytes) -> None:
    for step in (1, 1000):
        with pytest.raises(JsonError):
            rewritten(data, step)


@pytest.mark.parametrize("data", [b'["a": 1}', b'"a": 1}', b'("a": 1}'])
def test_an_object_begins_as_one(data: bytes) -> None:
    with pytest.raises(JsonError):
        JsonObject(data)


@pytest.mark.parametrize(
    "scalar", [b"01", b"-", b"1.", b".5", b"+1", b"1e", b"tru", b"nulll", b"truefalse", b"1-1"]
)
@pytest.mark.parametrize("behind", [b"}", b', "items": []}'])
def test_what_passes_is_a_value(scalar: bytes, behind: bytes) -> None:
    with pytest.raises(JsonError):
        JsonListRewriter("items").feed(b'{"a": ' + scalar + behind)


def test_a_rewriter_that_has_failed_or_ended_takes_nothing_more() -> None:
    failed, ended = JsonListRewriter("items"), JsonListRewriter("items")
    with pytest.raises(JsonError):
        failed.feed(b'{"items": [{}, 1')
    ended.feed(b'{"items": []}')
    ended.finish()
    for rewriter in (failed, ended):
        with pytest.raises(JsonError):
            rewriter.feed(b" ")
        with pytest.raises(JsonError):
            rewriter.feed(b"")
        with pytest.raises(JsonError):
            rewriter.finish()


def test_members_of_other_names_and_kinds_pass() -> None:
    for data in (b'{"items": null}', b'{"items": {"items": [1]}}', b'{"other": [1, [2]]}', b"{}"):
        assert rewritten(data, 1) == (data, [])
    # The name may be written in another way; it is the same name.
    assert rewritten(b'{"\\u0069tems": [{"a": 1}]}', 2)[1] == [{"a": 1}]


def test_memory_is_limited() -> None:
    limits = Limits(depth=8, token_bytes=100, element_bytes=1000)
    for data in (
        b'{"' + b"n" * 200,
        b'{"a": ' + b"1" * 200,
        b'{"items": [{"a": "' + b"x" * 1200,
        b'{"a": ' + b"[" * 9,
        b'{"items": [{"a": ' + b"[" * 9,
    ):
        rewriter = JsonListRewriter("items", limits=limits)
        with pytest.raises(JsonError):
            _feed_all(rewriter, data)
        with pytest.raises(JsonError):
            rewriter.feed(b" ")
        with pytest.raises(JsonError):
            rewriter.finish()
    # What passes and is no token has no limit.
    rewriter = JsonListRewriter("items", limits=limits)
    rewriter.feed(b'{"a": "')
    for _ in range(100):
        assert rewriter.feed(b"x" * 1000) == [b"x" * 1000]


def _feed_all(rewriter: JsonListRewriter, data: bytes) -> None:
    for at in range(0, len(data), 10):
        rewriter.feed(data[at : at + 10])


# ---- as an answer is mapped


async def mapped(mapper: JsonListMapper, data: bytes, step: int = 5) -> bytes:
    out = bytearray()
    for at in range(0, len(data), step):
        out += mapper.feed(data[at : at + step])
        if mapper.pending:
            await mapper.settle()
    return bytes(out) + mapper.finish()


async def test_elements_wait_for_what_has_to_be_asked() -> None:
    asking = most = 0

    def judge(element: JsonObject) -> Question | None:
        if element.value("s") == 0:
            element.replace("s", "at once")
            return None

        async def ask() -> None:
            nonlocal asking, most
            asking += 1
            most = max(most, asking)
            await asyncio.sleep(0)
            element.replace("s", f"asked {element.value('s')}")
            asking -= 1

        return ask

    items = [{"s": number % 3} for number in range(50)]
    data = json.dumps({"items": items}).encode()
    for step in (5, 100_000):
        made = json.loads(await mapped(JsonListMapper("items", judge), data, step))
        assert [one["s"] for one in made["items"]] == [
            "at once" if one["s"] == 0 else f"asked {one['s']}" for one in items
        ]
    assert 1 < most <= 8


async def test_what_fails_refuses_the_answer() -> None:
    def asks(_element: JsonObject) -> Question:
        async def ask() -> None:
            raise RefusedError(refusals.UPSTREAM)

        return ask

    with pytest.raises(RefusedError) as caught:
        await mapped(JsonListMapper("items", asks), b'{"items": [{}, {}]}')
    assert caught.value.refusal is refusals.UPSTREAM
    for data in (b'{"items": [1]}', b'{"items": [{}', b"<html>"):
        with pytest.raises(RefusedError) as caught:
            await mapped(JsonListMapper("items", lambda _: None), data)
        assert caught.value.refusal is refusals.SERVICE_ANSWER


async def test_others_have_their_turn_while_a_large_piece_is_gone_through() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def judge(element: JsonObject) -> Question | None:
        async def ask() -> None:
            element.replace("n", -1)

        return ask if element.value("n") == 5000 else None

    items = [{"n": number} for number in range(8000)]
    data = json.dumps({"items": items}, separators=(",", ":")).encode()
    mapper = JsonListMapper("items", judge)
    waiting = asyncio.create_task(others(), name="others")
    assert mapper.feed(data) == b""
    was_pending = mapper.pending
    with pytest.raises(RefusedError):
        mapper.feed(b" ")
    with pytest.raises(RefusedError):
        mapper.finish()
    await mapper.settle()
    waiting.cancel()
    assert turns >= len(data) // 4096
    assert (was_pending, mapper.pending) == (True, False)
    assert mapper.feed(b"\n") + mapper.finish() == data.replace(b'{"n":5000}', b'{"n":-1}') + b"\n"


async def test_what_is_not_well_formed_refuses_whatever_slice_it_lies_in() -> None:
    for place in (10, 5_000, 50_000):
        data = b'{"items": [' + b" " * place + b"1]}"
        with pytest.raises(RefusedError) as caught:
            await mapped(JsonListMapper("items", lambda _: None), data, 100_000)
        assert caught.value.refusal is refusals.SERVICE_ANSWER

"""Transforms and permits by themselves: what the gate leans on when it lets a body pass."""

from types import SimpleNamespace
from typing import Any, override

import pytest

from envelope.errors import MisuseError
from proxy import refusals
from proxy.gate import CLEAR, Permit, Piece, Transform, TransformError, permit
from proxy.refusals import RefusedError


class Scripted(Transform):
    """Returns what it was given, call by call; raises it if it is an exception."""

    def __init__(self, *results: Any, expected: int | None = None) -> None:
        self._results = list(results)
        self.expected_out_bytes = expected

    @override
    def feed(self, piece: bytes) -> list[Piece]:
        return self._next()

    @override
    def finish(self) -> list[Piece]:
        return self._next()

    def _next(self) -> list[Piece]:
        result = self._results.pop(0)
        if isinstance(result, BaseException):
            raise result
        return result  # type: ignore[no-any-return]


def test_pieces_are_counted_and_empty_ones_dropped() -> None:
    transform = Scripted([b"ab", b"", bytearray(b"c"), memoryview(b"def"), bytearray()], [b"g"])
    assert [bytes(piece) for piece in transform(b"x")] == [b"ab", b"c", b"def"]
    assert (transform.out_bytes, transform.finished) == (6, False)
    assert transform(b"") == [b"g"]
    assert (transform.out_bytes, transform.finished) == (7, True)


def test_a_finished_transform_takes_nothing_more() -> None:
    transform = Scripted([], [])
    transform(b"")
    for piece in (b"", b"x"):
        with pytest.raises(TransformError):
            transform(piece)


@pytest.mark.parametrize("error", [RuntimeError("x"), RefusedError(refusals.INTERNAL), KeyboardInterrupt()])
def test_a_failed_transform_stays_failed(error: BaseException) -> None:
    transform = Scripted([b"a"], error, [b"never"], [b"never"])
    transform(b"1")
    with pytest.raises(type(error)):
        transform(b"2")
    assert transform.failure is error
    for piece in (b"3", b""):
        with pytest.raises(TransformError):
            transform(piece)
    assert not transform.finished


def test_the_first_reason_of_an_abort_stays() -> None:
    transform = Scripted([b"never"])
    first = RuntimeError("first")
    transform.fail(first)
    transform.fail(RuntimeError("second"))
    assert transform.failure is first
    with pytest.raises(TransformError):
        transform(b"x")


@pytest.mark.parametrize(("made", "finished"), [([b"abc"], [b"d"]), ([b"abcd"], []), ([], [b"abcd"])])
def test_the_promised_length_is_kept(made: list[bytes], finished: list[bytes]) -> None:
    transform = Scripted(made, finished, expected=4)
    transform(b"x")
    transform(b"")
    assert transform.finished


@pytest.mark.parametrize(("made", "finished"), [([b"abc"], []), ([], []), ([], [b"abc"])])
def test_less_than_promised_is_no_end(made: list[bytes], finished: list[bytes]) -> None:
    transform = Scripted(made, finished, expected=4)
    transform(b"x")
    with pytest.raises(TransformError, match="of 4 bytes"):
        transform(b"")
    assert not transform.finished


def test_more_than_promised_does_not_leave() -> None:
    transform = Scripted([b"abcde"], expected=4)
    with pytest.raises(TransformError, match="more than"):
        transform(b"x")


@pytest.mark.parametrize(
    "result",
    [None, "abc", b"abc", bytearray(b"abc"), memoryview(b"abc"), (b"abc",), iter([b"abc"]), {b"abc"}],
)
def test_only_a_list_is_a_result(result: object) -> None:
    with pytest.raises(TransformError, match="returns a list"):
        Scripted(result)(b"x")


@pytest.mark.parametrize(
    "item", [None, "abc", 7, [b"abc"], memoryview(b"abcdefgh").cast("I"), memoryview(b"abc")[::2]]
)
def test_only_flat_bytes_are_pieces(item: object) -> None:
    with pytest.raises(TransformError):
        Scripted([item])(b"x")


def test_a_transform_serves_one_message() -> None:
    transform, one, other = Scripted(), object(), object()
    transform.claim(one)
    transform.claim(one)
    with pytest.raises(MisuseError):
        transform.claim(other)


def test_a_permit_begins_refused_and_stays_with_its_flow() -> None:
    flow = SimpleNamespace(metadata={})
    given = permit(flow)
    assert (given.request, given.response, given.refusal, given.revoked) == (None, None, None, False)
    given.request = CLEAR
    assert permit(flow) is given
    assert repr(given.request) == "CLEAR"


def test_something_else_in_its_place_is_no_permit() -> None:
    flow = SimpleNamespace(metadata={"sealgate.permit": SimpleNamespace(request=CLEAR)})
    assert permit(flow).request is None


def test_a_revoked_permit_keeps_the_more_telling_refusal() -> None:
    given = Permit()
    given.request = given.response = CLEAR
    given.revoke(refusals.INTERNAL)
    assert [given.request, given.response, given.revoked] == [None, None, True]
    assert given.refusal is refusals.INTERNAL
    other = Permit()
    other.refusal = refusals.NO_ACTIVE_KEY
    other.revoke(refusals.INTERNAL)
    assert other.refusal is refusals.NO_ACTIVE_KEY

"""Bodies read into memory: bounded together, a tenant's to a part of that; what is over does not count."""

import gc

import pytest

from proxy import refusals
from proxy.bodies.collecting import Collecting
from proxy.refusals import RefusedError


def test_all_together_are_bounded_and_a_tenant_has_its_part() -> None:
    collecting = Collecting(limit_bytes=1000, share=0.6)
    first, second = collecting.collect("acme", 900), collecting.collect("acme", 900)
    first.take(bytes(500))
    with pytest.raises(RefusedError) as caught:
        second.take(bytes(101))
    assert caught.value.refusal is refusals.MEMORY_SHARE
    other, late = collecting.collect("globex", 900), collecting.collect("globex", 900)
    with pytest.raises(RefusedError) as caught:
        late.take(bytes(501))
    assert caught.value.refusal is refusals.MEMORY_FULL
    other.take(bytes(500))
    assert first.body() == bytes(500)
    for body in (first, second, other, late):
        body.let_go()
        body.let_go()
    assert collecting.held_bytes == 0


@pytest.mark.parametrize("way", ["let go", "discarded", "forgotten"])
def test_what_is_over_does_not_count(way: str) -> None:
    collecting = Collecting()
    body = collecting.collect("acme", 100)
    body.take(b"some")
    body.take(b"thing")
    assert body.body() == b"something"
    assert collecting.held_bytes == 9
    match way:
        case "let go":
            body.let_go()
        case "discarded":
            body.discard()
            assert body.body() == b"", "what does not count is not there"
        case _:
            del body
            gc.collect()
    assert collecting.held_bytes == 0


def test_a_body_has_its_own_limit_first() -> None:
    collecting = Collecting(limit_bytes=1000)
    body = collecting.collect("acme", 10, too_large=refusals.SERVICE_ANSWER)
    with pytest.raises(RefusedError) as caught:
        body.take(bytes(11))
    assert caught.value.refusal is refusals.SERVICE_ANSWER
    assert collecting.held_bytes == 0

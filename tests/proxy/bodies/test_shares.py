"""Room that tenants share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy import refusals
from proxy.bodies.shares import Shares
from proxy.refusals import RefusedError


def shares(share: float = 0.5) -> Shares:
    return Shares(limit_bytes=100, share=share, full=refusals.SPOOL_FULL, share_full=refusals.SPOOL_SHARE)


def test_the_refusal_says_which_it_is() -> None:
    room = shares(0.6)
    room.take("acme", 60)
    with pytest.raises(RefusedError) as caught:
        room.take("acme", 1)
    assert caught.value.refusal is refusals.SPOOL_SHARE
    room.take("globex", 40)
    for tenant in ("acme", "globex", "initech"):
        with pytest.raises(RefusedError) as caught:
            room.take(tenant, 1)
        assert caught.value.refusal is refusals.SPOOL_FULL
    for refusal in (refusals.SPOOL_FULL, refusals.SPOOL_SHARE, refusals.MEMORY_FULL, refusals.MEMORY_SHARE):
        assert refusal.status == 503
        assert refusal.retry_after_s


def test_a_sole_tenant_may_have_it_all() -> None:
    room = shares(1)
    room.take("acme", 100)
    with pytest.raises(RefusedError):
        room.take("acme", 1)


@given(st.lists(st.tuples(st.sampled_from(["acme", "globex", "initech"]), st.integers(0, 70)), max_size=40))
def test_no_order_of_taking_exceeds_the_room_or_a_part_of_it(wishes: list[tuple[str, int]]) -> None:
    room, taken = shares(), list[tuple[str, int]]()
    for tenant, size in wishes:
        try:
            room.take(tenant, size)
        except RefusedError:
            if taken:
                room.give_back(*taken.pop())
        else:
            taken.append((tenant, size))
        held = {name: sum(size for other, size in taken if other == name) for name, _ in taken}
        assert room.held_bytes == sum(held.values()) <= 100
        assert all(size <= 50 for size in held.values())
    for one in taken:
        room.give_back(*one)
    assert room.held_bytes == 0
    assert not +room._of

"""How much of incomplete bodies is kept, and for whom."""

import pytest

from proxy.encryption_service.kept_bodies import STRANGER, KeptBodies


def kept() -> KeptBodies:
    return KeptBodies(max_bytes=100, max_tenant_bytes=60, max_strangers_bytes=10)


def test_each_has_its_share() -> None:
    bodies = kept()
    assert bodies.add("acme", 60)
    assert not bodies.add("acme", 1)
    assert bodies.add("acme", -1)
    assert bodies.add("globex", 40)
    assert not bodies.add("globex", 1), "all together"
    assert bodies.add("globex", -1)
    assert bodies.add(STRANGER, 10), "whatever known callers keep"
    assert not bodies.add(STRANGER, 1)
    assert bodies.total_bytes == 111


@pytest.mark.parametrize("holder", ["acme", STRANGER])
def test_what_is_given_back_can_be_had_again(holder: str) -> None:
    bodies = kept()
    for _ in range(1000):
        assert bodies.add(holder, 10)
        assert bodies.add(holder, -10)
    assert bodies.total_bytes == 0
    assert not bodies._of

"""Places: a share for each peer, and room for newcomers as long as anybody is idle."""

from collections import Counter

import pytest

from proxy.gate.places import LOOKED_AT, Places, Refused, peer_of


class Connection:
    def __init__(self, *, is_waiting: bool = True) -> None:
        self.waits = is_waiting
        self.looked_at = 0
        self.displaced = 0

    @property
    def is_waiting(self) -> bool:
        self.looked_at += 1
        return self.waits

    def displace(self) -> None:
        self.displaced += 1


def filled(places: Places, count: int, *, is_waiting: bool = True) -> list[Connection]:
    connections = [Connection(is_waiting=is_waiting) for _ in range(count)]
    for index, connection in enumerate(connections):
        assert places.take(connection, f"192.0.2.{index % 250}") is None
    return connections


def test_a_peer_has_its_share_and_others_theirs() -> None:
    places = Places(10, 2)
    first, second, third = Connection(), Connection(), Connection()
    assert places.take(first, "192.0.2.1") is None
    assert places.take(second, "192.0.2.1") is None
    assert places.take(third, "192.0.2.1") is Refused.PEER
    assert first.displaced == second.displaced == 0, "its own idle ones are not taken from it"
    assert places.take(third, "192.0.2.2") is None
    places.give_back(first)
    assert places.take(Connection(), "192.0.2.1") is None
    assert places.refused == Counter({Refused.PEER: 1})


def test_the_longest_idle_one_makes_room() -> None:
    places = Places(3, 3)
    oldest, *others = filled(places, 3)
    assert places.take(Connection(), "198.51.100.1") is None
    assert oldest.displaced == 1
    assert [other.displaced for other in others] == [0, 0]
    assert len(places) == 3
    places.give_back(oldest)  # when it has closed: it has no place any more
    assert len(places) == 3
    assert places.refused == Counter({Refused.DISPLACED: 1})


def test_who_is_busy_keeps_the_place() -> None:
    places = Places(3, 3)
    busy = filled(places, 3, is_waiting=False)
    assert places.take(Connection(), "198.51.100.1") is Refused.FULL
    busy[1].waits = True
    assert places.take(Connection(), "198.51.100.1") is None
    assert [one.displaced for one in busy] == [0, 1, 0]


def test_a_newcomer_costs_the_same_however_many_are_busy() -> None:
    """What is found busy goes to the end: the idle one behind a thousand busy ones is found by and by."""
    places = Places(10 * LOOKED_AT, 10 * LOOKED_AT)
    busy = [Connection(is_waiting=False) for _ in range(10 * LOOKED_AT - 1)]
    idle = Connection()
    for connection in (*busy, idle):
        assert places.take(connection, "192.0.2.1") is None
    refused = 0
    while places.take(Connection(), "192.0.2.2") is not None:
        refused += 1
        assert sum(connection.looked_at for connection in busy) <= refused * LOOKED_AT
    assert idle.displaced == 1
    assert refused == 9


def test_nothing_is_remembered_of_peers_that_have_gone() -> None:
    places = Places(5, 1)
    connection = Connection()
    for number in range(100):
        assert places.take(connection, f"192.0.2.{number}") is None
        assert places.take(Connection(), f"192.0.2.{number}") is Refused.PEER
        places.give_back(connection)
    places.give_back(connection)
    assert len(places) == 0
    assert places._of_peer == {}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "", True),
        ("a socket", "192.0.2.1", False),
    ],
)
def test_what_a_peer_is(one: str, other: str, same: bool) -> None:
    assert (peer_of(one) == peer_of(other)) is same

"""Who may go on, and for how long, by who was heard: tables, and a search for a way around the bound."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from key_agent.environments.shared.registry_lease import NEVER_S, Members, Position, RegistryLease

AT = Position(1, 10)
NOW_S = 1000.0


def members(count: int, *, manager: str | None = "a", own: str = "a") -> Members:
    return Members(own=own, counted=frozenset("abcdefg"[:count]), manager=manager)


def lease(heard: dict[str, float], *, position: Position = AT, proven_ago_s: float = 0.0) -> RegistryLease:
    """One that stands at AT and heard these environments at these times."""
    made = RegistryLease()
    made.applied(AT)
    for name, asked_boot_s in heard.items():
        made.heard(name, position, asked_boot_s=asked_boot_s, proven_ago_s=proven_ago_s)
    return made


@pytest.mark.parametrize(
    ("count", "own", "manager", "heard", "proven_s"),
    [
        # Alone: nobody decides without it.
        (1, "a", "a", {}, NOW_S),
        (1, "a", None, {}, NOW_S),
        # Two: the manager's environment outlives the other, not the other way round.
        (2, "a", "a", {}, NOW_S),
        (2, "b", "a", {}, NEVER_S),
        (2, "b", "a", {"a": 900}, 900),
        (2, "a", None, {}, NEVER_S),
        (2, "a", None, {"b": 900}, 900),
        # Three: one other is a majority, the manager is nothing by itself.
        (3, "a", "a", {}, NEVER_S),
        (3, "a", "a", {"b": 900, "c": 800}, 900),
        (3, "b", "a", {"c": 800}, 800),
        # Four: two others; or one, if the manager's is one of both.
        (4, "a", "a", {"b": 900}, 900),
        (4, "b", "a", {"c": 900}, NEVER_S),
        (4, "b", "a", {"a": 900}, 900),
        (4, "b", "a", {"c": 900, "d": 800}, 800),
        (4, "b", None, {"c": 900}, NEVER_S),
        # Five.
        (5, "b", None, {"c": 900, "d": 800, "e": 700}, 800),
        (5, "a", "a", {"b": 900}, NEVER_S),
        # Six: three with the manager's.
        (6, "b", "a", {"a": 950, "c": 900}, 950),
        (6, "c", "b", {"a": 990, "d": 900}, NEVER_S),
    ],
)
def test_a_majority_proves_it(
    count: int, own: str, manager: str | None, heard: dict[str, float], proven_s: float
) -> None:
    found = lease(heard).proven_boot_s(members(count, own=own, manager=manager), NOW_S)
    assert found == proven_s


def test_the_manager_lends_no_more_than_it_has() -> None:
    """Cut off together with the manager: its proof ages, and ours with it."""
    five = members(5, own="b", manager="a")
    assert lease({"a": 990}, proven_ago_s=0).proven_boot_s(five, NOW_S) == 990
    assert lease({"a": 990}, proven_ago_s=200).proven_boot_s(five, NOW_S) == 790
    without = RegistryLease()
    without.applied(AT)
    without.heard("a", AT, asked_boot_s=990, proven_ago_s=None)
    assert without.proven_boot_s(five, NOW_S) == NEVER_S
    # Its environment is withdrawn: then it proves nothing, though it may still hold the term.
    healing = Members(own="b", counted=frozenset("bcde"), manager="a")
    assert lease({"a": 990}).proven_boot_s(healing, NOW_S) == NEVER_S


def test_who_is_withdrawn_neither_counts_nor_holds() -> None:
    healing = Members(own="a", counted=frozenset("bc"), manager="b")
    assert lease({"b": 990, "c": 990}).proven_boot_s(healing, NOW_S) == NEVER_S
    others = Members(own="b", counted=frozenset("bc"), manager="b")
    assert lease({"a": 990}).proven_boot_s(others, NOW_S) == NOW_S  # half, with the manager's
    assert lease({"a": 990}).proven_boot_s(
        Members(own="b", counted=frozenset("bcd"), manager="b"), NOW_S
    ) == NEVER_S  # fmt: skip


def test_nothing_counts_until_the_newest_registry_is_applied() -> None:
    three = members(3, own="a", manager=None)
    mine = lease({"b": 800})
    mine.heard("b", Position(1, 11), asked_boot_s=900, proven_ago_s=0)
    assert mine.is_behind
    assert mine.proven_boot_s(three, NOW_S) == 800  # what was proven before stays proven
    mine.heard("c", AT, asked_boot_s=950, proven_ago_s=0)
    assert mine.proven_boot_s(three, NOW_S) == 800
    mine.applied(Position(1, 11))
    assert mine.proven_boot_s(three, NOW_S) == 950


def test_who_starts_behind_has_no_proof() -> None:
    mine = RegistryLease()
    mine.applied(AT)
    mine.heard("b", Position(2, 3), asked_boot_s=990, proven_ago_s=0)
    assert mine.proven_boot_s(members(3), NOW_S) == NEVER_S
    assert mine.proven_boot_s(members(2, manager="a"), NOW_S) == NEVER_S
    mine.applied(Position(2, 3))
    assert mine.proven_boot_s(members(3), NOW_S) == 990


def test_a_higher_term_is_newer_whatever_the_epoch() -> None:
    mine = lease({"b": 900})
    mine.heard("c", Position(2, 1), asked_boot_s=950, proven_ago_s=0)
    assert mine.is_behind


def test_a_claim_that_nobody_can_show_stops_nobody() -> None:
    """A breached environment says that it has term 999: it is asked for the rows, and then not believed."""
    mine = lease({"b": 900})
    mine.heard("c", Position(999, 1), asked_boot_s=950, proven_ago_s=0)
    mine.heard("b", AT, asked_boot_s=980, proven_ago_s=0)
    assert mine.proven_boot_s(members(3, manager=None), NOW_S) == 900
    mine.forget("c")
    assert not mine.is_behind
    assert mine.proven_boot_s(members(3, manager=None), NOW_S) == 980


def test_an_election_proves_the_manager_and_nobody_else() -> None:
    mine = lease({})
    mine.elected(980)
    assert mine.proven_boot_s(members(3, own="a", manager="a"), NOW_S) == 980
    assert mine.proven_boot_s(members(3, own="a", manager="b"), NOW_S) == NEVER_S
    mine.elected(None)
    assert mine.proven_boot_s(members(3, own="a", manager="a"), NOW_S) == NEVER_S


def test_two_halves_never_both_hold() -> None:
    """Whatever the network is split into: new proofs come to one part at most."""
    for count in range(1, 7):
        everybody = "abcdef"[:count]
        for manager, size in itertools.product([*everybody, None], range(1, count)):
            for part in itertools.combinations(everybody, size):
                other = tuple(name for name in everybody if name not in part)
                holding = [
                    any(
                        lease({name: 900 for name in side if name != own}, proven_ago_s=1e9).proven_boot_s(
                            members(count, own=own, manager=manager), NOW_S
                        )
                        > 0
                        for own in side
                    )
                    for side in (part, other)
                ]
                assert holding != [True, True], (everybody, manager, part)


@given(
    st.integers(3, 6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.floats(0.1, 20)), max_size=60),
)
def test_no_talk_inside_of_a_minority_prolongs_it(count: int, talks: list[tuple[int, int, float]]) -> None:
    """Cut off at time 0, and the manager's environment among them: in whatever order they talk, and lend each
    other what the manager has proven, nothing is proven later than the cut."""
    everybody = "abcdef"[:count]
    inside = everybody[: (count - 1) // 2]
    leases = {name: lease({other: 0.0 for other in everybody if other != name}) for name in inside}
    now_s = 0.0
    for asker, asked, pause_s in talks:
        now_s += pause_s
        own, other = inside[asker % len(inside)], inside[asked % len(inside)]
        if own == other:
            continue
        theirs = leases[other].proven_boot_s(members(count, own=other), now_s)
        leases[own].heard(other, AT, asked_boot_s=now_s, proven_ago_s=now_s - theirs)
    for own in inside:
        assert leases[own].proven_boot_s(members(count, own=own), now_s) <= 1e-6

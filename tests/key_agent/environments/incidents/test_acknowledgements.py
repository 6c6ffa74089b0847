"""Who is clear of what was taken away: by acknowledgement, by withdrawal, or by the end of what was sent."""

import dataclasses
from typing import Any

import msgspec
import pytest

from envelope.errors import FormatError
from envelope.keys import KeyState, NetworkService
from key_agent.environments.incidents.acknowledgements import (
    LIVE_S,
    MAX_LOAD_BALANCERS,
    MAX_MARKS,
    Containment,
    LbAck,
    LoadBalancers,
    Place,
)
from key_agent.environments.shared.registry_lease import Position
from key_agent.environments.states import EnvironmentState
from key_agent.registry.model import RECEIPT_SLACK_MS, Link
from tests.key_agent.environments.rows import NOW_MS, World, next_rows

UNTIL_MS = NOW_MS + 330_000


def link(proxy: str = "p1", **more: Any) -> Link:
    found: dict[str, Any] = {
        "owner": NetworkService("acme", "s3"),
        "proxy_id": proxy,
        "certificate_pem": "",
        "issued_sequence": 100,
        "issued_until_ms": UNTIL_MS,
        "accepted_sequence": 100,
        "issued_until_boot_s": 400.0,
    }
    return Link(**(found | more))


def later(rows: Any, **states: KeyState) -> Any:
    """The next epoch, with keys of a World in other states."""
    found: Any = next_rows(rows)
    for key_id, state in states.items():
        found.deks[key_id.removeprefix("k")] = msgspec.structs.replace(
            found.deks[key_id.removeprefix("k")], state=state
        )
    return found


class Site:
    """An agent of environment a, whose key was taken away in epoch 2."""

    def __init__(self, *links: Link) -> None:
        world = World()
        self.before = world.rows
        self.links = list(links)
        self.containment = Containment([], self.before)
        self.view = later(self.before, **{f"k{world.dek['s3-a']}": KeyState.COMPROMISED})
        self.containment.changed(self.before, self.view, "a", self.links)

    def places(self, *links: Link, now_ms: int = NOW_MS, now_boot_s: float = 100.0) -> list[Place]:
        return self.containment.places(
            self.view.epoch, links or self.links, now_ms=now_ms, now_boot_s=now_boot_s
        )


def test_a_proxy_that_was_sent_keys_is_silent_until_it_says_something_newer() -> None:
    before = link()
    site = Site(before)
    [place] = site.places()
    assert (place.is_clear, place.cause) == (False, "silent")
    assert place.holds_until_ms == UNTIL_MS + RECEIPT_SLACK_MS
    said: list[dict[str, Any]] = [
        {"accepted_sequence": 101},
        {"withdrawn_sequence": 101},
        {"withdrawn_sequence": 100},
    ]
    for newer in said:
        [place] = site.places(dataclasses.replace(before, issued_sequence=101, **newer))
        assert (place.is_clear, place.cause) == (True, "acknowledged"), newer


def test_what_was_sent_ends_by_both_clocks() -> None:
    site = Site(link())
    over_ms = UNTIL_MS + RECEIPT_SLACK_MS
    cases = [(over_ms - 1, 401.0, False), (over_ms, 399.0, False), (over_ms, 400.0, True)]
    for now_ms, boot_s, is_clear in cases:
        [place] = site.places(now_ms=now_ms, now_boot_s=boot_s)
        assert place.is_clear is is_clear, (now_ms, boot_s)


def test_a_proxy_that_was_never_sent_anything_has_nothing() -> None:
    assert [place.cause for place in Site(link(issued_sequence=0)).places()] == ["ended"]
    site = Site()
    assert [place.cause for place in site.places(link("new"))] == ["ended"], "it came afterwards"


def test_a_restart_forgets_what_was_sent_and_is_more_careful() -> None:
    """A new life knows only what may be out there at its start, and asks for something newer than that."""
    world = World()
    containment = Containment([link(issued_sequence=200, accepted_sequence=150)], world.rows)
    for accepted, is_clear in ((150, False), (200, False), (201, True)):
        [place] = containment.places(
            1,
            [link(issued_sequence=201, accepted_sequence=accepted)],
            now_ms=NOW_MS,
            now_boot_s=0,
        )
        assert place.is_clear is is_clear


def test_only_what_takes_away_is_remembered_and_not_for_ever() -> None:
    world = World()
    rows, key = world.rows, f"k{world.dek['s3-a']}"
    containment = Containment([], rows)
    harmless = later(rows, **{key: KeyState.DEACTIVATED})
    containment.changed(rows, harmless, "a", [link()])
    assert list(containment._marks) == [rows.epoch]
    healing = later(harmless)
    for name in ("b", "a"):
        before = healing
        healing = later(healing)
        healing.environments[name] = msgspec.structs.replace(
            healing.environments[name], state=EnvironmentState.HEALING
        )
        containment.changed(before, healing, "a", [link()])
    assert sorted(containment._marks) == [rows.epoch, healing.epoch], "another environment is not ours"
    view = healing
    for _ in range(MAX_MARKS + 10):
        back = later(view, **{key: KeyState.ACTIVE})
        gone = later(back, **{key: KeyState.SUSPENDED})
        containment.changed(back, gone, "a", [link()])
        view = gone
    assert len(containment._marks) == MAX_MARKS


# Load balancers.


def ack(name: str = "lb-1", term: int = 1, epoch: int = 7) -> LbAck:
    return LbAck(load_balancer=name, term=term, epoch=epoch, answers={"a": "down #healing"})


def test_live_ones_have_confirmed_or_not() -> None:
    found = LoadBalancers()
    assert found.confirmed(Position(1, 7), now_boot_s=0) == ([], [])
    found.acknowledged("lb-1", ack(), now_boot_s=0)
    found.acknowledged("lb-2", ack("lb-2", epoch=6), now_boot_s=1)
    assert found.confirmed(Position(1, 7), now_boot_s=1) == (["lb-1"], ["lb-2"])
    assert found.confirmed(Position(2, 1), now_boot_s=1) == ([], ["lb-1", "lb-2"]), "of an older term"
    assert found.confirmed(Position(1, 7), now_boot_s=LIVE_S + 0.5) == ([], ["lb-2"])
    found.acknowledged("lb-2", ack("lb-2", epoch=8), now_boot_s=2)
    found.acknowledged("lb-2", ack("lb-2", epoch=6), now_boot_s=3)  # overtaken on its way
    assert found.confirmed(Position(1, 7), now_boot_s=4) == (["lb-1", "lb-2"], [])


def test_nobody_acknowledges_in_another_ones_name() -> None:
    with pytest.raises(FormatError, match="in the name of"):
        LoadBalancers().acknowledged("lb-2", ack("lb-1"), now_boot_s=0)


def test_their_number_is_bounded_by_those_that_live() -> None:
    found = LoadBalancers()
    for number in range(MAX_LOAD_BALANCERS):
        found.acknowledged(f"lb-{number}", ack(f"lb-{number}"), now_boot_s=(number == 0 and -100) or 0)
    found.acknowledged("one-more", ack("one-more"), now_boot_s=0)
    with pytest.raises(FormatError, match="known already"):
        found.acknowledged("too-many", ack("too-many"), now_boot_s=0)
    assert len(found.all(now_boot_s=0)) == MAX_LOAD_BALANCERS

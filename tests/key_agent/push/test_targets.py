"""Memory and the registry's answer: receipts that are known and not stored yet are not forgotten.

What targets decide otherwise is seen in tests/key_agent/test_agent.py.
"""

import pytest

from envelope.keys import NetworkService
from key_agent.push.targets import Targets
from key_agent.registry.model import Book, Link, Proxy, Receipt, Reservation

OWNER = NetworkService("acme", "files")
PROXY = Proxy(id="edge", url="https://localhost:1", ca_pem="")


def book(**link: object) -> Book:
    """As the registry is read: one service at one proxy."""
    read = Link(owner=OWNER, proxy_id=PROXY.id, certificate_pem="", **link)  # type: ignore[arg-type]
    return Book(kek=None, services=(OWNER,), proxies={PROXY.id: PROXY}, links=(read,), sequences={OWNER: 7})


def receipt(sequence: int, *, keys: int) -> Receipt:
    return Receipt(
        owner=OWNER,
        proxy_id=PROXY.id,
        sequence=sequence,
        keys=keys,
        accepted=True,
        valid_until_ms=9000 if keys else None,
        at_ms=5000,
        error=None,
    )


@pytest.fixture
def targets() -> Targets:
    made = Targets(book(issued_sequence=7, issued_until_ms=9000))
    made.note_issued(
        [Reservation(owner=OWNER, sequence=7, links=(made.links[0],), keys=(), damaged=())],
        9000,
        until_boot_s=90.0,
    )
    return made


def test_a_reading_older_than_a_receipt_takes_nothing_back(targets: Targets) -> None:
    """A key that waits for its proxies would wait until the next refresh."""
    targets.note_receipts([receipt(7, keys=2)])
    known = targets.links[0]
    assert (known.accepted_sequence, known.valid_until_ms) == (7, 9000)
    targets.load(book(issued_sequence=7, issued_until_ms=9000, error="refused", error_at_ms=4000))
    assert targets.links[0] == known


def test_nor_a_withdrawal_that_is_known(targets: Targets) -> None:
    targets.note_receipts([receipt(7, keys=2)])
    targets.note_receipts([receipt(8, keys=0)])
    assert not targets.links[0].may_hold_keys(0, 0.0)
    targets.load(book(issued_sequence=7, issued_until_ms=9000, accepted_sequence=7, valid_until_ms=9000))
    link = targets.links[0]
    assert (link.withdrawn_sequence, link.valid_until_ms) == (8, None)
    assert not link.may_hold_keys(0, 0.0)


def test_what_the_registry_knows_better_counts(targets: Targets) -> None:
    targets.note_receipts([receipt(7, keys=2)])
    targets.load(
        book(
            issued_sequence=9,
            issued_until_ms=9900,
            accepted_sequence=9,
            accepted_at_ms=6000,
            valid_until_ms=9900,
            withdrawn=True,
        )
    )
    link = targets.links[0]
    assert (link.issued_sequence, link.accepted_sequence, link.valid_until_ms) == (9, 9, 9900)
    assert link.withdrawn
    assert link.issued_until_boot_s == 90.0, "the boot clock's is of this process alone"

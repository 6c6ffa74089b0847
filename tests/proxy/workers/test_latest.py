"""What a new worker is given."""

from collections.abc import Sequence

from proxy.keys.relay import Relayed
from proxy.workers.latest import MAX_ADDED, LatestEnvelopes


def relayed(*entries: tuple[str, str, bool], challenge: bytes = b"1") -> Relayed:
    tokens, services, replaces = zip(*entries, strict=True)
    return Relayed(
        tenant="acme",
        agent="hq",
        challenge=challenge,
        signing_certificate_der=None,
        tokens=tokens,
        services=services,
        replaces=replaces,
        is_challenged=True,
        takes_keys=True,
    )


def tokens(latest: LatestEnvelopes) -> list[str]:
    return [token for envelopes in latest for token in envelopes.tokens]


def keep(latest: LatestEnvelopes, envelopes: Relayed, codes: Sequence[str] | None = None) -> None:
    latest.keep(envelopes, codes if codes is not None else [""] * len(envelopes.tokens))


def test_what_replaces_is_kept_alone_and_what_adds_beside_it() -> None:
    latest = LatestEnvelopes()
    keep(latest, relayed(("a1", "acme/a", True), ("b1", "acme/b", True)))
    keep(latest, relayed(("a2", "acme/a", False), challenge=b"2"))
    assert tokens(latest) == ["a1", "a2", "b1"]
    assert [envelopes.challenge for envelopes in latest] == [b"1", b"2", b"1"]
    keep(latest, relayed(("a3", "acme/a", True)))
    assert tokens(latest) == ["a3", "b1"]
    latest.forget(["acme/a", "acme/unknown"])
    assert tokens(latest) == ["b1"]
    assert latest.services() == {"acme/b"}


def test_what_was_refused_is_not_in_force() -> None:
    latest = LatestEnvelopes()
    keep(latest, relayed(("a1", "acme/a", True), ("b1", "acme/b", True)), ["", "nonce"])
    keep(latest, relayed(("a2", "acme/a", True)), ["sequence"])
    assert tokens(latest) == ["a1"]


def test_additions_without_end_are_not_kept_and_that_is_known() -> None:
    latest = LatestEnvelopes()
    keep(latest, relayed(("first", "acme/a", True)))
    for number in range(MAX_ADDED):
        keep(latest, relayed((f"{number}", "acme/a", False)))
    assert len(tokens(latest)) == MAX_ADDED + 1
    complete = [latest.is_complete]
    keep(latest, relayed(("one too many", "acme/a", False)))
    assert tokens(latest) == []
    complete.append(latest.is_complete)
    keep(latest, relayed(("again", "acme/a", True)))
    assert [*complete, latest.is_complete] == [True, False, True]
    assert tokens(latest) == ["again"]

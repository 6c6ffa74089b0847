"""Credentials: who is let in, and that refusals take one path."""

import dataclasses
import hmac
from collections.abc import Callable
from typing import override

import pytest

from proxy.encryption_service.access import Access, Caller, SigV4Candidate
from proxy.encryption_service.call import Peer
from proxy.encryption_service.credentials import SecretSealer
from proxy.encryption_service.errors import AccessDenied, KeyNotFound, NotAuthenticated
from proxy.encryption_service.model import CredentialKind, DialectName, Op
from tests.proxy.encryption_service.service_rig import PEER, TENANT, ServiceRig

NATIVE, XKS = DialectName.NATIVE, DialectName.XKS


class CountingSealer(SecretSealer):
    """The real one, with a count of what costs time."""

    def __init__(self, rig: ServiceRig) -> None:
        super().__init__(rig.audit_file.parent)
        self.opened = self.pretended = 0

    @override
    def open(self, sealed: bytes, credential_id: str, tenant: str) -> bytes | None:
        self.opened += 1
        return super().open(sealed, credential_id, tenant)

    @override
    def pretend_to_open(self) -> None:
        self.pretended += 1
        super().pretend_to_open()


def with_last(token: str, character: str) -> str:
    return token[:-1] + (character if token[-1] != character else "B")


def test_a_token_lets_its_holder_in(rig: ServiceRig) -> None:
    rig.add_dialect(NATIVE)
    token = rig.add_bearer(endpoint="here")
    caller = rig.access.bearer(token, dialect=NATIVE, peer=PEER)
    assert caller == Caller(
        tenant=TENANT, dialect=NATIVE, name="tests", credential_id=token.split(".")[1], endpoint="here"
    )


def test_every_refusal_of_a_token_takes_the_same_path(rig: ServiceRig) -> None:
    """Same steps with arguments of the same sizes, whatever is wrong: counted, not timed."""
    for tenant in (TENANT, "globex"):
        rig.add_dialect(NATIVE, tenant=tenant)
    rig.add_dialect(DialectName.TRANSIT)
    rig.serve(dataclasses.replace(rig.add_dialect(NATIVE, tenant="off"), enabled=False))
    good = rig.add_bearer()
    access_key_id, _secret = rig.add_access_key("prefix")
    tokens = {
        "unknown id": f"sgt.{'a' * 24}.{'b' * 43}",
        "wrong secret": with_last(good, "A"),
        "cut": good[:-1],
        "longer": good + "A",
        "with a newline": good + "\n",
        "upper case id": f"sgt.{good.split('.')[1].upper()}.{good.split('.')[2]}",
        "no token": "",
        "other prefix": "x" + good,
        "id alone": good.split(".")[1],
        "four parts": good + ".x",
        "not even Unicode": good + "\udcff",
        "ended": rig.add_bearer(not_after_s=rig.clock.wall_s()),
        "other dialect": rig.add_bearer(DialectName.TRANSIT),
        "other network": rig.add_bearer(networks=("10.0.0.0/8", "2001:db8::/32")),
        "dialect switched off": rig.add_bearer(tenant="off"),
        "dialect never set up": rig.add_bearer(tenant="nobody"),
        "an access key": f"sgt.{access_key_id}.{'b' * 43}",
    }
    steps: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        steps.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    access = Access(lambda: rig.directory, rig.clock, rig.sealer, compare=compare)
    assert access.bearer(good, dialect=NATIVE, peer=PEER).tenant == TENANT
    texts = set()
    for what, token in tokens.items():
        with pytest.raises(NotAuthenticated) as caught:
            pytest.fail(f"let in: {what} {access.bearer(token, dialect=NATIVE, peer=PEER)}")
        texts.add(str(caught.value))
    assert texts == {"not authenticated"}
    assert steps == [(32, 32)] * (1 + len(tokens))


def test_a_credential_is_not_let_in_by_its_verifier(rig: ServiceRig) -> None:
    """Who has read the database has not read a token."""
    rig.add_dialect(NATIVE)
    name = rig.add_bearer().split(".")[1]
    verifier = rig.directory.credentials[name].verifier
    for token in (verifier.hex(), f"sgt.{name}.{verifier.hex()}", f"sgt.{name}."):
        with pytest.raises(NotAuthenticated):
            rig.access.bearer(token, dialect=NATIVE, peer=PEER)


@pytest.mark.parametrize(
    ("address", "is_near"),
    [
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("2001:db8::7", True),
        ("11.1.2.3", False),
        ("::ffff:11.1.2.3", False),
        ("2001:db9::7", False),
        ("", False),
        ("unix", False),
        ("10.1.2.3.4", False),
    ],
)
def test_source_networks(rig: ServiceRig, address: str, is_near: bool) -> None:
    rig.add_dialect(NATIVE)
    rig.add_dialect(XKS)
    networks = ("10.0.0.0/8", "2001:db8::/32")
    token = rig.add_bearer(networks=networks)
    access_key_id, _secret = rig.add_access_key("prefix", networks=networks)
    peer = Peer(address=address)

    def by_token() -> Caller:
        return rig.access.bearer(token, dialect=NATIVE, peer=peer)

    def by_key() -> Caller:
        candidate = rig.access.sigv4(access_key_id, dialect=XKS, endpoint="prefix", peer=peer)
        return candidate.admit(matches=True)

    for attempt in (by_token, by_key):
        if is_near:
            assert attempt().tenant == TENANT
        else:
            with pytest.raises(NotAuthenticated):
                attempt()


def test_a_secret_is_there_to_verify_with(rig: ServiceRig) -> None:
    rig.add_dialect(XKS)
    access_key_id, secret = rig.add_access_key("one/prefix")
    candidate = rig.access.sigv4(access_key_id, dialect=XKS, endpoint="one/prefix", peer=PEER)
    assert candidate.secret == secret.encode()
    assert candidate.admit(matches=True).endpoint == "one/prefix"
    with pytest.raises(NotAuthenticated):
        candidate.admit(matches=False)
    assert secret not in repr(candidate)


def test_every_refusal_of_an_access_key_takes_the_same_path(rig: ServiceRig) -> None:
    rig.add_dialect(XKS)
    rig.add_dialect(NATIVE)
    good, _secret = rig.add_access_key("prefix")
    ended, _secret = rig.add_access_key("prefix", not_after_s=rig.clock.wall_s())
    far, _secret = rig.add_access_key("prefix", networks=("10.0.0.0/8",))
    bearer = rig.add_bearer().split(".")[1]
    off, _secret = rig.add_access_key("prefix", tenant="nobody")
    broken, _secret = rig.add_access_key("prefix")
    entry = rig.directory.credentials[broken]
    rig.serve(dataclasses.replace(entry, verifier=entry.verifier[:-1] + bytes([entry.verifier[-1] ^ 1])))
    exchanged, _secret = rig.add_access_key("prefix")
    rig.serve(
        dataclasses.replace(
            rig.directory.credentials[exchanged], verifier=rig.directory.credentials[good].verifier
        )
    )
    sealer = CountingSealer(rig)
    access = Access(lambda: rig.directory, rig.clock, sealer)

    def candidate(name: str, endpoint: str = "prefix", dialect: DialectName = XKS) -> SigV4Candidate:
        return access.sigv4(name, dialect=dialect, endpoint=endpoint, peer=PEER)

    assert candidate(good).admit(matches=True).tenant == TENANT
    refused: dict[str, Callable[[], SigV4Candidate]] = {
        "unknown": lambda: candidate("SG" + "A" * 18),
        "empty": lambda: candidate(""),
        "ended": lambda: candidate(ended),
        "other network": lambda: candidate(far),
        "other prefix": lambda: candidate(good, "other"),
        "prefix above": lambda: candidate(good, "pre"),
        "other dialect": lambda: candidate(good, dialect=NATIVE),
        "a bearer id": lambda: candidate(bearer),
        "dialect never set up": lambda: candidate(off),
        "stored secret damaged": lambda: candidate(broken),
        "stored secret of another": lambda: candidate(exchanged),
    }
    for what, make in refused.items():
        made = make()
        assert len(made.secret) == 43, what
        with pytest.raises(NotAuthenticated):
            pytest.fail(f"let in: {what} {made.admit(matches=True)}")
    assert sealer.opened + sealer.pretended == 1 + len(refused), "each opens one secret, a real one or not"


def test_nobody_has_the_secret_of_unknown_ids(rig: ServiceRig) -> None:
    """A fresh one per process: knowing this one's would not help, and it is no constant of the program."""
    others = {
        Access(lambda: rig.directory, rig.clock, rig.sealer)
        .sigv4("unknown", dialect=XKS, endpoint="", peer=PEER)
        .secret
        for _ in range(3)
    }
    assert len(others) == 3


def test_two_credentials_live_side_by_side_and_one_is_revoked(rig: ServiceRig) -> None:
    rig.add_dialect(NATIVE)
    key = rig.add_key()
    old, new = rig.add_bearer(), rig.add_bearer()
    callers = [rig.access.bearer(token, dialect=NATIVE, peer=PEER) for token in (old, new)]
    rig.revoke(old.split(".")[1])
    with pytest.raises(NotAuthenticated):
        rig.access.bearer(old, dialect=NATIVE, peer=PEER)
    with pytest.raises(NotAuthenticated):  # authenticated before, and still refused
        rig.access.authorize(callers[0], key, Op.ENCRYPT)
    with pytest.raises(NotAuthenticated):
        rig.access.check_live(callers[0])
    rig.access.authorize(callers[1], key, Op.ENCRYPT)
    rig.access.check_live(callers[1])


def test_a_credential_is_for_its_keys_and_operations(rig: ServiceRig) -> None:
    rig.add_dialect(NATIVE)
    orders, invoices = rig.add_key("orders"), rig.add_key("invoices")
    token = rig.add_bearer(keys=frozenset({"orders"}), operations=frozenset({Op.DECRYPT}))
    caller = rig.access.bearer(token, dialect=NATIVE, peer=PEER)
    rig.access.authorize(caller, orders, Op.DECRYPT)
    for op in set(Op) - {Op.DECRYPT}:
        with pytest.raises(AccessDenied):
            rig.access.authorize(caller, orders, op)
    with pytest.raises(AccessDenied):
        rig.access.authorize(caller, invoices, Op.DECRYPT)
    with pytest.raises(KeyNotFound):
        rig.access.authorize(caller, rig.add_key("orders", tenant="globex"), Op.DECRYPT)


def test_callers_without_a_credential_are_the_kacls_alone(rig: ServiceRig) -> None:
    key = rig.add_key()
    by_tokens = Caller(tenant=TENANT, dialect=DialectName.KACLS, name="user@example.com")
    with pytest.raises(NotAuthenticated):  # not switched on
        rig.access.authorize(by_tokens, key, Op.ENCRYPT)
    rig.add_dialect(DialectName.KACLS)
    rig.access.authorize(by_tokens, key, Op.ENCRYPT)
    rig.add_dialect(NATIVE)
    with pytest.raises(NotAuthenticated):
        rig.access.authorize(dataclasses.replace(by_tokens, dialect=NATIVE), key, Op.ENCRYPT)


def test_a_credential_that_changed_its_tenant_is_not_the_callers(rig: ServiceRig) -> None:
    rig.add_dialect(NATIVE)
    token = rig.add_bearer()
    caller = rig.access.bearer(token, dialect=NATIVE, peer=PEER)
    entry = rig.directory.credentials[caller.credential_id or ""]
    rig.serve(dataclasses.replace(entry, tenant="globex"))
    with pytest.raises(NotAuthenticated):
        rig.access.authorize(caller, rig.add_key(), Op.ENCRYPT)


def test_a_bearer_entry_is_no_access_key_and_the_other_way_round(rig: ServiceRig) -> None:
    rig.add_dialect(NATIVE)
    token = rig.add_bearer()
    entry = rig.directory.credentials[token.split(".")[1]]
    rig.serve(dataclasses.replace(entry, kind=CredentialKind.SIGV4))
    with pytest.raises(NotAuthenticated):
        rig.access.bearer(token, dialect=NATIVE, peer=PEER)

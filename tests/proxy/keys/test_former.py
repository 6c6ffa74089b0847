"""Former certificates: kept until the agent has left them, and one validity more. Use: test_receive.py."""

import pytest

from envelope.certificates import fingerprint
from envelope.keys import NetworkService
from proxy.keys.former import FormerCertificates
from tests.fakes.clock import ManualClock
from tests.pki import ServiceCredential, Tenant, make_tenant

DRIVE, MAIL = NetworkService("acme", "drive"), NetworkService("acme", "mail")


@pytest.fixture(scope="module")
def acme() -> Tenant:
    return make_tenant("acme")


def keep(former: FormerCertificates, owner: NetworkService, credential: ServiceCredential) -> bytes:
    former.keep(owner, credential.certificate, credential.key)
    return fingerprint(credential.certificate)


def test_each_counts_until_it_is_superseded_and_one_validity_longer_for_withdrawals(acme: Tenant) -> None:
    clock = ManualClock()
    former = FormerCertificates(clock, validity_s=330)
    first = keep(former, DRIVE, acme.service("drive"))
    clock.shift(10_000)
    assert former.takes_keys(first)
    former.supersede(MAIL)
    assert former.takes_keys(first), "another service's"
    former.supersede(DRIVE)
    assert not former.takes_keys(first)
    clock.shift(100)
    second = keep(former, DRIVE, acme.service("drive"))
    former.supersede(DRIVE)
    clock.shift(229.9)
    assert former.find(first) is not None
    clock.shift(0.1)
    assert former.find(first) is None, "the second supersession did not prolong it"
    found = former.find(second)
    assert found is not None
    assert (found.owner, found.is_superseded) == (DRIVE, True)
    clock.shift(100)
    assert former.find(second) is None
    assert not former.takes_keys(second)


def test_one_that_was_never_left_ends_with_itself(acme: Tenant) -> None:
    clock = ManualClock()
    former = FormerCertificates(clock, validity_s=330)
    credential = acme.service("drive")
    name = keep(former, DRIVE, credential)
    end_s = credential.certificate.not_valid_after_utc.timestamp()
    clock.set_wall(end_s)
    assert former.takes_keys(name)
    clock.set_wall(end_s + 330)
    assert former.find(name) is not None
    assert not former.takes_keys(name)
    clock.set_wall(end_s + 331)
    assert former.find(name) is None


def test_a_service_is_forgotten_alone(acme: Tenant) -> None:
    former = FormerCertificates(ManualClock(), validity_s=330)
    drive = keep(former, DRIVE, acme.service("drive"))
    mail = keep(former, MAIL, acme.service("mail"))
    former.forget(DRIVE)
    assert former.find(drive) is None
    assert former.find(mail) is not None


def test_the_private_key_is_not_shown(acme: Tenant) -> None:
    former = FormerCertificates(ManualClock(), validity_s=330)
    found = former.find(keep(former, DRIVE, acme.service("drive")))
    assert "key=" not in repr(found)

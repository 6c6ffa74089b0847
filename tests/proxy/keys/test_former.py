"""Former certificates: kept for one validity, forgotten with their service. Their use: test_receive.py."""

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


def test_each_is_kept_for_one_validity_from_its_own_renewal(acme: Tenant) -> None:
    clock = ManualClock()
    former = FormerCertificates(clock, validity_s=330)
    first = keep(former, DRIVE, acme.service("drive"))
    clock.shift(100)
    second = keep(former, DRIVE, acme.service("drive"))
    clock.shift(229.9)
    assert former.find(first) is not None
    clock.shift(0.1)
    assert former.find(first) is None
    found = former.find(second)
    assert found is not None
    assert found.owner == DRIVE
    clock.shift(100)
    assert former.find(second) is None


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

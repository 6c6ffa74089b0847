"""Certificates that end, are renewed or are revoked while the agent runs."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from certs import pki
from envelope.certificates import CertificateError, fingerprint
from envelope.keys import NetworkService
from envelope.material import Signer
from key_agent import metrics
from key_agent.command_line.status_cli import status_text
from key_agent.lifetimes import Credentials, Lifetime, Signing
from key_agent.push.revocations import Revocations
from tests.fakes.clock import ManualClock
from tests.key_agent.conftest import AGENT_ID, Bench, until
from tests.key_agent.push.revocation_lists import LAST_UPDATE, make_list, write_lists

S3 = NetworkService("acme", "s3")


def _now(bench: Bench) -> datetime:
    return datetime.fromtimestamp(bench.clock.wall_s(), UTC)


def _days(kind: str) -> float:
    return float(metrics.CERTIFICATE_DAYS_LEFT.labels(kind)._value.get())


def test_what_is_worth_telling() -> None:
    now_s = ManualClock().wall_s()

    def lifetime(days: float, problem: str | None = None) -> Lifetime:
        end = datetime.fromtimestamp(now_s, UTC) + timedelta(days=days)
        return Lifetime(kind="service", name="x", not_after=end, problem=problem)

    assert not lifetime(31).is_worth_telling(now_s)
    assert lifetime(29).is_worth_telling(now_s)
    assert lifetime(-1).is_worth_telling(now_s)
    assert lifetime(1000, "revoked").is_worth_telling(now_s)
    assert Lifetime(kind="service", name="x", not_after=None).is_worth_telling(now_s)


async def test_ends_are_told_a_month_ahead(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        assert (await operations.status())["ending"] == []
        await agent.lifetimes.look()
        assert _days("service") > 365
        end = bench.proxy().services[S3].certificate.not_valid_after_utc
        bench.clock.set_wall((end - timedelta(days=10)).timestamp())
        await agent.lifetimes.look()
        ending: Any = (await operations.status())["ending"]
        assert {"root", "signing", "service", "proxy-authority"} <= {row["kind"] for row in ending}
        [row] = [row for row in ending if row["kind"] == "service"]
        assert (row["name"], row["days_left"], row["problem"]) == ("acme/s3 at p1", 10.0, None)
        text = status_text(await operations.status())
        assert f"certificate: service acme/s3 at p1: ends {end.date()}, in 10 days" in text
        assert 9 < _days("service") < 11
        bench.clock.set_wall((end + timedelta(days=1)).timestamp())
        await agent.lifetimes.look()
        assert _days("service") == -1
        assert "certificate-expired" in status_text(await operations.status())


async def test_the_end_of_a_kek_is_told_and_a_rotation_moves_it(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await operations.kek_create(valid_days=20)
        await agent.lifetimes.look()
        [row] = _rows((await operations.status())["ending"])
        assert (row["kind"], row["days_left"]) == ("kek", 20.0)
        assert 19 < _days("kek") < 21
        await operations.kek_rotate(valid_days=400)
        assert (await operations.status())["ending"] == []


async def test_a_revoked_certificate_is_withdrawn_at_once_and_another_one_brings_the_service_back(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "revoked.crl"
    root = bench.tenant.root
    write_lists(path, make_list(root, last_update=LAST_UPDATE))
    bench.clock.set_wall((LAST_UPDATE + timedelta(days=1)).timestamp())
    bench.revocations = Revocations(path, root.certificate)
    async with bench.agent() as (_, operations):
        await bench.provision(operations, proxy="p1")
        await bench.provision(operations, proxy="p2")
        bad = bench.proxy("p1").services[S3].certificate
        write_lists(path, make_list(root, [bad], last_update=LAST_UPDATE + timedelta(hours=1)))
        await bench.clock.advance(30)
        await until(lambda: not bench.proxy("p1").valid_keys(S3))
        assert bench.proxy("p1").accepted[-1].keys == (), "by a signed withdrawal"
        assert bench.proxy("p2").valid_keys(S3), "the other proxy has another certificate"
        with pytest.raises(CertificateError, match="was revoked"):
            await operations.service_add(
                service="s3", proxy="p1", certificate_pem=pki.certificate_pem(bad).decode()
            )
        await operations.service_add(service="s3", proxy="p1", certificate_pem=bench.host("s3", "p1"))
        assert bench.proxy("p1").valid_keys(S3)
    assert '"certificate-revoked"' in bench.audit()


async def test_without_a_list_in_date_no_keys_leave_and_nothing_is_withdrawn(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "revoked.crl"
    root = bench.tenant.root
    now = _now(bench)
    write_lists(path, make_list(root, last_update=now, days=1))
    bench.revocations = Revocations(path, root.certificate)
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        bench.clock.set_wall((now + timedelta(days=1, seconds=1)).timestamp())
        accepted = len(bench.proxy().accepted)
        agent.refresh.at_once()
        await until(lambda: agent.deliveries["p1"].code == "certificate-revocation-list")
        await agent.lifetimes.look()
        assert len(bench.proxy().accepted) == accepted
        ending: Any = (await operations.status())["ending"]
        assert {row["kind"] for row in ending if row["problem"]} >= {"service"}
        write_lists(path, make_list(root, last_update=now + timedelta(days=1), days=1))
        await agent.lifetimes.look()
        agent.refresh.at_once()
        await until(lambda: len(bench.proxy().accepted) > accepted)


async def test_a_renewed_signing_certificate_is_used_without_a_restart(bench: Bench) -> None:
    """For keys by the source, which reads its files at each batch; for withdrawals by the agent."""
    new = bench.tenant.agent_signing(AGENT_ID)
    tls = bench.tenant.agent_tls(AGENT_ID)
    found = Credentials(signing=bench.signing, tls=tls.certificate)
    bench.load_credentials = lambda _now_s: found
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        found = replace(found, signing=Signing(key=new.key, certificate=new.certificate))
        await bench.clock.advance(30)
        await until(lambda: agent.signing.certificate == new.certificate)
        # The proxy believes the new one alone.
        bench.proxy().signers = {fingerprint(new.certificate): Signer(new.certificate, AGENT_ID)}
        await operations.kek_revoke()
        assert not bench.proxy().valid_keys(S3)
        assert bench.proxy().accepted[-1].keys == ()
    assert '"signing-certificate"' in bench.audit()


async def test_own_files_that_are_no_good_are_said_and_the_old_ones_go_on(bench: Bench) -> None:
    tls = bench.tenant.agent_tls(AGENT_ID)

    def broken(_now_s: float) -> Credentials:
        raise CertificateError("expired", "the new one has expired already")

    good = Credentials(signing=bench.signing, tls=tls.certificate)
    bench.load_credentials = lambda _now_s: good
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        agent.lifetimes._load = broken
        await agent.lifetimes.look()
        assert agent.signing is bench.signing
        [row] = [row for row in _rows((await operations.status())["ending"]) if row["kind"] == "signing"]
        assert "expired already" in row["problem"]
        agent.lifetimes._load = bench.load_credentials
        await agent.lifetimes.look()
        assert (await operations.status())["ending"] == []


def _rows(found: Any) -> list[Any]:
    return list(found)

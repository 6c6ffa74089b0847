"""Rotation in two phases: by command and by age, with proxies that are late, dead or restarted."""

from dataclasses import replace
from typing import Any

import pytest

from envelope.keys import KeyId, KeyState, KeyUse, NetworkService
from key_agent.command_line.status_cli import status_text
from key_agent.operations.operations import Operations
from key_agent.registry.model import Link, Rotation, RotationCause
from key_agent.registry.states import RotationPhase
from key_agent.registry.store import RefusedChangeError
from key_agent.rotation import Step, decide
from key_agent.sources.source import Verdict
from runtime.audit import AuditUnavailableError
from tests.fakes.proxies import FakeProxy
from tests.key_agent.conftest import RHYTHM, Bench, until

S3, BOX = NetworkService("acme", "s3"), NetworkService("acme", "box")
DAY_S = 86_400


def _rotation(phase: RotationPhase = RotationPhase.DISTRIBUTING) -> Rotation:
    return Rotation(
        id="r1",
        owner=S3,
        use=KeyUse.DATA,
        new_key=KeyId.random(),
        old_key=None,
        phase=phase,
        cause=RotationCause.COMMAND,
        after_sequence=100,
        begun_at_ms=0,
        since_ms=0,
        until_ms=1000,
        late=(),
    )


def _link(proxy_id: str, accepted: int) -> Link:
    return Link(owner=S3, proxy_id=proxy_id, certificate_pem="", accepted_sequence=accepted)


@pytest.mark.parametrize(
    ("accepted", "left_s", "step", "waiting"),
    [
        ((101, 102), 1.0, Step.ACTIVATE, ()),
        ((101, 100), 0.001, Step.WAIT, ("p1",)),
        ((101, 100), 0.0, Step.ACTIVATE, ("p1",)),
        ((0, 0), 1.0, Step.WAIT, ("p0", "p1")),
        ((), 1.0, Step.ACTIVATE, ()),
    ],
)
def test_everybody_or_the_time_decides(
    accepted: tuple[int, ...], left_s: float, step: Step, waiting: tuple[str, ...]
) -> None:
    links = [_link(f"p{number}", sequence) for number, sequence in enumerate(accepted)]
    found = decide(_rotation(), links, left_s=left_s)
    assert (found.step, found.waiting_for) == (step, waiting)
    second = decide(_rotation(RotationPhase.ACTIVATED), links, left_s=left_s)
    assert second.step is (Step.FINISH if step is Step.ACTIVATE else Step.WAIT)


def _states(proxy: FakeProxy) -> list[dict[str, KeyState]]:
    """What each push that was accepted said of the keys of s3."""
    return [{str(key.key_id): key.state for key in c.keys} for c in proxy.accepted if c.owner == S3]


async def _two_proxies(bench: Bench, operations: Operations) -> str:
    await bench.provision(operations, proxy="p1")
    await bench.provision(operations, proxy="p2")
    [old] = bench.proxy("p1").valid_keys(S3)
    return old


async def _rotations(operations: Operations) -> list[Any]:
    rows: Any = (await operations.status())["rotations"]
    return list(rows)


async def test_no_proxy_seals_with_a_key_that_another_one_does_not_know(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old = await _two_proxies(bench, operations)
        before = {name: len(_states(bench.proxy(name))) for name in ("p1", "p2")}
        result = await operations.rotate(service="s3")
        [row] = _rows(result["rotations"])
        new = row["new_kid"]
        assert (row["phase"], row["old_kid"], row["late"]) == (RotationPhase.DONE, old, [])
        for name in ("p1", "p2"):
            assert _states(bench.proxy(name))[before[name] :] == [
                {old: KeyState.ACTIVE, new: KeyState.PRE_ACTIVE},
                {old: KeyState.DEACTIVATED, new: KeyState.ACTIVE},
            ]
        assert await agent.registry.open_rotations() == []
        assert await _rotations(operations) == []


async def test_it_waits_for_a_dead_proxy_names_it_and_goes_on_without_it(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old = await _two_proxies(bench, operations)
        dead = bench.proxy("p2")
        dead.down = True
        [row] = _rows((await operations.rotate(service="s3"))["rotations"])
        assert (row["phase"], row["waiting_for"]) == (RotationPhase.DISTRIBUTING, ["p2"])
        assert "waits for p2" in status_text(await operations.status())
        with pytest.raises(RefusedChangeError, match="under way"):
            await operations.rotate(service="s3")
        # One refresh passes, then the second: whatever p2 held has ended by then.
        await bench.clock.advance(RHYTHM.interval_s)
        assert _states(bench.proxy("p1"))[-1][old] is KeyState.ACTIVE
        assert not dead.valid_keys(S3) or bench.clock.boot_s() < dead.held[S3].deadline_s
        await bench.clock.advance(RHYTHM.interval_s + 1)
        await until(lambda: _states(bench.proxy("p1"))[-1][old] is KeyState.DEACTIVATED)
        assert not dead.valid_keys(S3), "it can neither seal nor open: it is not left behind with old keys"
        [row] = await _rotations(operations)
        assert (row["phase"], row["late"]) == (RotationPhase.ACTIVATED, ["p2"])
        dead.down = False
        agent.refresh.at_once()
        await until(lambda: len(dead.valid_keys(S3)) == 2)
        await until(lambda: not agent.rotations.waiting_for(()) and '"done"' in bench.audit())
    assert bench.audit().count('"late":"p2"') >= 1


async def test_a_phase_that_runs_out_while_it_is_looked_at_waits_for_no_other_look(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old = await _two_proxies(bench, operations)
        bench.proxy("p2").down = True
        await operations.rotate(service="s3")
        [rotation] = await agent.registry.open_rotations()
        ask = agent.registry.due_rings

        async def slow(*arguments: Any, **more: Any) -> Any:
            """The registry answers a second after the end of the phase; the look has found it waiting."""
            agent.registry.due_rings = ask  # type: ignore[method-assign]
            bench.clock.shift(2)
            return await ask(*arguments, **more)

        await bench.clock.advance(rotation.until_ms / 1000 - bench.clock.wall_s() - 1)
        agent.registry.due_rings = slow  # type: ignore[method-assign]
        agent.rotations.look_soon()
        await until(lambda: agent.registry.due_rings == ask)
        await until(lambda: _states(bench.proxy("p1"))[-1][old] is KeyState.DEACTIVATED)


@pytest.mark.parametrize("by_s", [3600, -3600])
async def test_a_wall_clock_that_is_set_makes_no_window_and_holds_nothing_up(bench: Bench, by_s: int) -> None:
    async with bench.agent() as (agent, operations):
        old = await _two_proxies(bench, operations)
        dead = bench.proxy("p2")
        dead.down = True
        await operations.rotate(service="s3")
        bench.clock.set_wall(bench.clock.wall_s() + by_s)
        agent.rotations.wake()
        await bench.clock.advance(RHYTHM.validity_s - 20)
        assert old in dead.valid_keys(S3), "it could not open what the new key sealed"
        assert _states(bench.proxy("p1"))[-1][old] is KeyState.ACTIVE
        await bench.clock.advance(2 * RHYTHM.interval_s - RHYTHM.validity_s + 21)
        await until(lambda: _states(bench.proxy("p1"))[-1][old] is KeyState.DEACTIVATED)
        assert not dead.valid_keys(S3)


async def test_a_proxy_that_comes_back_in_time_ends_the_wait(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old = await _two_proxies(bench, operations)
        bench.proxy("p2").down = True
        await operations.rotate(service="s3")
        bench.proxy("p2").down = False
        await bench.clock.advance(5)
        agent.refresh.at_once(["p2"])
        await until(lambda: _states(bench.proxy("p2"))[-1][old] is KeyState.DEACTIVATED)


@pytest.mark.parametrize("waits", [1, 2])
async def test_it_goes_on_in_the_agents_next_life(bench: Bench, waits: int) -> None:
    async with bench.agent() as (_, operations):
        old = await _two_proxies(bench, operations)
    async with bench.agent(working=False) as (_, operations):
        result = await operations.rotate(service="s3")
        assert (result["running"], result["proxies"]) == (False, [])
        assert [row["phase"] for row in _rows(result["rotations"])] == [RotationPhase.DISTRIBUTING]
    for _ in range(waits):
        async with bench.agent() as (_, operations):
            await until(lambda: _states(bench.proxy("p2"))[-1][old] is KeyState.DEACTIVATED)
            await until(lambda: _states(bench.proxy("p1"))[-1][old] is KeyState.DEACTIVATED)


async def test_cancelled_before_it_seals_and_refused_after(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        old = await _two_proxies(bench, operations)
        bench.proxy("p2").down = True
        await operations.rotate(service="s3")
        assert len(bench.proxy("p1").valid_keys(S3)) == 2
        await operations.rotate_cancel(service="s3")
        assert bench.proxy("p1").valid_keys(S3) == [old]
        with pytest.raises(RefusedChangeError, match="does not run"):
            await operations.rotate_cancel(service="s3")
        bench.proxy("p2").down = False
        await operations.rotate(service="s3")
        assert _states(bench.proxy("p1"))[-1][old] is KeyState.DEACTIVATED


async def test_by_age_without_anybody_asking(bench: Bench) -> None:
    rhythm = replace(RHYTHM, rotate_after_days=2, watch_s=300, presence_s=300)
    async with bench.agent(rhythm=rhythm) as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        await operations.service_set(service="box", rotate_after_days=0)
        [old] = bench.proxy().valid_keys(S3)
        await bench.clock.advance(2 * DAY_S - 120)
        agent.refresh.at_once()
        await until(lambda: bench.proxy().valid_keys(S3))
        assert bench.proxy().valid_keys(S3) == [old]
        await bench.clock.advance(120)
        for _ in range(10):  # looks; the registry's thread is not under the clock, so one may be late
            await bench.clock.advance(60)
            if _states(bench.proxy())[-1].get(old) is KeyState.DEACTIVATED:
                break
        await until(lambda: _states(bench.proxy())[-1].get(old) is KeyState.DEACTIVATED)
        [rotation] = await agent.registry.rotations()
        assert (rotation.cause, rotation.owner) == (RotationCause.SCHEDULE, S3)
        assert len(bench.proxy().valid_keys(BOX)) == 1, "0 days: never"


async def test_all_services_and_both_uses(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations, "s3")
        await bench.provision(operations, "box")
        certificate = bench.host("s3")
        await operations.service_add(
            service="s3", proxy="p1", certificate_pem=certificate, use="sign", algorithm="ES256"
        )
        result = await operations.rotate(everything=True)
        found = sorted((row["service"], row["use"], row["phase"]) for row in _rows(result["rotations"]))
        assert found == [
            ("acme/box", "data", "done"),
            ("acme/s3", "data", "done"),
            ("acme/s3", "sign", "done"),
        ]
        await operations.rotate(service="s3", use="sign")
        keys = [key for key in await agent.registry.data_keys() if key.owner == S3]
        assert max((key.use, key.version, key.state) for key in keys) == ("sign", 3, "active")
        for wrong in ({}, {"service": "s3", "everything": True}, {"service": "none"}):
            with pytest.raises(RefusedChangeError):
                await operations.rotate(**wrong)


async def test_a_key_that_does_not_open_is_not_activated(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        old = await _two_proxies(bench, operations)
        bench.proxy("p2").down = True
        [row] = _rows((await operations.rotate(service="s3"))["rotations"])
        bench.source.spoil(KeyId.parse(row["new_kid"]))
        bench.proxy("p2").down = False
        agent.refresh.at_once()
        await until(lambda: agent.rotations.problems)
        [row] = await _rotations(operations)
        assert row["problem"] == "does not open"
        assert "does not open" in status_text(await operations.status())
        assert _states(bench.proxy("p1"))[-1][old] is KeyState.ACTIVE
        bench.source.unspoil(KeyId.parse(row["new_kid"]))
        pushes = len(_states(bench.proxy("p1")))
        agent.refresh.at_once()
        await until(lambda: _states(bench.proxy("p1"))[-1][old] is KeyState.DEACTIVATED)
        assert _states(bench.proxy("p1"))[pushes] == {
            old: KeyState.ACTIVE,
            row["new_kid"]: KeyState.PRE_ACTIVE,
        }
        assert not agent.rotations.problems


async def test_a_push_that_left_the_new_key_out_does_not_count_though_it_opens_now(bench: Bench) -> None:
    """An HSM or key server with a hiccup, or one that lies: it fails for one push only."""
    async with bench.agent() as (agent, operations):
        old = await _two_proxies(bench, operations)
        bench.proxy("p2").down = True
        [row] = _rows((await operations.rotate(service="s3"))["rotations"])
        new = row["new_kid"]
        bench.source.spoil(KeyId.parse(new))
        before = len(_states(bench.proxy("p2")))
        seals = 0

        def one_push_fails(call: str) -> None:
            nonlocal seals
            seals += call == "seal_envelopes"
            if seals > 1:
                bench.source.unspoil(KeyId.parse(new))

        bench.source.on_call = one_push_fails
        bench.proxy("p2").down = False
        agent.refresh.at_once(["p2"])
        await until(
            lambda: agent.rotations.problems or _states(bench.proxy("p1"))[-1][new] is KeyState.ACTIVE
        )
        assert _states(bench.proxy("p2"))[before:] == [{old: KeyState.ACTIVE}], "acknowledged without it"
        assert _states(bench.proxy("p1"))[-1][new] is KeyState.PRE_ACTIVE, "p2 could not open what it sealed"
        agent.refresh.at_once()
        await until(lambda: _states(bench.proxy("p2"))[-1].get(new) is KeyState.ACTIVE)
        assert _states(bench.proxy("p2"))[before + 1][new] is KeyState.PRE_ACTIVE
        assert not agent.rotations.problems


async def test_without_consent_nothing_rotates(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await _two_proxies(bench, operations)
        bench.proxy("p2").down = True
        await operations.rotate(service="s3")
        bench.source.fail(Verdict.UNREACHABLE)
        await bench.clock.advance(5)
        bench.proxy("p2").down = False
        await bench.clock.advance(3 * RHYTHM.interval_s)
        [rotation] = await agent.registry.open_rotations()
        assert rotation.phase is RotationPhase.DISTRIBUTING
        bench.source.recover()
        await bench.clock.advance(5)
        await until(lambda: len(bench.proxy("p2").valid_keys(S3)) == 2)
        await until(lambda: '"done"' in bench.audit())
        assert '"late":"p2"' not in bench.audit(), "the time of the outage does not count"
        await operations.kek_revoke()
        with pytest.raises(RefusedChangeError, match="is destroyed"):
            await operations.rotate(service="s3")


async def test_without_an_audit_log_nothing_rotates(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await _two_proxies(bench, operations)
        (bench.directory / "audit.jsonl").unlink()
        with pytest.raises(AuditUnavailableError):
            await operations.rotate(service="s3")
        assert len(await agent.registry.data_keys()) == 1


async def test_after_reinstate_no_proxy_seals_before_all_that_answer_know_the_new_key(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await _two_proxies(bench, operations)
        await operations.kek_revoke()
        await operations.reinstate()
        for name in ("p1", "p2"):
            *_, first, second = _states(bench.proxy(name))
            assert list(first.values()) == [KeyState.PRE_ACTIVE]
            assert list(second.values()) == [KeyState.ACTIVE]


async def test_after_reinstate_a_dead_proxy_keeps_nobody_from_sealing_for_long(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await _two_proxies(bench, operations)
        await operations.kek_revoke()
        bench.proxy("p2").down = True
        await operations.reinstate()
        assert list(_states(bench.proxy("p1"))[-1].values()) == [KeyState.PRE_ACTIVE]
        await bench.clock.advance(16)
        await until(lambda: list(_states(bench.proxy("p1"))[-1].values()) == [KeyState.ACTIVE])


def _rows(found: Any) -> list[Any]:
    return list(found)

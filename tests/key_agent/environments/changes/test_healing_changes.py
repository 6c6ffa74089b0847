"""The one road back demands what it says at each step; rescue and retirement take two persons and no less."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from envelope.keys import KeyState, KeyUse
from key_agent.environments.breaches import Declaration, IncidentKind, IncidentState
from key_agent.environments.changes import healing_changes as healing
from key_agent.environments.changes import incident_changes as changes
from key_agent.environments.changes.healing_changes import KekAnnouncement, kek_fingerprint
from key_agent.environments.changes.incident_changes import Opening
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.registry_key import public_text
from key_agent.environments.states import EnvironmentState
from key_agent.registry.access import RefusedChangeError
from tests.key_agent.environments.rows import NOW_MS, TENANT, World

E, K, S = EnvironmentState, IncidentKind, KeyState


@pytest.fixture
def world() -> World:
    return World()


def breach(world: World, kind: IncidentKind = K.RUNTIME) -> str:
    opening = Opening(
        declared=Declaration(kind=kind, environment="a"),
        reason="IR",
        since_ms=NOW_MS,
        opened_by="ada",
        idempotency_key=f"k{len(world.rows.incidents)}",
    )
    found, _ = world.change(
        lambda draft: changes.open_incident(
            draft, opening, exposed=frozenset(world.rows.deks), now_ms=world.now_ms
        )
    )
    world.now_ms += 1000
    return found


def rekey(world: World, incident: str = "inc-1") -> None:
    for key_id in changes.without_successor(world.rows, incident):
        dek = world.rows.deks[key_id]
        world.add_key(dek.service.removeprefix("acme/"), dek.owner_environment, S.ACTIVE)
    world.change(lambda draft: changes.succeed(draft, incident, now_ms=world.now_ms))


def announce(world: World, kek_id: str = "kek-a2") -> KekAnnouncement:
    told = KekAnnouncement(
        environment="a", kek_id=kek_id, kek=world.kek("a", created_at_ms=world.now_ms, version=2)
    )
    world.change(lambda draft: healing.take_kek(draft, told, tenant=TENANT, now_ms=world.now_ms))
    return told


def complete(world: World, *, fingerprint: str | None = None, new_certificates: bool = True) -> bool:
    return world.change(
        lambda draft: healing.heal_complete(
            draft,
            "a",
            attestation="CHG-88",
            new_certificates=new_certificates,
            fingerprint=fingerprint,
            now_ms=world.now_ms,
        )
    )


def fingerprint(told: KekAnnouncement) -> str:
    return kek_fingerprint(told.kek_id, told.kek)


def admit(world: World, *balancers: str) -> bool:
    return world.change(
        lambda draft: healing.admit(draft, "a", load_balancers=balancers, now_ms=world.now_ms)
    )


def state(world: World) -> EnvironmentState:
    found: EnvironmentState = world.rows.environments["a"].state
    return found


def incident(world: World, name: str = "inc-1") -> IncidentState:
    found: IncidentState = world.rows.incidents[name].state
    return found


def test_the_whole_road_each_step_once_and_each_repeated(world: World) -> None:
    breach(world)
    rekey(world)
    told = announce(world)
    deks = world.rows.deks
    assert complete(world, fingerprint=fingerprint(told))
    assert (state(world), world.rows.incidents["inc-1"].new_kek_id) == (E.HEALED, "kek-a2")
    assert complete(world, fingerprint=fingerprint(told)) is False
    assert admit(world, "lb-1")
    assert (state(world), incident(world)) == (E.REJOINING, IncidentState.REJOINING)
    assert admit(world, "lb-1") is False
    epoch = world.rows.epoch
    assert world.change(lambda draft: healing.readmit(draft, "a", now_ms=world.now_ms))
    assert (state(world), incident(world)) == (E.ACTIVE, IncidentState.REENCRYPTING)
    assert world.rows.epoch == epoch + 1
    assert world.rows.environments["a"].incident_id is None
    assert world.change(lambda draft: healing.readmit(draft, "a", now_ms=world.now_ms)) is False
    assert world.rows.deks == deks, "the road touches no key"
    assert world.change(lambda draft: changes.close(draft, "inc-1", now_ms=world.now_ms))


def test_a_breach_after_its_return_is_another_one_though_the_first_is_not_closed(world: World) -> None:
    """Objects are still written anew for the first, for weeks maybe."""
    breach(world)
    rekey(world)
    told = announce(world)
    complete(world, fingerprint=fingerprint(told))
    admit(world, "lb-1")
    world.change(lambda draft: healing.readmit(draft, "a", now_ms=world.now_ms))
    assert state(world) is E.ACTIVE
    assert breach(world) == "inc-2"
    assert (state(world), world.rows.environments["a"].incident_id) == (E.HEALING, "inc-2")
    assert (incident(world), incident(world, "inc-2")) == (IncidentState.REENCRYPTING, IncidentState.OPEN)
    # Its way back is no longer because of the first, and changes nothing of it.
    first = world.rows.incidents["inc-1"]
    with pytest.raises(RefusedChangeError, match="inc-2"):
        complete(world, fingerprint=fingerprint(told))
    complete(world, fingerprint=fingerprint(announce(world, "kek-a3")))
    with pytest.raises(RefusedChangeError, match="inc-2 is open"):
        admit(world, "lb-1")
    rekey(world, "inc-2")
    admit(world, "lb-1")
    world.change(lambda draft: healing.readmit(draft, "a", now_ms=world.now_ms))
    assert (state(world), incident(world, "inc-2")) == (E.ACTIVE, IncidentState.REENCRYPTING)
    assert world.rows.incidents["inc-1"] == first
    assert world.change(lambda draft: changes.close(draft, "inc-1", now_ms=world.now_ms))
    assert world.change(lambda draft: changes.close(draft, "inc-2", now_ms=world.now_ms))


def test_a_suspicion_that_was_none_returns_by_the_same_road(world: World) -> None:
    breach(world, K.SUSPECTED)
    complete(world)
    with pytest.raises(RefusedChangeError, match="nobody has decided"):
        admit(world, "lb-1")
    approval = world.approve(Action.INCIDENT_CANCEL, "inc-1", {})
    world.change(
        lambda draft: changes.cancel(draft, "inc-1", tenant=TENANT, approval_id=approval, now_ms=world.now_ms)
    )
    assert complete(world, new_certificates=False) is False
    admit(world, "lb-1")
    world.change(lambda draft: healing.readmit(draft, "a", now_ms=world.now_ms))
    assert (state(world), incident(world)) == (E.ACTIVE, IncidentState.FALSE_ALARM)


@pytest.mark.parametrize("kind", [K.RUNTIME, K.KEK])
def test_what_was_exposed_has_to_be_new(world: World, kind: IncidentKind) -> None:
    breach(world, kind)
    with pytest.raises(RefusedChangeError, match="not newer"):
        complete(world)
    told = announce(world)
    with pytest.raises(RefusedChangeError, match="certificates"):
        complete(world, fingerprint=fingerprint(told), new_certificates=False)
    with pytest.raises(RefusedChangeError, match="compared"):
        complete(world)
    with pytest.raises(RefusedChangeError, match="another fingerprint"):
        complete(world, fingerprint=fingerprint(told)[:-1] + "z")
    assert state(world) is E.HEALING
    assert complete(world, fingerprint=fingerprint(told))
    assert world.rows.keks["kek-a"].state == changes.KEK_COMPROMISED


def rotated(
    world: World, key: Ed25519PrivateKey, kek_id: str = "kek-a2", tenant: str = TENANT
) -> KekAnnouncement:
    told = KekAnnouncement(
        environment="a", kek_id=kek_id, kek=world.kek("a", created_at_ms=world.now_ms, version=2)
    )
    return msgspec.structs.replace(told, signature=key.sign(told.signed_bytes(tenant)).hex())


def take(world: World, told: KekAnnouncement) -> bool:
    return world.change(lambda draft: healing.take_kek(draft, told, tenant=TENANT, now_ms=world.now_ms))


def set_a(world: World, **changes: Any) -> None:
    world.rows.environments["a"] = msgspec.structs.replace(world.rows.environments["a"], **changes)


@pytest.mark.parametrize("sound", [E.JOINING, E.ACTIVE, E.DRAINING])
def test_a_kek_that_a_sound_environment_rotated_to_is_followed(world: World, sound: EnvironmentState) -> None:
    key = Ed25519PrivateKey.generate()
    set_a(world, registry_key=public_text(key), state=sound)
    told = rotated(world, key)
    assert take(world, told)
    body = world.rows.environments["a"]
    assert (body.kek_id, body.kms_type, body.state) == ("kek-a2", told.kek.method, sound)
    assert (world.rows.keks["kek-a"].state, world.rows.keks["kek-a2"]) == ("deactivated", told.kek)
    assert take(world, told) is False
    world.now_ms += 1
    assert take(world, rotated(world, key, "kek-a3"))
    with pytest.raises(RefusedChangeError, match="an old one"):
        take(world, told)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda told, key: msgspec.structs.replace(told, signature=""),
        lambda told, key: msgspec.structs.replace(told, signature="zz"),
        lambda told, key: msgspec.structs.replace(told, kek_id="kek-a3"),
        lambda told, key: msgspec.structs.replace(
            told, kek=msgspec.structs.replace(told.kek, public_key="another")
        ),
        lambda told, key: msgspec.structs.replace(told, signature=key.sign(told.signed_bytes("other")).hex()),
        lambda told, key: msgspec.structs.replace(
            told, signature=Ed25519PrivateKey.generate().sign(told.signed_bytes(TENANT)).hex()
        ),
    ],
    ids=["unsigned", "no-hex", "another-id", "another-key", "another-tenant", "another-signer"],
)
def test_a_kek_that_its_environment_has_not_signed_is_not(
    world: World, spoil: Callable[[KekAnnouncement, Ed25519PrivateKey], KekAnnouncement]
) -> None:
    """Whoever has an agent's TLS certificate alone would else be sent every key."""
    key = Ed25519PrivateKey.generate()
    set_a(world, registry_key=public_text(key))
    before = world.rows
    with pytest.raises(RefusedChangeError, match="nobody whom the rows name"):
        take(world, spoil(rotated(world, key), key))
    assert world.rows == before


@pytest.mark.parametrize(
    "changes",
    [{"state": E.HEALED}, {"state": E.REJOINING}, {"state": E.RETIRED}, {"registry_key_exposed": True}],
    ids=["healed", "rejoining", "retired", "exposed"],
)
def test_a_signature_is_not_enough_of_whom_nobody_trusts(world: World, changes: dict[str, Any]) -> None:
    """On its way back an environment has the KEK that an administrator has compared, and no other one."""
    key = Ed25519PrivateKey.generate()
    set_a(world, registry_key=public_text(key), **changes)
    with pytest.raises(RefusedChangeError):
        take(world, rotated(world, key))


@pytest.mark.parametrize("is_healing", [False, True])
def test_a_new_kek_ends_those_of_its_own_environment_and_nothing_else(world: World, is_healing: bool) -> None:
    key = Ed25519PrivateKey.generate()
    set_a(world, registry_key=public_text(key))
    lost = msgspec.structs.replace(
        world.kek("a", created_at_ms=0), state=changes.KEK_COMPROMISED, since_ms=NOW_MS - 9
    )
    world.rows.keks["kek-a0"] = lost
    if is_healing:
        breach(world, K.SUSPECTED)
    before = dict(world.rows.keks)
    told = rotated(world, key)
    strange = msgspec.structs.replace(told, kek=world.kek("b", created_at_ms=world.now_ms, version=2))
    signature = key.sign(strange.signed_bytes(TENANT)).hex()
    with pytest.raises(RefusedChangeError, match="announces no KEK"):
        take(world, msgspec.structs.replace(strange, signature=signature))
    assert world.rows.keks == before
    assert take(world, told)
    after = world.rows.keks
    assert {name: after[name] for name in ("kek-b", "kek-c", "kek-a0")} == {
        name: before[name] for name in ("kek-b", "kek-c", "kek-a0")
    }
    assert (after["kek-a"].state, after["kek-a"].since_ms) == ("deactivated", world.now_ms)


@pytest.mark.parametrize(("age_ms", "ends"), [(1001, True), (1000, True), (999, False)])
@pytest.mark.parametrize("kind", [K.KEK, K.RUNTIME])
def test_a_kek_from_before_its_breach_ends_as_soon_as_it_is_known(
    world: World, kind: IncidentKind, age_ms: int, *, ends: bool
) -> None:
    """It was rotated to unseen: the breach was of the HSM that it is in, or of what it cannot protect."""
    breach(world, kind)  # a second ago
    kek = world.kek("a", created_at_ms=world.now_ms - age_ms, version=2)
    assert take(world, KekAnnouncement(environment="a", kek_id="kek-a2", kek=kek))
    is_over = ends and kind is K.KEK
    known = world.rows.keks["kek-a2"]
    assert (known.state, known.since_ms) == (changes.KEK_COMPROMISED if is_over else "active", world.now_ms)
    assert world.rows.environments["a"].kek_id == "kek-a2", "its agent is to see that it is meant"
    if ends:
        with pytest.raises(RefusedChangeError, match="not newer") as refused:
            complete(world, fingerprint=kek_fingerprint("kek-a2", kek))
        assert "env new-kek" in refused.value.next_step
    told = announce(world, "kek-a3")
    assert complete(world, fingerprint=fingerprint(told))


def test_an_environment_heals_because_of_its_own_incidents_alone(world: World) -> None:
    for number, (kind, name) in enumerate([(K.RUNTIME, "b"), (K.DB, "a"), (K.SUSPECTED, "a")], start=1):
        opening = Opening(
            declared=Declaration(kind=kind, environment=name),
            reason="IR",
            since_ms=NOW_MS,
            opened_by="ada",
            idempotency_key=f"k{number}",
        )

        def change(draft: Draft, opening: Opening = opening) -> None:
            changes.open_incident(draft, opening, exposed=frozenset(), now_ms=world.now_ms)

        world.change(change)
    assert list(healing.open_incidents(world.rows, "a")) == ["inc-3"]
    assert list(healing.open_incidents(world.rows, "b")) == ["inc-1"]
    with pytest.raises(RefusedChangeError, match="another fingerprint"):
        complete(world, fingerprint="0000")  # not asked for, and compared all the same
    assert complete(world, new_certificates=False), "nor a new KEK: nothing of that was asked of it"


def test_a_kek_that_counts_is_not_exchanged_by_an_appointment(world: World) -> None:
    """One that has come back by its own word goes on with the KEK that its row names."""
    kek = world.kek("a", created_at_ms=world.now_ms, version=2)

    def appoint(kek_id: str) -> None:
        world.change(
            lambda draft: healing.recover(
                draft, "a", registry_key="k", kek_id=kek_id, kek=kek, now_ms=world.now_ms
            )
        )

    with pytest.raises(RefusedChangeError, match="kek-a2"):
        appoint("kek-a2")
    appoint("kek-a")
    body = world.rows.environments["a"]
    assert (body.kek_id, body.registry_key, body.state) == ("kek-a", "k", E.ACTIVE)
    assert not body.registry_key_exposed
    for before, is_exposed in (("k", True), ("another", False)):
        set_a(world, registry_key=before, registry_key_exposed=True)
        appoint("kek-a")
        assert world.rows.environments["a"].registry_key_exposed is is_exposed


def test_a_kek_of_before_the_breach_is_not_new(world: World) -> None:
    """Made before, announced after: an attacker may have been there when it was."""
    breach(world)
    old = KekAnnouncement(
        environment="a", kek_id="kek-a2", kek=world.kek("a", created_at_ms=NOW_MS, version=2)
    )
    world.change(lambda draft: healing.take_kek(draft, old, tenant=TENANT, now_ms=world.now_ms))
    with pytest.raises(RefusedChangeError, match="not newer"):
        complete(world, fingerprint=fingerprint(old))


def test_a_kek_that_was_announced_while_it_healed_is_compared_whatever_happened(world: World) -> None:
    breach(world, K.SUSPECTED)
    told = announce(world)
    with pytest.raises(RefusedChangeError, match="is to be compared") as refused:
        complete(world)
    assert "`key-agent env new-kek` printed it" in refused.value.next_step  # `env identity` has another one
    with pytest.raises(RefusedChangeError, match="another fingerprint"):
        complete(world, fingerprint="00" * 32)
    assert complete(world, fingerprint=fingerprint(told))


def test_the_fingerprint_is_over_everything_that_makes_a_kek() -> None:
    kek = World.kek("a", created_at_ms=5)
    found = {
        kek_fingerprint("k", kek),
        kek_fingerprint("k2", kek),
        *(
            kek_fingerprint("k", msgspec.structs.replace(kek, **{name: value}))
            for name, value in {
                "environment": "b",
                "method": "kw",
                "kek_type": "rsa-3072",
                "public_key": "AA",
                "created_at_ms": 6,
            }.items()
        ),
    }
    assert len(found) == 7
    assert kek_fingerprint("k", msgspec.structs.replace(kek, state="x", since_ms=9)) in found


def test_only_an_environment_that_heals_announces_a_kek_by_its_certificate_alone(world: World) -> None:
    with pytest.raises(RefusedChangeError, match="nobody whom the rows name"):
        announce(world)
    breach(world)
    with pytest.raises(RefusedChangeError, match="old one"):
        announce(world, "kek-b")
    told = announce(world, "kek-a3")
    complete(world, fingerprint=fingerprint(told))
    with pytest.raises(RefusedChangeError, match="announces no KEK"):
        announce(world, "kek-a4")


def test_nothing_is_admitted_without_a_load_balancers_word(world: World) -> None:
    breach(world)
    rekey(world)
    complete(world, fingerprint=fingerprint(announce(world)))
    with pytest.raises(RefusedChangeError, match="no load balancer"):
        admit(world)
    assert state(world) is E.HEALED


def test_nothing_is_admitted_before_it_has_healed_or_without_new_keys(world: World) -> None:
    with pytest.raises(RefusedChangeError, match="active"):
        admit(world, "lb-1")
    breach(world)
    with pytest.raises(RefusedChangeError, match="healing"):
        admit(world, "lb-1")
    complete(world, fingerprint=fingerprint(announce(world)))
    with pytest.raises(RefusedChangeError, match="no successors"):
        admit(world, "lb-1")


def test_what_fails_on_the_way_heals_again_and_can_return(world: World) -> None:
    breach(world)
    rekey(world)
    told = announce(world)
    complete(world, fingerprint=fingerprint(told))
    admit(world, "lb-1")
    assert world.change(lambda draft: healing.refuse(draft, "a", reason="key 7", now_ms=world.now_ms))
    assert (state(world), incident(world)) == (E.HEALING, IncidentState.REKEYED)
    assert world.rows.environments["a"].reason == "key 7"
    assert world.change(lambda draft: healing.refuse(draft, "a", reason="x", now_ms=world.now_ms)) is False
    complete(world, fingerprint=fingerprint(told))
    admit(world, "lb-1")
    world.change(lambda draft: healing.readmit(draft, "a", now_ms=world.now_ms))
    assert state(world) is E.ACTIVE


def test_further_lost_keys_stop_a_return(world: World) -> None:
    breach(world)
    rekey(world)
    complete(world, fingerprint=fingerprint(announce(world)))
    admit(world, "lb-1")
    keys = [world.dek["s3-b"]]
    approval = world.approve(Action.INCIDENT_COMPROMISE, "inc-1", changes.compromise_payload(keys))
    world.change(
        lambda draft: changes.compromise_more(
            draft, "inc-1", keys, tenant=TENANT, approval_id=approval, now_ms=world.now_ms
        )
    )
    assert (state(world), incident(world)) == (E.HEALING, IncidentState.OPEN)


# Rescue.


def rescue(world: World, keys: list[str], approval: str, until_ms: int) -> bool:
    return world.change(
        lambda draft: healing.rescue(
            draft,
            "inc-1",
            keys,
            tenant=TENANT,
            approval_id=approval,
            until_ms=until_ms,
            now_ms=world.now_ms,
        )
    )


def test_two_persons_let_a_compromised_key_open_for_a_time(world: World) -> None:
    breach(world)
    keys, until_ms = [world.dek["s3-a"]], world.now_ms + 3_600_000
    payload = healing.rescue_payload(keys, until_ms)
    for wrong in (
        world.approve(Action.KEY_RESCUE, "inc-1", payload, by="ada"),
        world.approve(Action.KEY_RESCUE, "inc-1", healing.rescue_payload(keys, until_ms + 1)),
        world.approve(Action.KEYS_RETIRE, "inc-1", payload),
    ):
        with pytest.raises(ApprovalError):
            rescue(world, keys, wrong, until_ms)
    approval = world.approve(Action.KEY_RESCUE, "inc-1", payload)
    assert rescue(world, keys, approval, until_ms)
    dek = world.rows.deks[keys[0]]
    assert (dek.state, dek.rescue_until_ms, dek.rescue_approval) == (S.COMPROMISED, until_ms, approval)
    assert rescue(world, keys, approval, until_ms) is False


@pytest.mark.parametrize("ahead_ms", [0, -1, healing.MAX_RESCUE_S * 1000 + 1])
def test_a_rescue_ends(world: World, ahead_ms: int) -> None:
    breach(world)
    with pytest.raises(RefusedChangeError, match="30 days"):
        rescue(world, [world.dek["s3-a"]], "a-1", world.now_ms + ahead_ms)


def test_only_what_the_incident_compromised_is_rescued(world: World) -> None:
    breach(world)
    for key in (world.dek["s3-b"], "00" * 16):
        with pytest.raises(RefusedChangeError, match="none that"):
            rescue(world, [key], "a-1", world.now_ms + 1000)


def test_a_rescue_is_of_this_incident_and_of_what_is_compromised(world: World) -> None:
    """Each alone is not enough: one would name another incident's, one bring a suspended key back."""
    breach(world)
    key, until_ms = world.dek["s3-a"], world.now_ms + 1000
    compromised = world.rows.deks[key]
    approval = world.approve(Action.KEY_RESCUE, "inc-1", healing.rescue_payload([key], until_ms))
    for changed in ({"incident_id": "inc-2"}, {"state": S.SUSPENDED}):
        world.rows.deks[key] = msgspec.structs.replace(compromised, **changed)
        with pytest.raises(RefusedChangeError, match="none that"):
            rescue(world, [key], approval, until_ms)
    world.rows.deks[key] = compromised
    assert rescue(world, [key], approval, until_ms)


def test_a_signing_key_is_not_rescued(world: World) -> None:
    """Whoever took it has signed with it. Two persons who have signed a list do not change that."""
    signing = world.dek["box-a"]
    world.rows.deks[signing] = msgspec.structs.replace(world.rows.deks[signing], use=KeyUse.SIGN)
    breach(world)
    keys, until_ms = [world.dek["s3-a"], signing], world.now_ms + 1000
    approval = world.approve(Action.KEY_RESCUE, "inc-1", healing.rescue_payload(keys, until_ms))
    with pytest.raises(RefusedChangeError, match="signs"):
        rescue(world, keys, approval, until_ms)
    assert world.rows.deks[keys[0]].rescue_until_ms is None


# The end of keys.


def retire(world: World, keys: list[str], approval: str, **more: Any) -> bool:
    wanted: dict[str, Any] = {"accept_loss": False, "rewritten": (), "unfinished": {}} | more
    return world.change(
        lambda draft: healing.retire_keys(
            draft, keys, tenant=TENANT, approval_id=approval, now_ms=world.now_ms, **wanted
        )
    )


def approve_end(world: World, keys: list[str], *, accept_loss: bool = False, by: str = "ada bob") -> str:
    payload = healing.retire_payload(keys, accept_loss=accept_loss)
    return world.approve(Action.KEYS_RETIRE, TENANT, payload, by=by)


@pytest.mark.parametrize("state", [S.ACTIVE, S.PRE_ACTIVE, S.SUSPENDED])
def test_a_key_that_is_needed_does_not_end_whoever_accepts_its_loss(world: World, state: KeyState) -> None:
    """While an environment counts no two persons give up what the others use."""
    key = world.dek["s3-a"]
    world.rows.deks[key] = msgspec.structs.replace(world.rows.deks[key], state=state)
    approval = approve_end(world, [key], accept_loss=True)
    with pytest.raises(RefusedChangeError, match="only a deactivated or compromised one"):
        retire(world, [key], approval, accept_loss=True)
    assert world.rows.deks[key].state is state


def test_a_key_that_seals_nothing_any_more_ends_by_two_persons(world: World) -> None:
    breach(world)
    keys = [world.dek["s3-a"]]
    with pytest.raises(ApprovalError):
        retire(world, keys, approve_end(world, keys, by="bob"), rewritten=keys)
    assert retire(world, keys, approve_end(world, keys), rewritten=keys)
    assert world.rows.deks[keys[0]].state is S.DESTROYED
    assert retire(world, keys, "a-none", rewritten=keys) is False


def test_what_may_still_be_needed_is_given_up_by_its_name_only(world: World) -> None:
    breach(world)
    keys = [world.dek["s3-a"]]
    with pytest.raises(RefusedChangeError, match="nothing shows"):
        retire(world, keys, approve_end(world, keys))
    with pytest.raises(ApprovalError):  # approved of something else
        retire(world, keys, approve_end(world, keys), accept_loss=True)
    assert retire(world, keys, approve_end(world, keys, accept_loss=True), accept_loss=True)


def test_no_loss_is_accepted_of_what_a_command_may_still_rewrite(world: World) -> None:
    breach(world)
    key = world.dek["s3-a"]
    approval = approve_end(world, [key], accept_loss=True)
    for accepts in (False, True):
        with pytest.raises(RefusedChangeError, match="re-encryption j1, j2") as refused:
            retire(world, [key], approval, accept_loss=accepts, unfinished={key: ["j2", "j1"], "0e": ["j3"]})
        assert "resume JOB" in refused.value.next_step
        assert "drop JOB" in refused.value.next_step
    assert retire(world, [key], approval, accept_loss=True, unfinished={"0e": ["j3"]})
    assert retire(world, [key], approval, accept_loss=True, unfinished={key: ["j1"]}) is False


@pytest.mark.parametrize("key_state", [S.ACTIVE, S.PRE_ACTIVE, S.SUSPENDED])
def test_a_key_in_use_does_not_end(world: World, key_state: KeyState) -> None:
    key = world.add_key("s3", "b", key_state)
    with pytest.raises(RefusedChangeError, match="only a deactivated"):
        retire(world, [key], approve_end(world, [key]), rewritten=[key])

"""What an agent sees of itself, as `key-agent status` and `key-agent doctor` show it.

1. Nothing here changes anything.
2. What a proxy holds follows from what it has acknowledged, for how long that is valid, and what was taken
   back since.
3. A row that is damaged is no reason to show nothing.
"""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable

from cryptography import x509

from envelope.keys import KeyState, NetworkService
from key_agent.agent import Agent
from key_agent.errors import KeyAgentError
from key_agent.operations.commands import Json
from key_agent.push.recipients import leaf_sha256
from key_agent.push.transport import PushError
from key_agent.registry.database import RegistryError
from key_agent.registry.model import DataKeyRow, KekRow, Link, Proxy
from key_agent.sources.verdict import NEXT_STEPS


async def status(
    agent: Agent,
    *,
    environments: Callable[[], Awaitable[Json]],
    rotations: Callable[[], Awaitable[list[Json]]],
) -> Json:
    """Who holds what until when, and whether the enterprise still consents."""
    now_ms = agent.now_ms()
    consent = agent.consent
    row = await agent.registry.current_kek()
    if not agent.is_running and row is not None and row.kek is not None:
        consent.observe(row.kek, await agent.source.diagnose(row.kek))
    # Grouped once: whoever can reach the port must not be able to hold up the KEK watch.
    keys = by_owner(await agent.registry.data_keys())
    links = by_owner(agent.targets.links)
    current = None if row is None else row.reference.kek_id
    consenting_since_ms = 0 if row is None else await _consenting_since_ms(agent, row)
    return {
        "agent": agent.agent_id,
        "tenant": agent.tenant,
        "environment": agent.environment_id,
        "running": agent.is_running,
        "role": "leader",
        "leads": agent.registry.leads,
        "term": agent.registry.term,
        "time_ms": now_ms,
        "standing": consent.standing,
        "since_ms": consent.since_ms,
        "diagnosis": None
        if consent.diagnosis is None
        else {
            "verdict": consent.diagnosis.verdict,
            "detail": consent.diagnosis.detail,
            "next_step": NEXT_STEPS.get(consent.diagnosis.verdict),
            "at_ms": consent.diagnosed_at_ms,
        },
        "kek": None if row is None else kek_json(row),
        "environments": None if agent.environments is None else await environments(),
        "problems": agent.reasons_not_ready() if agent.is_running else [],
        "rotations": await rotations(),
        "ending": _lifetime_rows(agent, all_of_them=False),
        "services": [
            {
                "service": str(owner),
                "keys": sum(
                    current in key.wrapped_by and key.state is not KeyState.DESTROYED for key in keys[owner]
                ),
                "unreadable_keys": sum(
                    current not in key.wrapped_by and key.state is not KeyState.DESTROYED
                    for key in keys[owner]
                ),
                "proxies": [_place(agent, link, now_ms, consenting_since_ms) for link in links[owner]],
            }
            for owner in sorted(links)
            if any(_is_shown(agent, link, now_ms) for link in links[owner])
        ],
        "proxies": [
            _proxy_json(agent, proxy) for proxy in agent.targets.proxies.values() if not proxy.removed
        ],
    }


async def diagnosis(agent: Agent, *, kek: Callable[[], Awaitable[Json]]) -> Json:
    """For `doctor`: the source's own description, the KEK, and a session with every proxy."""
    found: Json = {"source": None, "source_error": None}
    try:
        found["source"] = await agent.source.describe()
    except KeyAgentError as error:
        found["source_error"] = str(error)
    found["lease"] = {"leads": agent.registry.leads, "term": agent.registry.term}
    found["kek"] = await kek()
    proxies = [proxy for proxy in agent.targets.proxies.values() if not proxy.removed]
    found["proxies"] = await asyncio.gather(*(_probe(agent, proxy) for proxy in proxies))
    found["lifetimes"] = _lifetime_rows(agent, all_of_them=True)
    found["links"] = [_certificate_json(agent, link) for link in agent.targets.links if not link.withdrawn]
    return found


def _lifetime_rows(agent: Agent, *, all_of_them: bool) -> list[Json]:
    """Certificates and lists that end soon or cannot be used, or every one; the next to end first."""
    now_s = agent.clock.wall_s()
    return [
        {
            "kind": one.kind,
            "name": one.name,
            "not_after": None if one.not_after is None else one.not_after.isoformat(),
            "days_left": None if (left := one.days_left(now_s)) is None else round(left, 1),
            "problem": one.problem,
        }
        for one in agent.lifetimes.lifetimes()
        if all_of_them or one.is_worth_telling(now_s)
    ]


async def _probe(agent: Agent, proxy: Proxy) -> Json:
    try:
        session = await agent.pusher.probe(proxy)
    except PushError as error:
        return {
            "proxy": proxy.id,
            "url": proxy.url,
            "reachable": False,
            "code": error.code,
            "error": error.detail,
        }
    return {
        "proxy": proxy.id,
        "url": proxy.url,
        "reachable": True,
        "clock_ahead_s": round(session.time_ms / 1000 - agent.clock.wall_s(), 3),
        "services": {str(held.owner): held.certificate_sha256 for held in session.services},
    }


def _certificate_json(agent: Agent, link: Link) -> Json:
    problem = None
    leaf: x509.Certificate | None = None
    try:
        leaf = agent.recipients.check(link.owner, link.certificate_pem, now_s=agent.clock.wall_s())
    except Exception as error:  # noqa: BLE001 - whatever is wrong with a certificate is what doctor tells
        problem = f"{type(error).__name__}: {error}"
    return {
        "service": str(link.owner),
        "proxy": link.proxy_id,
        "certificate_sha256": leaf_sha256(link.certificate_pem),
        "not_after": None if leaf is None else leaf.not_valid_after_utc.isoformat(),
        "problem": problem,
    }


def _is_shown(agent: Agent, link: Link, now_ms: int) -> bool:
    return not link.withdrawn or link.may_hold_keys(now_ms, agent.clock.boot_s())


async def _consenting_since_ms(agent: Agent, current: KekRow) -> int:
    """Since when nothing was taken back, as far as the registry tells.

    A KEK that followed one that worked took nothing back, so the time of a rotation does not count. Rows
    of earlier KEKs keep no more of their past than when they were made.
    """
    try:
        before = {row.rotated_to: row for row in await agent.registry.keks()}
    except RegistryError:  # the row of an earlier KEK is damaged, which is no reason to show nothing
        return current.since_ms
    since_ms = current.since_ms
    earlier = before.pop(current.reference.kek_id, None)
    if earlier is not None and earlier.since_ms < since_ms:
        return since_ms  # revoked and restored after that rotation
    while earlier is not None and earlier.kek is not None:
        since_ms = earlier.kek.created_at_ms
        earlier = before.pop(earlier.reference.kek_id, None)
    return since_ms


def _place(agent: Agent, link: Link, now_ms: int, consenting_since_ms: int) -> Json:
    """*consenting_since_ms*: what was acknowledged before is taken back, whatever its validity says."""
    valid_for_s = None
    is_outdated = link.accepted_at_ms is not None and link.accepted_at_ms < consenting_since_ms
    if not is_outdated and link.valid_until_ms is not None and link.valid_until_ms > now_ms:
        valid_for_s = round((link.valid_until_ms - now_ms) / 1000, 1)
    is_withdrawn = link.withdrawn or agent.consent.is_withdrawn
    if is_outdated and not is_withdrawn:
        # New keys may be on their way: not a word on those before the proxy's.
        is_over = link.withdrawal_is_newest or not link.may_hold_keys(now_ms, agent.clock.boot_s())
        state = "withdrawn" if is_over else "withdrawing"
    elif is_withdrawn:
        state = "withdrawing" if link.may_hold_keys(now_ms, agent.clock.boot_s()) else "withdrawn"
    elif valid_for_s is not None:
        state = "valid"
    else:
        state = "never" if link.accepted_at_ms is None else "expired"
    return {
        "proxy": link.proxy_id,
        "state": state,
        "acknowledged_at_ms": link.accepted_at_ms,
        "valid_until_ms": link.valid_until_ms,
        "valid_for_s": valid_for_s,
        "withdrawn_at_ms": link.withdrawn_at_ms,
        "may_hold_keys_until_ms": link.silent_at_ms
        if link.may_hold_keys(now_ms, agent.clock.boot_s())
        else None,
        "error": link.error,
        "error_at_ms": link.error_at_ms,
    }


def _proxy_json(agent: Agent, proxy: Proxy) -> Json:
    last = agent.deliveries.get(proxy.id)
    seen = agent.presence.sighting(proxy.id)
    return {
        "proxy": proxy.id,
        "url": proxy.url,
        "last_push_at_ms": None if last is None else last.at_ms,
        "outcome": None if last is None else last.outcome,
        "error": None if last is None else last.error,
        "failures_in_a_row": agent.refresh.schedule.failures(proxy.id),
        "answers": None if seen is None else seen.answers,
        "answers_since_ms": None if seen is None else seen.since_ms,
        "answers_error": None if seen is None else seen.error,
    }


def kek_json(row: KekRow) -> Json:
    return {
        "id": row.reference.kek_id,
        "version": row.version,
        "label": row.reference.label,
        "object_id": row.reference.object_id.hex(),
        "state": row.state,
        "reason": row.reason,
        "since_ms": row.since_ms,
        "method": None if row.kek is None else row.kek.method,
        "type": None if row.kek is None else row.kek.kek_type,
        "token_serial": None if row.kek is None else row.kek.token_serial,
        "created_at_ms": None if row.kek is None else row.kek.created_at_ms,
        "valid_until_ms": None
        if row.kek is None or row.kek.valid_until_s is None
        else row.kek.valid_until_s * 1000,
        "adopted": row.kek is not None and row.kek.is_adopted,
        "rotated_to": row.rotated_to,
    }


def by_owner[T: (DataKeyRow, Link)](rows: Iterable[T]) -> defaultdict[NetworkService, list[T]]:
    grouped: defaultdict[NetworkService, list[T]] = defaultdict(list)
    for row in rows:
        grouped[row.owner].append(row)
    return grouped

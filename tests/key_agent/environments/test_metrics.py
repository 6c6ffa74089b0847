"""What monitoring sees of several environments, read beside what the agents act on."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from envelope.keys import KeyState
from key_agent.environments.breaches import IncidentKind, IncidentState
from key_agent.environments.keys.bringing import Standing
from key_agent.environments.metrics import EnvironmentMetrics, families
from key_agent.environments.peers.telling import Told
from key_agent.environments.shared.documents import IncidentBody, Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentState
from key_agent.push.transport import EnvironmentWord
from tests.environments.members import Member, members
from tests.key_agent.conftest import until
from tests.key_agent.environments.rows import World
from tests.pki import Tenant

PAGE: Final = Path(__file__).parents[3] / "docs/metrics.md"
WORD: Final = EnvironmentWord(environment="a", state="active", reason=None, term=1, epoch=1)


def _healing(name: str) -> Callable[[Draft], None]:
    def change(draft: Draft) -> None:
        body = draft.shared.environments[name]
        draft.put(Kind.ENVIRONMENT, name, msgspec.structs.replace(body, state=EnvironmentState.HEALING))

    return change


def _keys_and_incidents(draft: Draft) -> None:
    world = World()
    draft.put(Kind.SERVICE, "acme/s3", world.rows.services["acme/s3"])
    for ring, body in world.rows.rings.items():
        if body.service == "acme/s3":
            draft.put(Kind.RING, ring, body)
    states = {"s3-a": KeyState.ACTIVE, "s3-b": KeyState.ACTIVE, "s3-c": KeyState.COMPROMISED}
    for name, state in states.items():
        key = world.rows.deks[world.dek[name]]
        draft.put(Kind.DEK, world.dek[name], msgspec.structs.replace(key, state=state))
    ends = (IncidentState.CONTAINED, IncidentState.CLOSED, IncidentState.FALSE_ALARM)
    for number, end in enumerate(ends, start=1):
        incident = IncidentBody(
            number=number,
            environment="b",
            kind=IncidentKind.DEK,
            state=end,
            reason="key found in a ticket",
            since_ms=0,
            opened_at_ms=0,
            opened_by="ada",
            opened_epoch=1,
            idempotency_key=f"{number}",
            steps={},
        )
        draft.put(Kind.INCIDENT, f"inc-{number}", incident)


def scraped(
    member: Member,
    *,
    told: Mapping[str, Told] | None = None,
    standings: Mapping[str, Standing] | None = None,
) -> dict[str, float]:
    """Sample as Prometheus writes it, without `sealgate_` -> value."""
    registry = CollectorRegistry()
    registry.register(
        EnvironmentMetrics(member.peering, told=lambda: told or {}, standings=lambda: standings or {})
    )
    text = generate_latest(registry).decode()
    return {name: float(value) for name, value in re.findall(r"^sealgate_(\S+) (\S+)$", text, re.MULTILINE)}


def test_labels_are_those_of_the_page() -> None:
    """Types are compared by tests/integration/test_alert_rules.py, with what a running agent serves."""
    rows = re.findall(r"^\| `sealgate_(\w+)` \| gauge \| (.*?) ?\|", PAGE.read_text(), re.MULTILINE)
    page = {name: re.findall(r"`(\w+)`", labels) for name, labels in rows}
    assert {name: page[name] for name in families()} == {
        name: list(metric._labelnames) for name, metric in families().items()
    }


async def test_each_says_what_it_sees(tmp_path: Path, acme: Tenant) -> None:
    async with members(tmp_path, acme, "abc") as site:
        await site.unite()
        await site.in_step()
        a, b = site["a"], site["b"]
        await until(lambda: scraped(b)["env_serves"] == 1 and scraped(b)['env_answers{environment="c"}'] == 1)
        seen = scraped(b)
        assert seen["registry_epoch"] == a.peering.position.epoch
        assert seen["registry_tampered"] == 0
        assert 0 < seen["env_lease_seconds"] <= 300
        assert {name for name in seen if name.startswith("env_answers")} == {
            'env_answers{environment="a"}',
            'env_answers{environment="c"}',
        }
        for name in "abc":
            states = {
                state: seen[f'env_state{{environment="{name}",state="{state}"}}']
                for state in EnvironmentState
            }
            assert states == dict.fromkeys(EnvironmentState, 0) | {EnvironmentState.ACTIVE: 1}
        await until(lambda: scraped(b)['registry_lag_epochs{environment="c"}'] == 0)

        # One is cut off: the others see it, and that it has not got what they have.
        c = site["c"]
        c.cut_off()
        await a.change(_healing("a"))
        await site.in_step("a", "b")
        await until(lambda: scraped(b)['env_answers{environment="c"}'] == 0)
        seen = scraped(b)
        assert seen['registry_lag_epochs{environment="c"}'] == 1
        assert seen['env_state{environment="a",state="healing"}'] == 1
        assert seen['env_state{environment="a",state="active"}'] == 0
        assert scraped(a)["env_serves"] == 0
        assert "env_lease_seconds" not in scraped(a)
        for member in site.members.values():
            member.clock.skip(301)
        await until(lambda: scraped(c)["env_serves"] == 0)
        assert scraped(c)['env_state{environment="c",state="active"}'] == 1, "nobody has said otherwise"


async def test_keys_incidents_proxies_and_what_the_manager_knows(tmp_path: Path, acme: Tenant) -> None:
    async with members(tmp_path, acme, "abc") as site:
        await site.unite()
        await site.in_step()
        a, b = site["a"], site["b"]
        assert scraped(a)["env_incidents_open"] == 0
        assert {state: scraped(a)[f'dek_state{{state="{state}"}}'] for state in KeyState} == dict.fromkeys(
            KeyState, 0
        )
        await a.change(_keys_and_incidents)
        await site.in_step()
        for member in (a, b):
            seen = scraped(member)
            assert seen["env_incidents_open"] == 1
            assert seen['dek_state{state="active"}'] == 2
            assert seen['dek_state{state="compromised"}'] == 1
            assert seen['dek_state{state="destroyed"}'] == 0
        lacking = {
            "b": Standing(failed={"11" * 16: "no wrap"}),
            "gone": Standing(failed={"11" * 16: "no wrap"}),
        }
        assert scraped(a, standings=lacking)['env_lacks_keys{environment="b"}'] == 1
        assert not [name for name in scraped(a, standings=lacking) if "gone" in name]
        assert not [name for name in scraped(b, standings=lacking) if "lacks" in name], "b is not the manager"
        told = {
            "edge-1": Told(word=WORD, at_boot_s=0.0),
            "edge-2": Told(word=WORD, at_boot_s=0.0, error="it does not answer"),
        }
        assert scraped(a, told=told)["env_unaware_proxies"] == 1
        assert scraped(a)["env_unaware_proxies"] == 0

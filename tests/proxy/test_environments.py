"""What an agent's word on its environment does at a proxy."""

import asyncio
from typing import Any

import aiohttp
import msgspec
import pytest

from proxy.api.environment import STATUS_PATH, answering_checks, status_routes
from proxy.environments import (
    STICKS_S,
    Environments,
    ForeignAgentError,
    ForeignEnvironmentError,
    Word,
)
from runtime.serve import make_application, serving


def word(state: str, *, term: int = 1, epoch: int = 1, environment: str = "a") -> Word:
    return Word(environment=environment, state=state, term=term, epoch=epoch)


def take(
    environments: Environments, said: Word, *, agent: str = "agent-a", tenant: str = "acme", at_s: float = 0.0
) -> Word:
    return environments.take(tenant, said, agent=agent, now_boot_s=at_s)


def test_a_single_environment_needs_no_word() -> None:
    environments = Environments()
    assert not environments.refuses("acme")
    assert environments.line(["acme"]) == "up ready 100%\n"


def test_one_of_several_serves_only_once_it_is_told() -> None:
    environments = Environments("a")
    assert environments.refuses("acme")
    assert environments.line(["acme"]) == "down #untold\n"
    take(environments, word("active"))
    assert not environments.refuses("acme")
    assert environments.refuses("globex"), "a word is for its own tenant"
    assert environments.line(["acme", "globex"]) == "down #untold\n"
    with pytest.raises(ForeignEnvironmentError):
        take(environments, word("active", environment="b", epoch=9))
    assert environments.line([]) == "up ready 100%\n"


@pytest.mark.parametrize(
    ("state", "serves", "line"),
    [
        ("active", True, "up ready 100%\n"),
        ("draining", True, "drain\n"),
        ("healing", False, "down #healing\n"),
        ("healed", False, "down #healed\n"),
        ("rejoining", False, "down #rejoining\n"),
        ("provisioning", False, "down #provisioning\n"),
        ("joining", False, "down #joining\n"),
        ("retired", False, "down #retired\n"),
        ("who-knows", False, "down #who-knows\n"),
    ],
)
def test_states(state: str, serves: bool, line: str) -> None:
    refused: list[str] = []
    environments = Environments("a", on_refused=refused.append)
    take(environments, word(state))
    assert environments.refuses("acme") is not serves
    assert environments.line(["acme"]) == line
    assert refused == ([] if serves else ["acme"])


def test_an_older_word_changes_nothing() -> None:
    environments = Environments("a")
    take(environments, word("healing", term=2, epoch=5))
    for stale in (word("active", term=1, epoch=9), word("active", term=2, epoch=4)):
        assert take(environments, stale).state == "healing"
    assert take(environments, word("active", term=2, epoch=5)).state == "active", "a lease came back"
    environments.keep(["globex"])
    assert environments.refuses("acme")


def test_another_environments_agent_says_nothing_here() -> None:
    """It has a certificate of the tenant's, as every agent and companion of a load balancer; no more."""
    environments = Environments("a")
    take(environments, word("active"))
    for state in ("healing", "active"):
        with pytest.raises(ForeignAgentError):
            take(environments, word(state, epoch=99), agent="agent-b")
    assert not environments.refuses("acme")
    take(environments, word("active"), tenant="globex", agent="agent-b")  # that tenant's
    assert not environments.refuses("globex")


def test_the_settings_name_who_speaks() -> None:
    environments = Environments("a", agents={"acme": "agent-a"})
    with pytest.raises(ForeignAgentError):  # though it is the first
        take(environments, word("healing"), agent="agent-b")
    with pytest.raises(ForeignAgentError):
        take(environments, word("active"), agent="agent-b")
    assert environments.refuses("acme")
    take(environments, word("active"))
    assert not environments.refuses("acme")


def test_what_restricts_is_in_force_whatever_was_said_before() -> None:
    environments = Environments("a")
    take(environments, word("active", term=9, epoch=2**50))
    assert take(environments, word("healing", term=2, epoch=5)).state == "healing"
    assert environments.refuses("acme")


def test_keys_come_from_the_agent_that_speaks_and_from_no_other() -> None:
    environments = Environments("a", agents={"globex": "agent-g"})
    for agent in ("agent-a", "agent-b"):
        environments.check_entitled("acme", agent)  # nobody has spoken yet, nobody is named
    take(environments, word("active"))
    environments.check_entitled("acme", "agent-a")
    environments.check_entitled("globex", "agent-g")
    for tenant, agent in (("acme", "agent-b"), ("globex", "agent-a")):
        with pytest.raises(ForeignAgentError):
            environments.check_entitled(tenant, agent)


def test_where_no_environment_is_set_up_every_agent_of_a_tenant_brings_keys() -> None:
    environments = Environments()
    take(environments, word("active"))
    environments.check_entitled("acme", "agent-b")


def test_no_position_sticks_for_longer_than_a_request_can_be_under_way() -> None:
    """Whoever had the agent for a while has said something with the highest position that there is."""
    environments = Environments("a")
    take(environments, word("healing", term=2**53, epoch=2**53))
    assert take(environments, word("active", term=2, epoch=5), at_s=STICKS_S).state == "healing"
    assert take(environments, word("active", term=2, epoch=5), at_s=STICKS_S + 1).state == "active"
    assert not environments.refuses("acme")


@pytest.mark.parametrize(
    "wrong",
    [
        {"environment": "a", "state": "active", "term": 1},
        {"environment": "a", "state": "active\nup ready", "term": 1, "epoch": 1},
        {"environment": "A!", "state": "active", "term": 1, "epoch": 1},
        {"environment": "a", "state": "active", "term": -1, "epoch": 1},
        {"environment": "a", "state": "active", "term": 1, "epoch": 1, "more": 1},
        {"environment": "a", "state": "s" * 64, "term": 1, "epoch": 1},
    ],
)
def test_what_is_no_word(wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, type=Word)


async def test_what_load_balancers_ask() -> None:
    environments = Environments("a")
    application = make_application()
    status_routes(application, environments, tenants=lambda: ["acme"])
    check = await answering_checks(lambda: environments.line(["acme"]), host="127.0.0.1", port=0)
    port = check.sockets[0].getsockname()[1]

    async def asked() -> str:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = await reader.read()
        writer.close()
        return answer.decode()

    async with check, serving(application, host="127.0.0.1", port=0) as http:

        async def status() -> tuple[int, Any]:
            url = f"http://127.0.0.1:{http}{STATUS_PATH}"
            async with aiohttp.ClientSession() as session, session.get(url) as answer:
                return answer.status, await answer.json()

        assert await asked() == "down #untold\n"
        assert (await status())[0] == 503
        take(environments, word("active", epoch=7))
        assert await asked() == "up ready 100%\n"
        code, body = await status()
        assert (code, body["serves"], body["tenants"]["acme"]["epoch"]) == (200, True, 7)
        take(environments, word("healing", epoch=8))
        assert await asked() == "down #healing\n"
        assert (await status())[1]["tenants"]["acme"]["state"] == "healing"

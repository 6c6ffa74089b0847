"""`deploy/alerts.yml` and `docs/metrics.md` against what the two programs really serve at `/metrics`.

A rule about a metric or a label that does not exist never fires, and nobody notices.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp
from prometheus_client import CollectorRegistry, generate_latest

from key_agent.consent import Standing
from key_agent.environments.metrics import families as environment_families
from key_agent.environments.states import EnvironmentState
from proxy.command_line.errors_cli import all_refusals
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.model import DialectName
from tests.integration.whole_site import Site, until, whole_site

ROOT: Final = Path(__file__).parents[2]
RULE: Final = re.compile(
    r"      - alert: (?P<name>Sealgate\w+)\n"
    r"        expr: (?P<expression>.+)\n"
    r"        for: \d+[smh]\n"
    r"        labels:\n"
    r"          severity: (?:page|ticket)\n"
    r"        annotations:\n"
    r"          summary: (?P<summary>.+)\n"
    r"          action: (?P<action>.+)\n"
)
HEADER: Final = re.compile(r"(?:#.*\n)*groups:\n")
GROUP: Final = re.compile(r"  - name: [a-z-]+\n    rules:\n")
SELECTOR: Final = re.compile(r"(sealgate_[a-z_]+)(?:\{([^}]*)\})?")
MATCHER: Final = re.compile(r'([a-z_]+)(=~|!=|=)"([^"]*)"')
# What belongs to every process that Prometheus' client library is in.
OF_THE_LIBRARY: Final = ("sealgate_process_", "python_")


@dataclass(frozen=True, slots=True)
class Rule:
    name: str
    expression: str
    summary: str
    action: str


def rules() -> list[Rule]:
    """Read strictly: a file that this does not understand is not YAML as it is written here."""
    text = (ROOT / "deploy/alerts.yml").read_text()
    at = len(HEADER.match(text)[0])  # type: ignore[index]
    found = []
    while at < len(text):
        if text[at] == "\n":
            at += 1
        elif group := GROUP.match(text, at):
            at = group.end()
        else:
            rule = RULE.match(text, at)
            assert rule is not None, f"not a rule: {text[at : at + 200]}"
            found.append(Rule(**rule.groupdict()))
            at = rule.end()
    return found


def families(scraped: str) -> dict[str, str]:
    """Name and type of every metric, without those that say when a counter began."""
    found = re.findall(r"^# TYPE (\S+) (\S+)$", scraped, re.MULTILINE)
    return {name: kind for name, kind in found if not name.endswith("_created")}


def documented() -> dict[str, tuple[str, set[str]]]:
    """Name -> type and labels, of docs/metrics.md."""
    rows: dict[str, tuple[str, set[str]]] = {}
    for line in (ROOT / "docs/metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 4 and cells[1] in {"counter", "gauge", "histogram"}:
            for name in re.findall(r"`(sealgate_[a-z_]+)`", cells[0]):
                rows[name] = (cells[1], set(re.findall(r"`([a-z_]+)`", cells[2])))
    return rows


def expressions() -> Iterator[tuple[Rule, str, str]]:
    """Every selector of every rule: rule, metric, matchers."""
    for rule in rules():
        for metric, matchers in SELECTOR.findall(rule.expression):
            yield rule, metric, matchers


def test_the_rules_can_be_read() -> None:
    found = rules()
    names = [rule.name for rule in found]
    assert len(names) == len(set(names)) >= 20
    for rule in found:
        assert SELECTOR.search(rule.expression), rule
        for opening, closing in ("()", "{}", "[]"):
            assert rule.expression.count(opening) == rule.expression.count(closing), rule
        # What YAML would read otherwise than as this text.
        for text in (rule.expression, rule.summary, rule.action):
            plain = text.strip('"') if text.startswith('"') else text
            assert ": " not in plain, text
            assert " #" not in plain, text
            assert text[0] not in "[]{}>|*&!%@`'", text


def test_matchers_name_labels_and_values_that_exist() -> None:
    table = documented()
    words = {
        "standing": {str(standing) for standing in Standing},
        "state": {str(state) for state in EnvironmentState},
        "dialect": {str(dialect) for dialect in DialectName},
        "outcome": {"ok", "refused", "accepted", *(refusal.code for refusal in all_refusals())},
    }
    seen = 0
    for rule, metric, matchers in expressions():
        name = metric.removesuffix("_bucket")
        for label, _, value in MATCHER.findall(matchers):
            seen += 1
            assert label in table[name][1], (rule.name, metric, label)
            assert set(value.split("|")) <= words[label], (rule.name, value)
        for label in re.findall(r"\$labels\.(\w+)", rule.summary):
            labels = table.get(name, ("", set()))[1]
            assert label in labels | {"instance"}, (rule.name, label)
    assert seen >= 6


async def _scrape(port: int) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/metrics") as answer,
    ):
        assert answer.status == 200
        return await answer.text()


def _admin_port(site: Site) -> int:
    for line in (site.directory / "log").read_text().splitlines():
        with contextlib.suppress(ValueError):
            if "admin_port" in (event := json.loads(line)):
                return int(event["admin_port"])
    raise AssertionError("the agent has not said where it listens")


async def test_what_rules_and_page_name_is_served(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(ServiceMetrics())
    of_service = families(generate_latest(registry).decode())
    async with (
        whole_site(tmp_path, names=("near",), interval_s=60, validity_s=70) as site,
        site.proxy(site.proxies[0]),
        site.agent(),
    ):
        (near,) = site.proxies

        async def uploaded() -> bool:
            return (await near.ask("/a", "-T", "-", body=b"content")).status in {201, 204}

        await until(uploaded)
        at_agent, at_proxy = await _scrape(_admin_port(site)), await _scrape(near.health_port)
    assert "\nsealgate_ready 1.0\n" in at_agent
    assert "\nsealgate_ready 1.0\n" in at_proxy
    assert '\nsealgate_agent_standing{standing="consented"} 1.0\n' in at_agent
    assert "\nsealgate_agent_leads 1.0\n" in at_agent
    of_several = {metric.name: metric.type for metric in environment_families().values()}
    assert not of_several.keys() & families(at_agent), "an agent of one environment says nothing of several"
    served = {**families(at_agent), **families(at_proxy), **of_service, **of_several}
    ours = {name: kind for name, kind in served.items() if not name.startswith(OF_THE_LIBRARY)}
    table = documented()
    assert {name: kind for name, (kind, _) in table.items()} == ours, "docs/metrics.md is complete and true"
    for rule, metric, _ in expressions():
        name = re.sub("_(bucket|sum|count)$", "", metric) if metric not in served else metric
        assert name in served, (rule.name, metric)
        assert (metric == name) == (served[name] != "histogram"), (rule.name, metric)
    # Labels of what has samples are those that the page says.
    for name, inside in re.findall(r"^(sealgate_[a-z_]+)\{([^}]*)\}", at_agent + at_proxy, re.MULTILINE):
        if name in table:
            assert {label for label, _, _ in MATCHER.findall(inside)} == table[name][1], name

"""The three lock files say the same, and the agent's has nothing of the proxy's engine."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, str]:
    """Package -> version (with its marker, if it has one). Every pin carries hashes."""
    lines = (ROOT / name).read_text().splitlines()
    found: dict[str, str] = {}
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        package, is_pin, version = line.partition("==")
        if is_pin and not line.startswith((" ", "#")):
            assert following.strip().startswith("--hash=sha256:"), f"{name}: {package} has no hash"
            found[package] = version.removesuffix(" \\")
    return found


@pytest.mark.parametrize("part", ["requirements-agent.lock", "requirements-proxy.lock"])
def test_a_part_pins_what_the_whole_pins(part: str) -> None:
    whole, found = pins("requirements.lock"), pins(part)
    assert found
    assert {package: version.split(" ")[0] for package, version in found.items()} == {
        package: whole[package].split(" ")[0] for package in found
    }


@pytest.mark.parametrize("part", ["requirements-agent.lock", "requirements-proxy.lock"])
def test_the_broker_and_postgresql_need_nothing_beyond_a_part(part: str) -> None:
    """docs/operations.md and docs/proxy.md say so."""
    assert {"nats-py", "psycopg"} <= pins(part).keys()


def test_the_agent_installs_without_the_engine() -> None:
    agent = pins("requirements-agent.lock")
    assert "python-pkcs11" in agent
    assert not {"mitmproxy", "h2", "h11", "pyopenssl", "flask"} & agent.keys()

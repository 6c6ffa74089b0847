"""The commands of the load balancer's machine, which has no key agent."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from key_agent.cli import program
from key_agent.load_balancing.haproxy_config import haproxy_config
from key_agent.load_balancing.settings import load
from runtime.cli import CommandError, ExitCode
from tests.key_agent.load_balancing.test_settings import GOOD, written


def refused(*arguments: str) -> CommandError:
    error = CliRunner().invoke(program, list(arguments)).exception
    assert isinstance(error, CommandError)
    return error


def test_haproxy_judges_what_is_printed(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    done = CliRunner().invoke(program, ["lb", "config", "--check", "--lb-config", str(file)])
    assert done.exit_code == 0, done.output
    assert done.stdout == haproxy_config(load(file, {}))


def test_what_haproxy_refuses_is_not_printed(tmp_path: Path) -> None:
    file = written(tmp_path, GOOD)
    for judge, code in (("false", ExitCode.FAILED), (str(tmp_path / "gone"), ExitCode.UNAVAILABLE)):
        assert (
            refused("lb", "config", "--check", "--haproxy", judge, "--lb-config", str(file)).exit_code is code
        )


@pytest.mark.parametrize("command", [("lb", "config"), ("lb", "watchdog"), ("lb-agent",)])
def test_without_its_settings_nothing_runs(tmp_path: Path, command: tuple[str, ...]) -> None:
    error = refused(*command, "--lb-config", str(tmp_path / "gone.toml"))
    assert error.exit_code is ExitCode.USAGE
    assert "gone.toml" in error.next_step


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    error = refused("lb-agent", "--lb-config", str(written(tmp_path, GOOD)))
    assert error.exit_code is ExitCode.USAGE
    assert "root.pem" in error.cause


def test_a_watchdog_needs_haproxys_socket(tmp_path: Path) -> None:
    error = refused("lb", "watchdog", "--lb-config", str(written(tmp_path, GOOD)))
    assert error.exit_code is ExitCode.USAGE
    assert "stats_socket" in error.cause

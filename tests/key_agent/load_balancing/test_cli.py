"""The commands of the load balancer's machine, which has no key agent."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from key_agent.cli import program
from key_agent.load_balancing.haproxy_config import haproxy_config
from key_agent.load_balancing.settings import load
from key_agent.load_balancing.sights import AgentSight, LbStatus, ServerSight, Word
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


@pytest.mark.parametrize("command", [("lb", "config"), ("lb", "watchdog"), ("lb", "status"), ("lb-agent",)])
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


@contextlib.contextmanager
def answering(line: bytes) -> Iterator[int]:
    """In an lb-agent's place: one question is answered by *line*."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(30)

        def answer() -> None:
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                with connection:
                    asked.append(connection.recv(64))
                    connection.sendall(line)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()
    assert asked == [b"?status\n"]


def test_status_shows_why_rows_are_not_believed(tmp_path: Path) -> None:
    found = LbStatus(
        load_balancer="lb-1",
        term=0,
        epoch=0,
        stale="no agent's rows were believed since this program began",
        agents=(AgentSight(agent="agent-a", word=Word.DOUBTED, cause="rows of other instead of acme"),),
        servers=(
            ServerSight(server="a-1", environment="a", state=None, says="active", answer="down #unknown"),
            ServerSight(
                server="b-1",
                environment="b",
                state="active",
                says="draining",
                reason="slow: no answer",
                answer="drain",
            ),
        ),
    )
    file = written(tmp_path, GOOD)
    with answering(msgspec.json.encode(found) + b"\n") as port:
        words = ["lb", "status", "--lb-config", str(file)]
        done = CliRunner().invoke(program, words, env={"KEY_AGENT_LB__LB_AGENT__PORT": str(port)})
    assert done.exit_code == 0, done.output
    assert "EVERY SERVER IS DOWN" in done.stdout
    assert "agent-a  doubted: rows of other instead of acme (never heard)" in done.stdout
    assert "a-1  down #unknown" in done.stdout
    assert "b-1  drain  (b: active; itself: draining, slow: no answer)" in done.stdout


@pytest.mark.parametrize("line", [b"", b"down #unknown\n", b'{"load_balancer": 7}\n'])
def test_what_is_no_status_is_not_shown(tmp_path: Path, line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path, GOOD)
    with answering(line) as port:
        monkeypatch.setenv("KEY_AGENT_LB__LB_AGENT__PORT", str(port))
        error = refused("lb", "status", "--lb-config", str(file))
    assert error.exit_code is ExitCode.UNAVAILABLE
    assert "does not answer" in error.cause

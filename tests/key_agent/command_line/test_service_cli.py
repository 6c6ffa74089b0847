"""What `key-agent service add` tells an administrator about the service's key."""

from pathlib import Path

import pytest

from key_agent.cli import program
from key_agent.command_line import service_cli
from runtime import cli


@pytest.mark.parametrize(
    ("new_key", "said"),
    [
        ("5d" * 16, f"acme/s3 at p1: new key {'5d' * 16}\n"),
        # One of several environments: the manager may just have made it. "exists already" was not true there.
        (None, "acme/s3 at p1: with the keys that the service has\n"),
    ],
    ids=["made-here", "not-made-here"],
)
def test_no_key_is_said_to_have_been_there_before(
    new_key: str | None,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def perform(_context: object, command: str, **_arguments: object) -> dict[str, object]:
        assert command == "service_add"
        return {"service": "acme/s3", "proxy": "p1", "new_key": new_key, "proxies": []}

    monkeypatch.setattr(service_cli, "perform", perform)
    certificate = tmp_path / "s3.pem"
    certificate.write_text("the agent judges it")
    assert (
        cli.main(program, ["service", "add", "s3", "--proxy", "p1", "--certificate", str(certificate)]) == 0
    )
    assert capsys.readouterr().out.startswith(said)

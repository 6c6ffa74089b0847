"""A proxy's installation below one directory, and the command line that works on it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy import cli, config
from runtime import cli as runtime_cli
from tests.pki import issue_server, make_server_ca, write_certificate, write_credential
from tests.ports import free_port

CONFIG = """\
[proxy]
id = "proxy-1"
state_dir = "state"
reload_s = 0.1

[push]
host = "127.0.0.1"
port = {push_port}
certificate_file = "push.pem"
key_file = "push.key"

[health]
port = {health_port}
"""


@dataclass
class Installation:
    path: Path
    config_file: Path
    ca_file: Path
    capsys: pytest.CaptureFixture[str]

    @classmethod
    def make(cls, path: Path, capsys: pytest.CaptureFixture[str]) -> "Installation":
        ca = make_server_ca()
        write_credential(issue_server(ca), path, "push")
        ca_file = write_certificate(ca.certificate, path / "push-ca.pem")
        config_file = path / "sealgate.toml"
        config_file.write_text(CONFIG.format(push_port=free_port(), health_port=free_port()))
        return cls(path, config_file, ca_file, capsys)

    @property
    def state_dir(self) -> Path:
        return self.path / "state"

    def settings(self) -> config.Settings:
        return config.load(self.config_file, {})

    def run(self, *argv: str, as_json: bool = False) -> tuple[int, str, str]:
        """Exit code, stdout, stderr of `sealgate`."""
        self.capsys.readouterr()
        words = ["--config", str(self.config_file), *argv, *(["--json"] if as_json else [])]
        code = runtime_cli.main(cli.program, words)
        out, err = self.capsys.readouterr()
        return code, out, err

    def ask(self, *argv: str) -> Any:
        """The result as JSON; the command must succeed."""
        code, out, err = self.run(*argv, as_json=True)
        assert code == 0, err
        return json.loads(out)

    def refused(self, *argv: str) -> tuple[int, dict[str, Any]]:
        """Exit code and error of a command that must fail, and say nothing on stdout."""
        code, out, err = self.run(*argv, as_json=True)
        assert code != 0
        assert out == ""
        error: dict[str, Any] = json.loads(err)["error"]
        assert error["exit_code"] == code
        assert error["cause"]
        assert error["next_step"]
        return code, error

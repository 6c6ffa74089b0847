"""The units in deploy/systemd say what docs/threat-model.md promises of the processes' memory and rights."""

import configparser
from pathlib import Path
from typing import Final

import pytest
from typer.testing import CliRunner

from key_agent import config
from key_agent.cli import program as program_of_the_agent
from runtime.cli import CommandError
from tests import pki

UNITS: Final = Path(__file__).parents[2] / "deploy/systemd"
HARDENING: Final = {
    "LimitMEMLOCK": "infinity",
    "LimitCORE": "0",
    "MemorySwapMax": "0",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectProc": "invisible",
    "PrivateTmp": "yes",
    "PrivateDevices": "yes",
    "ProtectHome": "yes",
    "RestrictNamespaces": "yes",
    "UMask": "0077",
    "StateDirectoryMode": "0700",
    "Type": "exec",
}


def read(path: Path) -> dict[str, list[str]]:
    """The [Service] section: every value of every directive."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#") and section == "Service":
            name, equals, value = line.partition("=")
            assert equals, line
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("unit", ["key-agent", "sealgate"])
def test_the_units_are_hardened(unit: str) -> None:
    service = read(UNITS / f"{unit}.service")
    assert {name: service[name] for name in HARDENING} == {name: [value] for name, value in HARDENING.items()}
    assert service["User"] != ["root"]
    # mlockall and setrlimit are what `harden_process` needs; the filter must not take them away.
    assert any("mlockall" in value and not value.startswith("~") for value in service["SystemCallFilter"])
    program = "/opt/sealgate/bin/" + unit
    assert service["ExecStart"][0].startswith(program + " --config ")
    assert service["ExecStart"][0].endswith(" run")
    assert service["ExecStartPre"][0].startswith(program)
    assert service["ExecStartPre"][0].endswith(" --check-config")
    # The documents say `systemctl reload`; without this line systemd refuses it.
    assert service["ExecReload"] == ["/bin/kill -HUP $MAINPID"]


@pytest.mark.parametrize(
    ("unit", "command"), [("sealgate-lb-agent", "lb-agent"), ("sealgate-lb-watchdog", "lb watchdog")]
)
def test_the_units_beside_haproxy_are_hardened_and_name_commands_that_exist(unit: str, command: str) -> None:
    service = read(UNITS / f"{unit}.service")
    wanted = HARDENING.keys() - {
        "LimitMEMLOCK",
        "MemorySwapMax",
        "StateDirectoryMode",
    }  # no key material here
    assert {name: service[name] for name in wanted} == {name: [HARDENING[name]] for name in wanted}
    assert service["User"] == ["sealgate-lb"]
    program, *words = service["ExecStart"][0].split()
    assert program == "/opt/sealgate/bin/key-agent"
    assert words == [*command.split(), "--lb-config", "/etc/sealgate/lb-agent.toml"]
    error = CliRunner().invoke(program_of_the_agent, [*words[:-1], str(UNITS / "gone.toml")]).exception
    assert isinstance(error, CommandError)  # the command and its option are there, the settings are not
    assert "gone.toml" in str(error)


def test_the_pin_as_a_credential_reaches_the_settings(tmp_path: Path) -> None:
    dropin = read(UNITS / "key-agent.service.d/pin-credential.conf")
    [credential] = dropin["LoadCredential"]
    [assignment] = dropin["Environment"]
    variable, _, value = assignment.partition("=")
    name, _, source = credential.partition(":")
    assert value == f"%d/{name}"
    assert source == "/etc/sealgate/key-agent/pin"
    tenant = pki.make_tenant("acme")
    pki.write_certificate(tenant.root.certificate, tmp_path / "root.pem")
    file = tmp_path / "key-agent.toml"
    file.write_text("""
        [agent]
        id = "hq"
        tenant = "acme"
        environment_id = "main"
        root_certificate_file = "root.pem"
        [signing]
        certificate_file = "signing.pem"
        key_file = "signing.key"
        [tls]
        certificate_file = "tls.pem"
        key_file = "tls.key"
        [pkcs11]
        module_path = "/usr/lib/softhsm/libsofthsm2.so"
        token_label = "sealgate"
        pin_file = "elsewhere"
    """)
    settings = config.load(file, {variable: value.replace("%d", "/run/credentials/key-agent.service")})
    assert settings.pkcs11 is not None
    assert settings.pkcs11.pin_file == Path("/run/credentials/key-agent.service/pin")


def test_units_can_be_parsed() -> None:
    """No directive in a section that systemd does not know."""
    for path in [*UNITS.glob("*.service"), *UNITS.glob("*/*.conf")]:
        parser = configparser.RawConfigParser(strict=False, interpolation=None)
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read(path)
        assert set(parser.sections()) <= {"Unit", "Service", "Install"}

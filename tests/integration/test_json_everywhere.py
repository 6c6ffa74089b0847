"""`--json` at every command of both programs: a document on success, one on error, exit codes as documented.

A command that is not in these walks makes them fail: whoever adds one adds it here.
"""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from key_agent import cli as agent_cli
from proxy import cli as proxy_cli
from runtime import cli
from runtime.cli import ExitCode
from tests.key_agent import test_agent_softhsm as rig
from tests.key_agent.test_agent_softhsm import AGENT_ID, S3, Site, until
from tests.pki import Tenant, make_tenant, write_certificate
from tests.proxy.encryption_service.test_cli import settings_file, sign
from tests.proxy.installation import Installation

site = rig.site
PROGRAMS: Final = {"key-agent": agent_cli.program, "sealgate": proxy_cli.program}
# Serve until they are told to stop: their results are logs (tests/integration/test_kill_switch.py).
SERVING: Final = {"run"}
# About several environments: walked with three of them (tests/environments, tests/key_agent/load_balancing).
OF_SEVERAL: Final = {"env", "incident", "approval", "admin", "keys", "lb", "lb-agent"}


def commands_of(program: typer.Typer) -> set[str]:
    def below(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
        if not hasattr(command, "commands"):
            yield " ".join(path)
            return
        for name, each in command.commands.items():
            yield from below(each, (*path, name))

    return set(below(typer.main.get_command(program)))


EVERY: Final = [
    (name, command) for name, program in PROGRAMS.items() for command in sorted(commands_of(program))
]


@pytest.mark.parametrize(("program", "command"), EVERY)
def test_wrong_use_is_told_as_json(program: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(PROGRAMS[program], [*command.split(), "--json", "--no-such-option"])
    out, err = capsys.readouterr()
    assert (code, out) == (ExitCode.USAGE, "")
    error = json.loads(err)["error"]
    assert error["exit_code"] == code
    assert error["code"] == "usage"
    assert error["next_step"] == f"see {program} {command} --help"


@pytest.mark.parametrize(("program", "command"), EVERY)
def test_a_configuration_that_is_not_there_is_told_as_json(
    program: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if (program, command) in {
        ("key-agent", "init"),
        ("key-agent", "approval sign-file"),
        ("key-agent", "incident verify"),
        ("key-agent", "env sign"),
        ("key-agent", "env promote"),
        ("key-agent", "env recover"),
        ("sealgate", "errors"),
        ("sealgate", "inspect"),
        ("sealgate", "profile list"),
        ("sealgate", "profile show"),
    }:
        return  # they need none, or look at their file first
    file = tmp_path / "file"
    file.write_text(json.dumps({}))
    given = {
        "--proxy": "p1", "--certificate": str(file), "--url": "https://p1:8444", "--ca": str(file),
        "--root": str(file), "--upstream": "https://drive.example", "--csr": str(tmp_path / "csr"),
        "--label": "x", "--settings": str(file), "KID": "0" * 32, "DIALECT": "transit",
        "--public-key": str(file), "--key": str(file), "--signature": str(file), "--connector": str(file),
        "-o": str(tmp_path / "new"), "--until": "2030-01-01T00:00Z", "FILE": str(file),
    }  # fmt: skip
    words = [*command.split()]
    for parameter in _required(PROGRAMS[program], command):
        value = given.get(parameter, "acme/s3")
        words += [parameter, value] if parameter.startswith("-") else [value]
    if any("--yes" in parameter.opts for parameter in _parameters(PROGRAMS[program], command)):
        words.append("--yes")
    if (program, command) in {
        ("key-agent", "backup export"),
        ("key-agent", "env promotion"),
        ("key-agent", "env recovery"),
    }:
        words[-1] = str(tmp_path / "new")
    code = cli.main(PROGRAMS[program], [*words, "--json", "--config", str(tmp_path / "none.toml")])
    out, err = capsys.readouterr()
    if command == "doctor":  # which says that as one of its checks
        assert [check["outcome"] for check in json.loads(out)["checks"]] == ["failed"]
        assert code == ExitCode.FAILED
        return
    assert (code, out) == (ExitCode.USAGE, "")
    assert json.loads(err)["error"]["exit_code"] == code


def _required(program: typer.Typer, command: str) -> Iterator[str]:
    for parameter in _parameters(program, command):
        if parameter.required:
            yield parameter.opts[0] if parameter.param_type_name == "option" else str(parameter.name).upper()


def _parameters(program: typer.Typer, command: str) -> list[Any]:
    found: Any = typer.main.get_command(program)
    for name in command.split():
        found = found.commands[name]
    return list(found.params)


# --- the proxy's commands, on an installation ---


def test_the_proxys_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], acme: Tenant) -> None:
    installation = Installation.make(tmp_path, capsys)
    done: set[str] = set()

    def ask(command: str, *words: str) -> Any:
        done.add(command)
        return installation.ask(*command.split(), *words)

    root = str(write_certificate(acme.root.certificate, tmp_path / "root.pem"))
    drive, orders = str(tmp_path / "drive.csr"), str(tmp_path / "orders.csr")
    ask("tenant add", "acme", "--root", root)
    ask("tenant update", "acme", "--forward-listen", "127.0.0.1:3128")
    ask("tenant ca", "acme")
    ask("tenant access", "acme", "--require", "credentials")
    ask("user add", "acme/alice")
    assert [user["user"] for user in ask("user list", "acme")["users"]] == ["acme/alice"]
    ask("user remove", "acme/alice")
    ask("service add", "acme/drive", "--upstream", "https://drive.example.com", "--csr", drive)
    ask("service import-cert", "acme/drive", sign(acme, Path(drive)))
    ask("service update", "acme/drive", "--upstream", "https://other.example.com")
    ask("service renew", "acme/drive", "--csr", str(tmp_path / "drive-2.csr"))
    ask("service add", "acme/s3", "--upstream", "https://s3.example.com", "--profile", "s3",
        "--csr", str(tmp_path / "s3.csr"))  # fmt: skip
    secret = tmp_path / "secret.txt"
    secret.write_text("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY\n")
    secret.chmod(0o600)
    ask("s3-credential add", "acme/s3", "AKIAIOSFODNN7EXAMPLE", "--secret-file", str(secret))
    ask("s3-credential list", "acme/s3")
    ask("s3-credential remove", "acme/s3", "AKIAIOSFODNN7EXAMPLE")
    ask("service add", "acme/blobs", "--upstream", "https://mystorage.blob.core.windows.net",
        "--profile", "azure-blob", "--csr", str(tmp_path / "blobs.csr"))  # fmt: skip
    secret.write_text(base64.b64encode(bytes(range(64))).decode())
    ask("azure-credential add", "acme/blobs", "mystorage", "--key-file", str(secret))
    ask("azure-credential list", "acme/blobs")
    ask("azure-credential remove", "acme/blobs", "mystorage")
    ask("key add", "acme/orders", "--csr", orders)
    ask("key import-cert", "acme/orders", sign(acme, Path(orders)))
    ask("key renew", "acme/orders", "--csr", str(tmp_path / "orders-2.csr"))
    ask("key block", "acme/orders")
    ask("key unblock", "acme/orders")
    ask("key list")
    ask("dialect enable", "acme", "native")
    stores = {"stores": [{"prefix": "a1b2c3", "keys": {"key-1": "orders"}}]}
    ask("dialect set", "acme", "xks", "--settings", settings_file(installation, stores))
    ask("dialect new-prefix")
    ask("dialect list")
    ask("dialect disable", "acme", "xks")
    issued = ask("credential issue", "acme", "native", "--label", "x")["credential"]
    ask("credential list")
    second = ask("credential rotate", issued["id"], "--overlap", "24h")["credential"]
    ask("credential revoke", second["id"])
    ask("credential rotate-file-key")
    ask("list")
    ask("history")
    ask("errors")
    ask("profile list")
    ask("profile show", "generic")
    plain = tmp_path / "plain"
    plain.write_bytes(b"hello")
    ask("inspect", str(plain))
    ask("key add", "acme/other", "--csr", str(tmp_path / "other.csr"))
    ask("key remove", "acme/other")
    ask("service remove", "acme/drive")
    ask("service remove", "acme/s3")
    ask("service remove", "acme/blobs")
    other = str(write_certificate(make_tenant("globex").root.certificate, tmp_path / "other.pem"))
    ask("tenant add", "globex", "--root", other)
    ask("tenant remove", "globex")
    # The log is the proxy's, and it has not run: what there is of it is told all the same.
    (installation.state_dir / "audit.jsonl").touch(mode=0o600)
    ask("audit verify")
    code, out, err = installation.run("doctor", as_json=True)
    done.add("doctor")
    assert isinstance(json.loads(out)["checks"], list)
    assert code == (json.loads(err)["error"]["exit_code"] if err else 0)
    assert done == commands_of(PROGRAMS["sealgate"]) - SERVING


# --- the agent's commands, on a real HSM ---


async def test_the_agents_commands(site: Site) -> None:
    done: set[str] = set()

    async def ask(command: str, *words: str) -> Any:
        done.add(command)
        return await site.command(*command.split(), *words)

    await ask(
        "init", "--tenant", "acme", "--agent", AGENT_ID, "--module", str(site.hsm.module),
        "--token-label", site.hsm.label, "--state-dir", str(site.state_dir),
        "--files-dir", str(site.directory / "key-agent"),
    )  # fmt: skip
    await ask("kek create")
    async with site.running():
        certificate = str(site.directory / "s3.pem")
        url = ["--url", site.server.url, "--ca", str(site.directory / "proxy-ca.pem")]
        await ask("proxy add", "p1", *url)
        await ask("proxy list")
        await ask("service add", "s3", "--proxy", "p1", "--certificate", certificate)
        await until(lambda: site.proxy.valid_keys(S3))
        await ask("service set", "s3", "--rotate-after-days", "30")
        await ask("service list")
        old = (await ask("key list", "s3"))["keys"][0]["kid"]
        await ask("rotate", "s3")
        new = next(key["kid"] for key in (await ask("key list", "s3"))["keys"] if key["state"] == "active")
        await ask("key suspend", "s3", new, "--reason", "looked at")
        await ask("key resume", "s3", new)
        await ask("key compromise", "s3", old, "--yes")
        await ask("key destroy", "s3", old, "--confirm", old)
        await ask("key deactivate", "s3", new, "--yes")
        file = str(site.directory / "keys.backup")
        await ask("backup export", file)
        await ask("backup import", file, "--try")
        await ask("kek status")
        await ask("kek rotate", "--yes")
        assert (await ask("status"))["standing"] == "consented"
        assert (await ask("doctor"))["ok"]
        await ask("audit verify")
        # What would lose something is refused without a yes, in JSON as well: nobody is asked.
        for words in (["kek", "revoke"], ["service", "remove", "s3"], ["kek", "rotate"]):
            assert (await site.command(*words, exit_code=3))["code"] == "not-confirmed"
        await ask("service remove", "s3", "--yes")
        await ask("proxy remove", "p1")
        await ask("kek revoke", "--yes")
        await ask("reinstate", "--yes")
    elsewhere = {name for name in commands_of(PROGRAMS["key-agent"]) if name.split()[0] in OF_SEVERAL}
    assert done == commands_of(PROGRAMS["key-agent"]) - SERVING - elsewhere


@pytest.mark.parametrize("program", PROGRAMS)
def test_errors_of_run_are_json_too(program: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            str(Path(sys.executable).parent / program),
            "--json",
            "run",
            "--config",
            str(tmp_path / "none.toml"),
        ],
        capture_output=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (ended.returncode, ended.stdout) == (ExitCode.USAGE, b"")
    assert json.loads(ended.stderr.splitlines()[-1])["error"]["exit_code"] == ExitCode.USAGE

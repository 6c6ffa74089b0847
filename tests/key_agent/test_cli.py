"""The command line: exit codes and answers that scripts rely on. (With a real HSM: test_agent_softhsm.py.)"""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from key_agent import doctor
from key_agent.cli import program
from key_agent.command_line.status_cli import lifetime_text, rotation_text, status_text
from key_agent.command_line.wording import counted, outcomes_text, time_text
from runtime import cli
from runtime.doctor import Check, as_text
from tests.key_agent.conftest import Bench
from tests.pki import Tenant, write_certificate, write_credential


@pytest.fixture
def config_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = tmp_path / "key-agent.toml"
    code = _run(
        *(
            "--config",
            path,
            "init",
            "--tenant",
            "acme",
            "--agent",
            "hq",
            "--module",
            "/nonexistent/module.so",
        ),
        *("--token-label", "t", "--state-dir", tmp_path / "state", "--files-dir", tmp_path / "files"),
    )
    assert code == 0
    assert "signing.key" in capsys.readouterr().out
    return path


def _run(*words: object) -> int:
    return cli.main(program, [str(word) for word in words])


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, ("key",), "0 keys"),
        (1, ("key",), "1 key"),
        (2, ("key",), "2 keys"),
        (3, ("proxy", "proxies"), "3 proxies"),
    ],
)
def test_numbers_agree_with_their_nouns(number: int, noun: tuple[str, ...], text: str) -> None:
    assert counted(number, *noun) == text


def test_check_config(
    config_file: Path, tmp_path: Path, acme: Tenant, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    assert _run("--config", config_file, "--check-config") == 2
    told = capsys.readouterr().err
    for name in ("root.pem", "signing.pem", "signing.key", "tls.pem", "tls.key", "pin", "module.so"):
        assert name in told
    write_certificate(acme.root.certificate, files / "root.pem")
    write_credential(acme.agent_signing("hq"), files, "signing")
    write_credential(acme.agent_tls("hq"), files, "tls")
    (files / "pin").touch(mode=0o644)
    (files / "pin").write_text("1234\n")
    config_file.write_text(config_file.read_text().replace("/nonexistent/module.so", str(files / "root.pem")))
    assert _run("--config", config_file, "--check-config") == 2
    assert "pkcs11.pin_file" in (told := capsys.readouterr().err)
    assert "chmod 600" in told
    (files / "pin").chmod(0o600)
    assert _run("--config", config_file, "--json", "--check-config") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    config_file.write_text(config_file.read_text().replace("watch_s = 5 ", "watch = 5 "))
    assert _run("--config", config_file, "--check-config") == 2
    error = capsys.readouterr().err
    assert "refresh.watch" in error
    assert "watch_s" in error


def test_a_missing_configuration_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--config", tmp_path / "none.toml", "--json", "status") == 2
    told = json.loads(capsys.readouterr().err)["error"]
    assert "does not exist; --config FILE names another" in told["cause"]


@pytest.mark.parametrize("words", [(), ("unknown",), ("kek",), ("service", "add", "s3"), ("proxy", "add")])
def test_usage_errors(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*words) == 2
    assert "next:" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("kek", "revoke"), ("service", "remove", "s3"), ("reinstate",), ("run",)])
def test_every_command_explains_itself(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*words, "--help") == 0
    assert len(capsys.readouterr().out) > 100


def test_what_erases_keys_is_not_done_without_a_yes(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--config", config_file, "--json", "service", "remove", "s3") == 3
    told = json.loads(capsys.readouterr().err)["error"]
    assert told["code"] == "not-confirmed"
    assert "unreadable" in told["cause"]
    assert "--yes" in told["next_step"]


def test_doctor_names_every_missing_file_and_how_to_mend_it(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--config", config_file, "--json", "doctor") == 1
    captured = capsys.readouterr()
    checks = {check["name"]: check for check in json.loads(captured.out)["checks"]}
    assert checks["state_dir"]["outcome"] == "ok"
    for name in ("signing.key_file", "tls.key_file", "pkcs11.pin_file", "pkcs11.module_path",
                 "agent.root_certificate_file"):  # fmt: skip
        assert checks[name]["outcome"] == "failed", name
        assert checks[name]["mend"], name
    assert "checks failed" in captured.err


def test_doctor_sees_open_modes_and_foreign_certificates(
    config_file: Path, tmp_path: Path, acme: Tenant, globex: Tenant, capsys: pytest.CaptureFixture[str]
) -> None:
    files = tmp_path / "files"
    write_certificate(acme.root.certificate, files / "root.pem")
    write_credential(globex.agent_signing("hq"), files, "signing")
    write_credential(acme.agent_signing("hq"), files, "tls")
    (files / "pin").touch(mode=0o600)
    (files / "pin").write_text("1234\n")
    (files / "pin").chmod(0o640)
    (tmp_path / "state").chmod(0o755)
    assert _run("--config", config_file, "--json", "doctor") == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert "chmod 600" in checks["pkcs11.pin_file"]["mend"]
    assert "chmod 700" in checks["state_dir"]["mend"]
    assert checks["signing.certificate_file"]["detail"].startswith("tenant:")
    assert checks["tls.certificate_file"]["detail"].startswith("role:")
    assert checks["agent.root_certificate_file"]["outcome"] == "ok"
    assert "1234" not in json.dumps(checks)


@pytest.mark.parametrize("hosts", [[], ["hq.example"]], ids=["no-host", "host"])
def test_doctor_sees_a_certificate_that_peers_will_not_speak_to(
    config_file: Path,
    tmp_path: Path,
    acme: Tenant,
    capsys: pytest.CaptureFixture[str],
    hosts: list[str],
) -> None:
    files = tmp_path / "files"
    write_certificate(acme.root.certificate, files / "root.pem")
    write_credential(acme.agent_tls("hq", hostnames=hosts), files, "tls")
    name = "tls.certificate_file for peers"
    assert _run("--config", config_file, "--json", "doctor") == 1
    assert name not in capsys.readouterr().out  # the only environment: nobody has to speak to it
    config_file.write_text(config_file.read_text() + "\n[environments]\nport = 8330\n")
    assert _run("--config", config_file, "--json", "doctor") == 1
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["tls.certificate_file"]["outcome"] == "ok"
    assert checks[name]["outcome"] == ("ok" if hosts else "failed")


async def test_doctor_reads_the_agents_diagnosis(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations, "s3")
        checks = _diagnosed(await operations.diagnosis())
        assert {check.outcome for check in checks} == {"ok"}, as_text(checks)
        # Another certificate at the proxy, another service unknown there, a clock that is off, a dead proxy.
        bench.host("s3")
        proxy = bench.proxy()
        found = {check.name: check for check in _diagnosed(await operations.diagnosis())}
        assert found["acme/s3 at p1"].outcome == "failed"
        assert "another certificate" in found["acme/s3 at p1"].detail
        proxy.services.clear()
        found = {check.name: check for check in _diagnosed(await operations.diagnosis())}
        assert "does not host" in found["acme/s3 at p1"].detail
        proxy.down = True
        found = {check.name: check for check in _diagnosed(await operations.diagnosis())}
        assert found["proxy p1"].outcome == "failed"
        assert "unreachable" in found["proxy p1"].detail
        kek = operations._agent.consent.kek
        assert kek is not None
        bench.source.disable(kek)
        found = {check.name: check for check in _diagnosed(await operations.diagnosis())}
        assert "reinstate --restore" in str(found["kek"].mend)


def test_doctor_says_how_to_mend_a_proxy_that_is_another_one() -> None:
    proxy = {"proxy": "p1", "url": "https://x:1", "reachable": False, "code": "wrong-proxy", "error": "other"}
    [check] = doctor._proxies({"proxies": [proxy], "links": []})
    assert check.outcome == "failed"
    assert "key-agent proxy add p1 --url" in str(check.mend)
    assert "key-agent proxy remove p1" in str(check.mend)
    [check] = doctor._proxies({"proxies": [proxy | {"code": "tls"}], "links": []})
    assert "its authority" in str(check.mend)


@pytest.mark.parametrize(("ahead_s", "said"), [(31.0, "31.0 s ahead of"), (-31.0, "31.0 s behind")])
def test_doctor_says_which_clock_is_ahead(ahead_s: float, said: str) -> None:
    proxy = {"proxy": "p1", "url": "https://x:1", "reachable": True, "clock_ahead_s": ahead_s}
    check = next(doctor._proxies({"proxies": [proxy], "links": []}))
    assert (check.outcome, said in check.detail) == ("failed", True)


def _diagnosed(found: Any) -> list[Check]:
    return [*doctor._hsm(found), *doctor._certificates(found), *doctor._proxies(found)]


async def test_the_status_page_tells_what_matters(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await bench.provision(operations)
        text = status_text(await operations.status())
        assert "consent: consented" in text
        assert re.search(r"p1: valid for 3[23]\d s, acknowledged 2027-", text)
        await bench.clock.advance(100)
        assert re.search(r"p1: valid for 2[23]\d s", status_text(await operations.status())), "a countdown"
        kek = agent.consent.kek
        assert kek is not None
        bench.proxy().down = True
        bench.source.destroy(kek)
        await bench.clock.advance(5)
        text = status_text(await operations.status())
        assert "consent: revoked" in text
        assert "kek_destroyed" in text
        assert "WITHDRAWING, unconfirmed; silent from" in text
        assert "problem: no keys are pushed: revoked" in text


async def test_a_proxy_that_was_removed_leaves_the_status_page_once_it_holds_nothing(bench: Bench) -> None:
    async with bench.agent() as (_, operations):
        await bench.provision(operations)
        assert "p1: valid" in status_text(await operations.status())
        bench.proxy().down = True
        await operations.proxy_remove(proxy="p1")
        assert "p1: WITHDRAWING" in status_text(await operations.status())
        bench.proxy().down = False
        await bench.clock.advance(60)
        assert "p1" not in status_text(await operations.status())


def test_a_failed_push_says_where_to_look() -> None:
    row = {"proxy": "p1", "outcome": "failed", "error": "wrong-proxy: ...", "may_hold_keys_until_ms": None}
    assert "key-agent doctor" in outcomes_text({"proxies": [row]})
    assert "doctor" not in outcomes_text({"proxies": [row | {"outcome": "pending"}]})


def test_times_are_in_utc() -> None:
    assert time_text(0) == "1970-01-01 00:00:00Z"
    assert (
        time_text(int(datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC).timestamp() * 1000)) == "2026-05-04 03:02:01Z"
    )


@pytest.mark.parametrize(
    "words",
    [
        ("rotate",),
        ("key", "list"),
        ("key", "suspend"),
        ("key", "resume"),
        ("key", "deactivate"),
        ("key", "compromise"),
        ("key", "destroy"),
        ("kek", "rotate"),
        ("service", "set"),
        ("backup", "export"),
        ("backup", "import"),
    ],
)
def test_commands_on_keys_explain_themselves(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*words, "--help") == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    "words", [("kek", "rotate"), ("key", "deactivate", "s3", "00"), ("key", "compromise", "s3", "00")]
)
def test_what_cannot_be_undone_is_not_done_without_a_yes(
    words: tuple[str, ...], config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--config", config_file, "--json", *words) == 3
    told = json.loads(capsys.readouterr().err)["error"]
    assert (told["code"], "--yes" in told["next_step"]) == ("not-confirmed", True)


def test_an_existing_file_is_no_backup_to_be(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").write_text("mine")
    assert _run("--config", config_file, "--json", "backup", "export", tmp_path / "there") == 3
    assert "not overwritten" in capsys.readouterr().err
    assert _run("--config", config_file, "--json", "backup", "import", tmp_path / "missing") == 1
    assert (tmp_path / "there").read_text() == "mine"
    assert _run("--config", config_file, "--json", "rotate", "--cancel") == 2


def test_how_a_rotation_and_an_end_are_told() -> None:
    row = {
        "service": "acme/s3",
        "use": "data",
        "new_kid": "ab",
        "phase": "distributing",
        "since_ms": 0,
        "until_ms": 600_000,
        "waiting_for": ["p2"],
        "late": [],
        "problem": None,
    }
    assert rotation_text(row) == (
        "acme/s3 (data) to ab: distributing since 1970-01-01 00:00:00Z; "
        "waits for p2, until 1970-01-01 00:10:00Z at most"
    )
    late = row | {"waiting_for": [], "late": ["p2"], "problem": "does not open"}
    assert rotation_text(late).endswith("; activated without p2; NOT activated: does not open")
    end = {
        "kind": "tls",
        "name": "tls",
        "not_after": "2027-01-01T00:00:00",
        "days_left": 3.2,
        "problem": None,
    }
    assert lifetime_text(end) == "tls: ends 2027-01-01, in 3 days"
    assert lifetime_text(end | {"days_left": -1.0}) == "tls: EXPIRED 2027-01-01"
    assert lifetime_text(end | {"not_after": None, "days_left": None}) == "tls: nobody can tell when it ends"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "in one place"),
        (("--openbao", "https://b:1", "--kmip", "k"), "in one place"),
        (("--kmip", "k", "--token-label", "t"), "in one place"),
        (("--hsm", "softhsm2"), "label is missing"),
        (("--hsm", "nobody", "--token-label", "t"), "no HSM vendor"),
        (("--hsm", "azure", "--token-label", "t"), "no PKCS#11 module"),
        (("--hsm", "luna", "--token-label", "t"), "not where it usually is"),
    ],
)
def test_init_wants_one_key_source(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "agent.toml"
    places = ("--state-dir", tmp_path / "state", "--files-dir", tmp_path / "files")
    code = _run("--config", path, "init", "--tenant", "acme", "--agent", "hq", *words, *places)
    assert code == 2
    assert said in capsys.readouterr().err
    assert not path.exists()


def test_init_finds_the_vendors_library(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    places = ("--state-dir", tmp_path / "state", "--files-dir", tmp_path / "files")
    words = ("--hsm", "softhsm2", "--token-label", "t")
    assert _run("--config", path, "init", "--tenant", "acme", "--agent", "hq", *words, *places) == 0
    assert "libsofthsm2.so" in path.read_text()

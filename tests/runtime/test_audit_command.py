"""`audit verify` of both programs: what a script can rely on."""

import json
from pathlib import Path

import pytest
import typer

from key_agent.cli import program as key_agent
from proxy.cli import program as sealgate
from runtime import cli
from runtime.audit import AuditLog
from runtime.audit_files import RotationSettings, closed_files
from tests.fakes.clock import ManualClock


@pytest.fixture(params=[sealgate, key_agent], ids=["sealgate", "key-agent"])
def program(request: pytest.FixtureRequest) -> typer.Typer:
    found = request.param
    assert isinstance(found, typer.Typer)
    return found


@pytest.fixture
def heads(tmp_path: Path, clock: ManualClock) -> list[str]:
    """The heads after each event of `tmp_path/log`."""
    log = AuditLog.open(tmp_path / "log", clock)
    found = []
    for service in ("acme/drive", "acme/mail", "acme/s3"):
        log.append("service-add", service=service)
        found.append(str(log.head))
    log.close()
    return found


def _run(program: typer.Typer, *words: object) -> int:
    return cli.main(program, ["audit", "verify", *(str(word) for word in words)])


def test_a_sound_log(
    program: typer.Typer, tmp_path: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    before = path.read_bytes()
    assert _run(program, "--file", path, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"file": str(path), "events": 3, "head": heads[-1], "torn_bytes": 0}
    for head in heads:
        assert _run(program, "--file", path, "--expect", head) == 0
    assert heads[-1] in capsys.readouterr().out
    assert path.read_bytes() == before


def test_a_changed_line_is_named(
    program: typer.Typer, tmp_path: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(path.read_bytes().replace(b"mail", b"male"))
    assert _run(program, "--file", path, "--json") == 3
    told = json.loads(capsys.readouterr().err)["error"]
    assert told["code"] == "audit-broken"
    assert "broken at line 2: the event was changed" in told["cause"]
    assert f"mv {path} {path}.broken" in told["next_step"]


def test_a_cut_end_shows_against_a_recorded_head(
    program: typer.Typer, tmp_path: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    assert _run(program, "--file", path) == 0
    assert _run(program, "--file", path, "--expect", heads[1]) == 0
    capsys.readouterr()
    assert _run(program, "--file", path, "--expect", heads[2]) == 3
    assert "event 3 with its recorded hash is not in this chain" in capsys.readouterr().err


def test_what_is_cut_to_nothing_is_refused_where_something_tells_and_said_where_nothing_does(
    program: typer.Typer, tmp_path: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"")
    assert _run(program, "--file", path) == 0
    assert "empty: whether it was cut to nothing only a recorded head can tell" in capsys.readouterr().out
    assert _run(program, "--file", path, "--expect", heads[0]) == 3
    capsys.readouterr()
    path.with_name(f"{path.name}.000000000003").write_bytes(b"")
    assert _run(program, "--file", path) == 3, "there was one before it"


def test_usage(program: typer.Typer, tmp_path: Path, heads: list[str]) -> None:
    assert _run(program, "--file", tmp_path / "none") == 2
    assert _run(program, "--file", tmp_path / "log", "--expect", "3") == 2
    assert _run(program, "--file", tmp_path / "log", "--expect", f"{heads[0]}0") == 2


def test_the_logs_of_worker_processes_are_verified_too(
    tmp_path: Path, heads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "sealgate.toml"
    config.write_text(
        '[proxy]\nid = "p"\nstate_dir = "."\n[push]\ncertificate_file = "a.pem"\nkey_file = "a.key"\n'
    )
    names = ("audit.jsonl", "audit-worker-0.jsonl", "audit-worker-1.jsonl")
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / "log").read_bytes())
    words = ["--config", str(config), "audit", "verify", "--json"]
    assert cli.main(sealgate, words) == 0
    told = json.loads(capsys.readouterr().out)
    files = [told["file"], *(more["file"] for more in told["more"])]
    assert files == [str(tmp_path / name) for name in names]
    assert {told["head"], *(more["head"] for more in told["more"])} == {heads[-1]}
    path = tmp_path / names[2]
    path.write_bytes(path.read_bytes().replace(b"mail", b"male"))
    assert cli.main(sealgate, words) == 3
    assert names[2] in json.loads(capsys.readouterr().err)["error"]["cause"]


def test_the_files_of_a_log_are_one_chain(
    program: typer.Typer, tmp_path: Path, clock: ManualClock, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog.open(path, clock, RotationSettings(max_bytes=4096))
    heads = []
    for number in range(40):
        log.append("object-seal", number=number)
        heads.append(str(log.head))
    log.close()
    oldest, *others = closed_files(path)
    assert _run(program, "--file", path, "--json", "--expect", heads[3]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["head"], told["closed"]) == (heads[-1], 1 + len(others))
    assert "begins_after" not in told
    assert _run(program, "--file", oldest) == 0, "a closed one by itself"
    ended = capsys.readouterr().out.split("head ")[1].split()[0]
    oldest.rename(tmp_path / "elsewhere")
    assert _run(program, "--file", path, "--expect", ended) == 0
    assert f"begins after event {ended}" in capsys.readouterr().out
    assert _run(program, "--file", path, "--expect", heads[0]) == 3
    others[0].write_bytes(others[0].read_bytes().replace(b"seal", b"open", 1))
    assert _run(program, "--file", path, "--json") == 3
    assert others[0].name in json.loads(capsys.readouterr().err.splitlines()[-1])["error"]["cause"]

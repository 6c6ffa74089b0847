import json
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import pytest
import typer

from envelope.certificates import CertificateError
from envelope.errors import FormatError, IntegrityError, KeyUnavailableError, SealgateError, Unavailable
from runtime import cli
from runtime.audit import AuditUnavailableError
from runtime.cli import CommandError, ExitCode
from runtime.settings import SettingsError

ROOT = Path(__file__).parents[2]

ERRORS: dict[str, Exception] = {
    "command": CommandError("the token is missing", "run key-agent init", ExitCode.UNAVAILABLE),
    "coded": CommandError("x", "y", ExitCode.REFUSED, code="kek-revoked"),
    "settings": SettingsError("a.toml", "b.c", value="5", allowed="expected text", line=3),
    "audit": AuditUnavailableError("is full", "free it"),
    "certificate": CertificateError("expired", "too old"),
    "key": KeyUnavailableError(Unavailable.EXPIRED, "no key"),
    "integrity": IntegrityError("bad chunk"),
    "format": FormatError("not ours"),
    "sealgate": SealgateError("hm"),
    "os": FileNotFoundError(2, "No such file or directory", "/no/where"),
    "bug": KeyError("s3cr3t"),
}


@pytest.fixture
def app() -> typer.Typer:
    app = cli.make_app("prog", "A program.")
    group = typer.Typer(help="Things.")
    app.add_typer(group, name="thing")

    @app.callback()
    def options(
        context: typer.Context,
        as_json: Annotated[bool, typer.Option("--json")] = False,
        config: Annotated[str, typer.Option("--config")] = "default",
    ) -> None:
        context.obj = (as_json, config)

    @app.command()
    def fail(name: str) -> None:
        raise ERRORS[name]

    @app.command()
    def show(context: typer.Context) -> None:
        as_json, config = context.obj
        cli.emit({"config": config, "word": "Schlüssel"}, as_json=as_json, text=lambda: f"config is {config}")

    @group.command("add")
    def add(
        context: typer.Context, words: list[str], note: Annotated[str, typer.Option("--note")] = ""
    ) -> None:
        cli.emit([context.obj, words, note], as_json=True, text="")

    @group.command("own")
    def own(mode: Annotated[str, typer.Option("--mode")] = "") -> int:
        return int(mode or "0")

    @app.command()
    def abort() -> None:
        raise typer.Abort

    @app.command()
    def leave() -> None:
        raise typer.Exit(3)

    return app


def run(app: typer.Typer, *argv: str) -> int:
    return cli.main(app, list(argv))


def test_exit_codes_are_stable() -> None:
    assert {code.name: code.value for code in ExitCode} == {
        "OK": 0,
        "FAILED": 1,
        "USAGE": 2,
        "REFUSED": 3,
        "UNAVAILABLE": 4,
    }


def test_results(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "show") == 0
    assert capsys.readouterr() == ("config is default\n", "")
    assert run(app, "--json", "show") == 0
    output, errors = capsys.readouterr()
    assert json.loads(output) == {"config": "default", "word": "Schlüssel"}
    assert errors == ""


@pytest.mark.parametrize(
    "argv",
    [
        ["--json", "--config", "c", "show"],
        ["show", "--json", "--config", "c"],
        ["--config=c", "show", "--json"],
        ["show", "--config=c", "--json"],
        ["--json", "show", "--config", "c"],
    ],
)
def test_the_programs_options_stand_anywhere(
    app: typer.Typer, capsys: pytest.CaptureFixture[str], argv: list[str]
) -> None:
    assert run(app, *argv) == 0
    assert json.loads(capsys.readouterr().out)["config"] == "c"


def test_other_words_stay_where_they_are(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "thing", "add", "--note", "n", "a", "--config", "c", "b", "--", "--json", "--config") == 0
    options, words, note = json.loads(capsys.readouterr().out)
    assert options == [False, "c"]
    assert words == ["a", "b", "--json", "--config"]
    assert note == "n"


def test_an_empty_value(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "show", "--config", "", "--json") == 0
    assert json.loads(capsys.readouterr().out)["config"] == ""


def test_an_option_without_its_value(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "show", "--config") == ExitCode.USAGE
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "exit_code", "text"),
    [
        ("command", 4, "error: the token is missing\n  next: run key-agent init\n"),
        ("settings", 2, "error: a.toml:3: b.c = 5: expected text\n  next: mend the configuration"),
        ("audit", 4, "error: audit log is full\n  next: free it\n"),
        ("certificate", 3, "error: too old\n  next: have the tenant's root"),
        ("key", 4, "error: no key\n  next: check the key agent"),
        ("integrity", 3, "error: bad chunk\n  next: restore"),
        ("format", 3, "error: not ours\n  next: check"),
        ("sealgate", 1, "error: hm\n  next: see the log"),
        ("os", 2, "error: /no/where: No such file or directory\n  next: give"),
        ("bug", 1, "error: internal error: KeyError at test_cli.py:"),
    ],
)
def test_errors_name_cause_and_next_step(
    app: typer.Typer, capsys: pytest.CaptureFixture[str], name: str, exit_code: int, text: str
) -> None:
    assert run(app, "fail", name) == exit_code
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(text)
    assert "\n  next: " in errors
    assert "Traceback" not in errors
    assert "s3cr3t" not in errors


@pytest.mark.parametrize("name", sorted(ERRORS))
def test_errors_in_json(app: typer.Typer, capsys: pytest.CaptureFixture[str], name: str) -> None:
    exit_code = run(app, "fail", name, "--json")
    output, errors = capsys.readouterr()
    assert output == ""
    error = json.loads(errors)["error"]
    assert set(error) == {"code", "cause", "next_step", "exit_code"}
    assert error["exit_code"] == exit_code != 0
    assert error["next_step"]


def test_errors_keep_their_own_code(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    codes = []
    for name in ("coded", "certificate", "command", "bug"):
        run(app, "--json", "fail", name)
        codes.append(json.loads(capsys.readouterr().err)["error"]["code"])
    assert codes == ["kek-revoked", "expired", "unavailable", "internal"]


@pytest.mark.parametrize(
    "argv", [["nothing"], ["show", "--wrong"], ["fail"], ["thing", "add"], ["thing", "nothing"]]
)
def test_wrong_usage(app: typer.Typer, capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert run(app, *argv) == ExitCode.USAGE
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert "\n  next: see prog" in errors
    assert "--help" in errors


def test_help(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "--help") == 0
    assert "A program." in capsys.readouterr().out
    assert run(app, "thing", "add", "--help") == 0
    assert "--note" in capsys.readouterr().out


def test_nothing_asked(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app) == ExitCode.USAGE
    assert "A program." in "".join(capsys.readouterr())


@pytest.fixture
def program(tmp_path: Path) -> typer.Typer:
    """One whose settings are the words of its configuration file, `bad` among them only for a closer look."""

    def read(path: Path, environment: Mapping[str, str]) -> list[str]:
        if not path.exists():
            raise SettingsError(str(path), "", allowed="a file")
        return [*path.read_text().split(), *environment.get("PROG_EXTRA", "").split()]

    def check(settings: list[str]) -> list[str]:
        return ["good ones", "better ones"] if "bad" in settings else []

    program = cli.make_app("prog", "A program.")
    cli.add_options(
        program, default_config=tmp_path / "default", config_variable="PROG_CONFIG", read=read, check=check
    )

    @program.command()
    def show(context: typer.Context) -> None:
        options: cli.Options[list[str]] = context.obj
        options.emit(options.load(), lambda: " ".join(options.load()))

    return program


def test_where_the_configuration_is(
    program: typer.Typer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("default", "of-variable", "of-option"):
        (tmp_path / name).write_text(name)
    assert run(program, "show") == 0
    assert capsys.readouterr().out == "default\n"
    monkeypatch.setenv("PROG_EXTRA", "more")
    monkeypatch.setenv("PROG_CONFIG", str(tmp_path / "of-variable"))
    assert run(program, "show", "--json") == 0
    assert json.loads(capsys.readouterr().out) == ["of-variable", "more"]
    assert run(program, "show", "--config", str(tmp_path / "of-option")) == 0
    assert capsys.readouterr().out == "of-option more\n"


def test_check_config(program: typer.Typer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(program, "--check-config") == ExitCode.USAGE
    assert str(tmp_path / "default") in capsys.readouterr().err
    (tmp_path / "default").write_text("good")
    assert run(program, "--check-config", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"config": str(tmp_path / "default"), "ok": True}
    assert run(program, "--check-config") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'default'}: good, and the files that it names\n"
    (tmp_path / "default").write_text("bad")
    assert run(program, "show") == 0
    capsys.readouterr()
    assert run(program, "--check-config") == ExitCode.USAGE
    assert re.search("good ones\n *better ones", capsys.readouterr().err)


def test_version(program: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a configuration: who asks may have none yet."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(program, "--version") == 0
    assert capsys.readouterr().out == f"prog {version}\n"
    assert run(program, "--version", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"version": version}


def test_options_are_no_command(program: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(program, "--json") == ExitCode.USAGE
    assert json.loads(capsys.readouterr().err)["error"]["cause"] == "no command given"


def test_cancelled(app: typer.Typer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, "abort") == ExitCode.FAILED
    assert capsys.readouterr().err == "error: cancelled\n  next: run the command again\n"


def test_a_command_may_choose_its_code(app: typer.Typer) -> None:
    assert run(app, "leave") == 3
    assert run(app, "thing", "own", "--mode", "4") == 4


def test_a_traceback_for_developers(
    app: typer.Typer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEALGATE_TRACEBACK", "1")
    assert run(app, "fail", "bug") == 1
    assert "Traceback" in capsys.readouterr().err


PROGRAM = """
    import typer
    from runtime import cli
    app = cli.make_app("prog", "A program.")

    @app.callback()
    def options() -> None: pass

    @app.command()
    def many() -> None:
        for number in range(100_000):
            cli.emit(number, as_json=False, text=f"line {number} " + "x" * 100)

    @app.command()
    def wait() -> None:
        import sys, time
        print("waiting", flush=True)
        time.sleep(60)

    @app.command()
    def fail() -> None:
        raise cli.CommandError("a", "b", cli.ExitCode.REFUSED)

    cli.run(app)
"""


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_a_reader_that_goes_away() -> None:
    with start("many") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("line 0")
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr.read() == ""


def test_a_real_process_returns_the_code() -> None:
    with start("fail") as process:
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (3, "error: a\n  next: b\n")


def test_control_c() -> None:
    import signal

    with start("wait") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "error: interrupted\n  next: run the command again\n"

import stat
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from runtime.settings import MAX_SECRET_BYTES, SettingsError, load, read_secret_file


class Level(StrEnum):
    INFO = "info"
    DEBUG = "debug"


class Refresh(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    interval_s: Annotated[int, msgspec.Meta(ge=1)] = 300
    validity_s: int = 330
    jitter: float = 0.1

    def __post_init__(self) -> None:
        if self.validity_s <= self.interval_s:
            raise ValueError("validity_s must be greater than interval_s")


class Hsm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pin_file: Path
    pin: str = ""
    slots: list[int] = []
    enabled: bool = True
    level: Level = Level.INFO
    label: str | None = None


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    port: int


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    name: str
    refresh: Refresh = Refresh()
    hsm: Hsm | None = None
    hosts: list[Host] = []


GOOD = """\
name = "hq"

[refresh]
interval_s = 60  # a comment
validity_s = 70

[hsm]
pin_file = "secrets/pin"
slots = [1, 2]

[[hosts]]
name = "a"
port = 1
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "agent.toml"


def read(file: Path, text: str, **environment: str) -> Settings:
    file.write_text(text)
    return load(file, Settings, environment=environment, prefix="AGENT")


def error(file: Path, text: str, **environment: str) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        read(file, text, **environment)
    return caught.value


def test_a_file(file: Path) -> None:
    settings = read(file, GOOD)
    assert settings.name == "hq"
    assert settings.refresh == Refresh(interval_s=60, validity_s=70)
    assert settings.hsm is not None
    assert settings.hsm.slots == [1, 2]
    assert settings.hosts == [Host("a", 1)]


def test_relative_paths_are_beside_the_file(file: Path, tmp_path: Path) -> None:
    hsm = read(file, GOOD).hsm
    assert hsm is not None
    assert hsm.pin_file == tmp_path / "secrets/pin"
    hsm = read(file, GOOD, AGENT_HSM__PIN_FILE="/run/pin").hsm
    assert hsm is not None
    assert hsm.pin_file == Path("/run/pin")


def test_defaults(file: Path) -> None:
    assert read(file, 'name = "x"') == Settings(name="x")


def test_the_environment_overrides_by_type(file: Path) -> None:
    settings = read(
        file,
        GOOD,
        AGENT__NAME="123",
        AGENT_REFRESH__INTERVAL_S="61",
        AGENT_REFRESH__JITTER="0.5",
        AGENT_HSM__SLOTS="[7]",
        AGENT_HSM__ENABLED="false",
        AGENT_HSM__LEVEL="debug",
        AGENT_HSM__LABEL="5",
        AGENT_CONFIG="not a setting",
        OTHER_REFRESH__INTERVAL_S="x",
        AGENTS_REFRESH__INTERVAL_S="x",
    )
    assert settings.name == "123"
    assert settings.refresh == Refresh(interval_s=61, validity_s=70, jitter=0.5)
    assert settings.hsm is not None
    assert (settings.hsm.slots, settings.hsm.enabled, settings.hsm.level) == ([7], False, Level.DEBUG)
    assert settings.hsm.label == "5"


def test_the_environment_alone_can_fill_a_section(file: Path) -> None:
    settings = read(file, 'name = "x"', AGENT_HSM__PIN_FILE="/pin", AGENT_HOSTS="ignored")
    assert settings.hsm is not None
    assert settings.hsm.pin_file == Path("/pin")
    assert read(file, 'name = "x"', AGENT__HOSTS='[{name = "b", port = 2}]').hosts == [Host("b", 2)]


def test_a_wrong_type_names_all(file: Path) -> None:
    wrong = error(file, GOOD.replace("60 ", '"abc" '))
    assert (wrong.file, wrong.line, wrong.key) == (str(file), 4, "refresh.interval_s")
    assert wrong.value == '"abc"'
    assert str(wrong) == f'{file}:4: refresh.interval_s = "abc": expected `int`, got `str`'


def test_a_limit_names_what_is_allowed(file: Path) -> None:
    wrong = error(file, GOOD.replace("60 ", "0 "))
    assert str(wrong) == f"{file}:4: refresh.interval_s = 0: expected `int` >= 1"


def test_a_choice_names_the_value(file: Path) -> None:
    wrong = error(file, GOOD.replace("slots", 'level = "loud"\nslots'))
    assert str(wrong) == f"{file}:9: hsm.level = \"loud\": invalid enum value 'loud'"


def test_settings_that_must_fit_each_other(file: Path) -> None:
    wrong = error(file, GOOD.replace("= 70", "= 60"))
    assert str(wrong) == f"{file}:3: refresh: validity_s must be greater than interval_s"


def test_an_unknown_key_is_refused_with_a_suggestion(file: Path) -> None:
    wrong = error(file, GOOD.replace("interval_s", "intervall_s"))
    assert str(wrong) == f"{file}:4: refresh.intervall_s: unknown setting; did you mean interval_s?"
    wrong = error(file, GOOD.replace("interval_s", "zzz"))
    assert "unknown setting; known: interval_s, jitter, validity_s" in str(wrong)
    wrong = error(file, GOOD.replace("[refresh]", "[refesh]"))
    assert str(wrong) == f"{file}:3: refesh: unknown setting; did you mean refresh?"


def test_an_unknown_key_in_a_list_of_tables(file: Path) -> None:
    wrong = error(file, GOOD.replace("port", "prot"))
    assert "did you mean port?" in str(wrong)
    assert wrong.line == 13


def test_a_missing_key(file: Path) -> None:
    assert str(error(file, "")) == f"{file}: name: required and not set"
    wrong = error(file, 'name = "x"\n[hsm]\n')
    assert str(wrong) == f"{file}:2: hsm.pin_file: required and not set"


def test_a_path_of_the_wrong_type(file: Path) -> None:
    assert str(error(file, GOOD.replace('"secrets/pin"', "5"))).endswith(
        "hsm.pin_file = 5: expected `Path`, got `int`"
    )
    assert str(error(file, GOOD.replace("secrets/pin", ""))).endswith("expected a path, got an empty string")


def test_the_environments_errors_name_the_variable(file: Path) -> None:
    wrong = error(file, GOOD, AGENT_REFRESH__INTERVAL_S="soon")
    assert str(wrong).startswith('AGENT_REFRESH__INTERVAL_S: refresh.interval_s = "soon": expected int')
    wrong = error(file, GOOD, AGENT_REFRESH__INTERVAL_S="0")
    assert str(wrong) == "AGENT_REFRESH__INTERVAL_S: refresh.interval_s = 0: expected `int` >= 1"
    wrong = error(file, GOOD, AGENT_REFRESH__INTERVAL_S="true")
    assert "expected `int`, got `bool`" in str(wrong)
    wrong = error(file, GOOD, AGENT_REFRESH__INTERVALL_S="1")
    assert "refresh has no setting intervall_s; did you mean interval_s?" in str(wrong)
    wrong = error(file, GOOD, AGENT_REFESH__INTERVAL_S="1")
    assert "the top level has no setting refesh; did you mean refresh?" in str(wrong)
    wrong = error(file, GOOD, AGENT_REFRESH__INTERVAL_S__X="1")
    assert "refresh.interval_s has no setting x" in str(wrong)
    wrong = error(file, 'name = "x"\nrefresh = 3', AGENT_REFRESH__INTERVAL_S="1")
    assert "refresh is not a section in the file" in str(wrong)


def test_an_environment_value_cannot_smuggle_a_second_setting(file: Path) -> None:
    wrong = error(file, GOOD, AGENT_REFRESH__INTERVAL_S="61\nx = 1")
    assert wrong.key == "refresh.interval_s"


@pytest.mark.parametrize("text", ["name = ", "[refresh\n", 'name = "a"\nname = "b"', "\ufeffname = 1"])
def test_what_is_not_toml(file: Path, text: str) -> None:
    wrong = error(file, text)
    assert str(wrong).startswith(f"{file}: not TOML: ")


def test_what_is_not_text(file: Path) -> None:
    file.write_bytes(b'name = "\xff"')
    with pytest.raises(SettingsError, match="not readable as UTF-8"):
        load(file, Settings, environment={}, prefix="AGENT")


def test_no_file(file: Path) -> None:
    with pytest.raises(SettingsError, match="does not exist"):
        load(file, Settings, environment={}, prefix="AGENT")


def test_secrets_are_not_shown(file: Path) -> None:
    wrong = error(file, GOOD.replace("slots", "pin = 12345678\nslots"))
    assert "12345678" not in str(wrong)
    assert "hsm.pin = <not shown>: expected `str`" in str(wrong)


def test_long_values_are_cut(file: Path) -> None:
    assert len(str(error(file, GOOD.replace("60 ", f'"{"x" * 5000}" ')))) < 600


# --- secret files


def secret(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"1234", b"1234"),
        (b"1234\n", b"1234"),
        (b"1234\r\n", b"1234"),
        (b"12 34\n\n", b"12 34\n"),
        (b"1234\r", b"1234\r"),
        (b"\x00\xff", b"\x00\xff"),
    ],
)
def test_a_secret_loses_one_final_newline(tmp_path: Path, content: bytes, expected: bytes) -> None:
    value = read_secret_file(secret(tmp_path / "pin", content))
    assert isinstance(value, bytearray)  # the caller wipes it
    assert value == expected


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o610, 0o644])
def test_a_secret_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = secret(tmp_path / "pin", b"1234", mode)
    with pytest.raises(SettingsError, match=f"mode {mode:04o} .* chmod 600 {path}") as caught:
        read_secret_file(path)
    assert "1234" not in str(caught.value).replace(str(path), "")
    path.chmod(0o400)
    assert read_secret_file(path) == b"1234"


@pytest.mark.parametrize("content", [b"", b"\n", b"\r\n"])
def test_an_empty_secret_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SettingsError, match="empty"):
        read_secret_file(secret(tmp_path / "pin", content))


def test_what_is_no_secret_file(tmp_path: Path) -> None:
    import os

    with pytest.raises(SettingsError, match="No such file"):
        read_secret_file(tmp_path / "missing")
    with pytest.raises(SettingsError, match="regular file"):
        read_secret_file(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(SettingsError, match="regular file"):  # and does not wait for a writer
        read_secret_file(tmp_path / "pipe")
    with pytest.raises(SettingsError, match="at most"):
        read_secret_file(secret(tmp_path / "big", bytes(MAX_SECRET_BYTES + 1)))


def test_the_mode_of_the_target_of_a_link_counts(tmp_path: Path) -> None:
    target = secret(tmp_path / "target", b"1234", 0o644)
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(SettingsError, match="0644"):
        read_secret_file(link)
    assert stat.S_ISLNK(link.lstat().st_mode)

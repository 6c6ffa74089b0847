"""The proxy's settings: what is accepted, what is refused, and what the refusal says."""

from pathlib import Path

import pytest

from proxy import config
from proxy.config import Settings, database_url
from runtime.settings import SettingsError

MINIMAL = """
[proxy]
id = "proxy-1"

[push]
certificate_file = "push.pem"
key_file = "/etc/sealgate/push.key"
"""


def load(tmp_path: Path, text: str = MINIMAL, **environment: str) -> Settings:
    file = tmp_path / "sealgate.toml"
    file.write_text(text)
    return config.load(file, environment)


def test_the_smallest_file(tmp_path: Path) -> None:
    settings = load(tmp_path)
    assert settings.proxy.state_dir == Path("/var/lib/sealgate")
    assert settings.proxy.audit_file == Path("/var/lib/sealgate/audit.jsonl")
    assert settings.push.certificate_file == tmp_path / "push.pem", "relative to the file"
    assert settings.push.key_file == Path("/etc/sealgate/push.key")
    assert settings.keys.validity_s == 330
    assert settings.engine.http2 is True
    assert settings.health.host == "127.0.0.1"
    assert database_url(settings.proxy) == "sqlite:////var/lib/sealgate/directory.db"


def test_the_environment_overrides(tmp_path: Path) -> None:
    settings = load(
        tmp_path, SEALGATE_PROXY__ID="proxy-2", SEALGATE_KEYS__WAIT_S="0.5", SEALGATE_CONFIG="not a setting"
    )
    assert settings.proxy.id == "proxy-2"
    assert settings.keys.wait_s == 0.5
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, SEALGATE_KEYS__WAIT="1")
    assert caught.value.file == "SEALGATE_KEYS__WAIT"
    assert "wait_s" in str(caught.value)


@pytest.mark.parametrize(
    ("addition", "words"),
    [
        ("[keys]\nvalidity = 5\n", ("keys.validity", "unknown")),
        ("[keys]\nvalidity_s = 5\n", ("keys.validity_s", "10", "3600")),
        ("[keys]\nvalidity_s = 20\nwait_s = 20.0\n", ("wait_s", "validity_s")),
        ("[keys]\nvalidity_s = '330'\n", ("keys.validity_s", "int")),
        ("[engine]\ndrain_s = -1\n", ("drain_s", "600")),
        ("[health]\nhost = 'example.com'\n", ("health.host", "IP address")),
        ("[health]\nport = 70000\n", ("health.port", "65535")),
        ("[health]\nhost = '0.0.0.0'\nport = 8443\n", ("push", "health")),
        ("[tenants]\n", ("tenants", "unknown")),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, addition: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, MINIMAL + addition)
    for word in ("sealgate.toml", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('id = "Proxy 1"', ("proxy.id", "not valid")),
        ('id = "p"\nreload_s = 0.0', ("reload_s",)),
        ('id = "p"\ndatabase_url = "mysql://h/d"', ("mysql", "postgresql+psycopg")),
        ('id = "p"\ndatabase_url = "sqlite:///relative.db"', ("absolute",)),
        ('id = "p"\ndatabase_url = "rubbish"', ("not a database URL",)),
        ('id = "p"\ndatabase_url = "sqlite:////a"\ndatabase_url_file = "b"', ("one of them",)),
        ('database_url = "sqlite:////a"', ("proxy.id", "required")),
    ],
)
def test_proxy_settings_that_do_not_fit(tmp_path: Path, line: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, MINIMAL.replace('id = "proxy-1"', line))
    for word in words:
        assert word in str(caught.value)


def test_a_password_stands_in_a_file_of_its_own(tmp_path: Path) -> None:
    url = "postgresql+psycopg://sealgate:hidden-word@db.example/sealgate"
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, MINIMAL.replace('id = "proxy-1"', f'id = "p"\ndatabase_url = "{url}"'))
    assert "database_url_file" in str(caught.value)
    text = MINIMAL.replace('id = "proxy-1"', 'id = "p"\ndatabase_url_file = "database.url"')
    settings = load(tmp_path, text)
    with pytest.raises(SettingsError, match="database"):
        database_url(settings.proxy)
    file = tmp_path / "database.url"
    file.touch(mode=0o600)
    file.write_text(url + "\n")
    assert database_url(settings.proxy) == url
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        database_url(settings.proxy)
    file.chmod(0o600)
    file.write_text("mysql://u:hidden-word@h/d")
    with pytest.raises(SettingsError) as caught:
        database_url(settings.proxy)
    assert "hidden-word" not in str(caught.value)


def test_a_refused_url_with_a_password_is_not_repeated(tmp_path: Path) -> None:
    for url in ("postgresql+psycopg://u:hidden-word@h/d", "mysql://u:hidden-word@h/d"):
        with pytest.raises(SettingsError) as caught:
            load(tmp_path, MINIMAL.replace('id = "proxy-1"', f'id = "p"\ndatabase_url = "{url}"'))
        assert "hidden-word" not in str(caught.value)

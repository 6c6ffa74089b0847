"""Settings: what is written by `init` is good, and what does not fit is refused by name."""

from pathlib import Path

import pytest

from key_agent import config, setup
from runtime.cli import CommandError
from runtime.settings import SettingsError


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "etc" / "key-agent.toml"
    setup.initialise(
        path,
        setup.Answers(
            tenant="acme",
            agent="hq",
            environment="main",
            source=setup.Hsm(
                module=Path("/usr/lib/softhsm/libsofthsm2.so"), token_label='a "quoted" \\ label'
            ),
            state_dir=tmp_path / "state",
            files_dir=tmp_path / "files",
        ),
    )
    return path


def test_what_init_writes_is_accepted(written: Path, tmp_path: Path) -> None:
    settings = config.load(written, {})
    assert (settings.agent.id, settings.agent.tenant, settings.agent.environment_id) == ("hq", "acme", "main")
    assert settings.pkcs11 is not None
    assert settings.pkcs11.token_label == 'a "quoted" \\ label'
    assert (settings.refresh.interval_s, settings.refresh.validity_s, settings.refresh.watch_s) == (
        300,
        330,
        5,
    )
    assert config.database_url(settings.agent) == f"sqlite:///{tmp_path}/state/registry.db"
    for directory in (tmp_path / "state", tmp_path / "files"):
        assert directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        (setup.OpenBaoServer(url="https://bao.example:8200"), ["openbao-token", "openbao-ca.pem"]),
        (setup.KmipServer(host="kmip.example"), ["kmip-ca.pem", "kmip.pem", "kmip.key"]),
        (setup.Hsm(module=Path("/m"), token_label="t", vendor="softhsm2"), ["pin"]),
    ],
)
def test_init_for_any_key_source(
    tmp_path: Path, source: setup.Hsm | setup.OpenBaoServer | setup.KmipServer, missing: list[str]
) -> None:
    path = tmp_path / "key-agent.toml"
    told = setup.initialise(
        path,
        setup.Answers(
            tenant="acme",
            agent="hq",
            environment="main",
            source=source,
            state_dir=tmp_path / "state",
            files_dir=tmp_path / "files",
        ),
    )
    settings = config.load(path, {})
    found = [settings.pkcs11, settings.openbao, settings.kmip]
    assert [section is not None for section in found] == [
        isinstance(source, kind) for kind in (setup.Hsm, setup.OpenBaoServer, setup.KmipServer)
    ]
    assert {str(tmp_path / "files" / name) for name in missing} <= set(told["missing"])  # type: ignore[call-overload]


def test_init_overwrites_nothing(written: Path, tmp_path: Path) -> None:
    before = written.read_text()
    with pytest.raises(CommandError, match="exists"):
        setup.initialise(
            written,
            setup.Answers(
                tenant="globex",
                agent="x",
                environment="main",
                source=setup.Hsm(module=Path("/m"), token_label="t"),
                state_dir=tmp_path / "state",
                files_dir=tmp_path / "files",
            ),
        )
    assert written.read_text() == before


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("KEY_AGENT_REFRESH__VALIDITY_S", "300", "refresh.validity_s"),
        ("KEY_AGENT_REFRESH__INTERVAL_S", "0", "refresh.interval_s"),
        ("KEY_AGENT_REFRESH__WATCH_S", "301", "refresh.watch_s"),
        ("KEY_AGENT_REFRESH__INTERVAL", "30", "interval_s"),
        ("KEY_AGENT_PUSH__BATCH_SIZE", "101", "push.batch_size"),
        ("KEY_AGENT_PUSH__REQUEST_TIMEOUT_S", "0", "push.request_timeout_s"),
        ("KEY_AGENT_PUSH__PRESENCE_S", "0.5", "push.presence_s"),
        ("KEY_AGENT_PUSH__PRESENCE_S", "61", "push.presence_s"),
        ("KEY_AGENT_ADMIN__HOST", "0.0.0.0", "admin.host"),
        ("KEY_AGENT_ADMIN__PORT", "70000", "admin.port"),
        ("KEY_AGENT_AGENT__TENANT", "Acme Inc", "tenant"),
        ("KEY_AGENT_AGENT__ID", "", "agent"),
        ("KEY_AGENT_AGENT__DATABASE_URL", "mysql://h/d", "mysql"),
        ("KEY_AGENT_AGENT__DATABASE_URL", "sqlite:///relative.db", "absolute"),
        ("KEY_AGENT_AGENT__DATABASE_URL", "postgresql+psycopg://u:hunter2@h/d", "database_url_file"),
        ("KEY_AGENT_AGENT__DATABASE_URL", "no url", "database URL"),
    ],
)
def test_what_does_not_fit_is_named(written: Path, variable: str, value: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        config.load(written, {variable: value})


def test_one_key_for_both_roles_is_refused(written: Path) -> None:
    settings = config.load(written, {})
    with pytest.raises(SettingsError, match="different keys"):
        config.load(written, {"KEY_AGENT_TLS__KEY_FILE": str(settings.signing.key_file)})


def test_a_password_may_stand_in_a_file(written: Path, tmp_path: Path) -> None:
    url_file = tmp_path / "database-url"
    url_file.touch(mode=0o600)
    url_file.write_text("postgresql+psycopg://u:hunter2@h/d\n")
    settings = config.load(written, {"KEY_AGENT_AGENT__DATABASE_URL_FILE": str(url_file)})
    assert config.database_url(settings.agent).startswith("postgresql+psycopg://u:")
    url_file.write_text("mysql://u:hunter2@h/d\n")
    with pytest.raises(SettingsError) as caught:
        config.database_url(settings.agent)
    assert "hunter2" not in str(caught.value)
    url_file.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        config.database_url(settings.agent)


def test_two_databases_are_one_too_many(written: Path) -> None:
    with pytest.raises(SettingsError, match="one of them"):
        config.load(
            written,
            {
                "KEY_AGENT_AGENT__DATABASE_URL": "sqlite:////x/y.db",
                "KEY_AGENT_AGENT__DATABASE_URL_FILE": "/x/url",
            },
        )


_ENVIRONMENTS = """
[environments]
port = 8330
heartbeat_s = 1.0
[environments.etcd]
urls = ["https://etcd-a.example:2379", "https://etcd-b.example:2379"]
ca_file = "etcd-ca.pem"
certificate_file = "etcd.pem"
key_file = "etcd.key"
"""


def test_one_of_several_environments(written: Path) -> None:
    assert config.load(written, {}).environments is None
    written.write_text(written.read_text() + _ENVIRONMENTS)
    settings = config.load(written, {"KEY_AGENT_ENVIRONMENTS__HEARTBEAT_S": "2.5"})
    assert settings.environments is not None
    assert settings.environments.heartbeat_s == 2.5
    assert settings.environments.etcd is not None
    assert settings.environments.etcd.urls[1] == "https://etcd-b.example:2379"
    # The files of etcd are looked at as all others are.
    problems = list(config.unusable_files(settings))
    for name in ("ca_file", "certificate_file", "key_file"):
        assert any(f"environments.etcd.{name}" in problem for problem in problems)


@pytest.mark.parametrize(
    ("line", "changed"),
    [
        ("heartbeat_s = 1.0", "heartbeat_s = 16.0"),
        ("port = 8330", "port = 70000"),
        ("port = 8330", "request_timeout_s = 11.0"),
        ("port = 8330", "member = true"),
        ('ca_file = "etcd-ca.pem"', ""),
    ],
)
def test_environments_that_make_no_sense_are_refused(written: Path, line: str, changed: str) -> None:
    written.write_text(written.read_text() + _ENVIRONMENTS.replace(line, changed))
    with pytest.raises(SettingsError, match="environments"):
        config.load(written, {})

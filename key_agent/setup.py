"""`key-agent init`: a configuration to start from, and the directories it names.

1. Nothing is overwritten. No secret is written: the PIN and the keys are for the administrator to put in
   place.
2. What it writes passes `--check-config` once the files that it names are in place.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from envelope.keys import check_name
from key_agent.sources.vendors import GENERIC
from runtime.cli import CommandError, ExitCode

_TEMPLATE: Final = """\
# Sealgate key agent. `key-agent --check-config` checks this file; docs/key-agent.md explains it.
# KEY_AGENT_SECTION__KEY in the environment overrides a setting: KEY_AGENT_REFRESH__INTERVAL_S=60
# Relative paths are relative to this file. Secrets stand in files of their own, mode 0600.

[agent]
# As in the agent's certificates: urn:sealgate:{tenant_plain}:agent:{agent_plain}:signing and :tls
id = {agent}
tenant = {tenant}
# Part of every wrapped key: never changes for this registry.
environment_id = {environment}
# Database, audit log, lock and control socket. 0700, on a local disk.
state_dir = {state_dir}
# The tenant's root: every network service's certificate must hang on it.
root_certificate_file = {root}
# A CRL of the root: revoked certificates get no keys; without a list in date nobody does.
# revocation_list_file = "root.crl"
# The registry is SQLite in state_dir unless one of these names a PostgreSQL:
# database_url = "postgresql+psycopg://agent@db.example/keys"
# database_url_file = "database-url"     # for a URL with a password in it

[signing]
# Signs the envelopes with keys.
certificate_file = {signing_certificate}
key_file = {signing_key}

[tls]
# Shows the proxies who we are.
certificate_file = {tls_certificate}
key_file = {tls_key}

{source}
[refresh]
interval_s = 300      # keys are pushed this often, as proof that the enterprise still consents
validity_s = 330      # and are valid this long, so that one retry fits
watch_s = 5           # between two proofs that the KEK still works

[keys]
rotate_after_days = 90    # a key's age at which the next one follows it; 0: never. A service may have its own

[push]
request_timeout_s = 10
presence_s = 5        # between two questions whether a proxy is there, and since when

[admin]
# Health, metrics and status, without login: loopback only. Commands go through the socket in state_dir.
host = "127.0.0.1"
port = 8320
"""


_PKCS11: Final = """\
[pkcs11]
vendor = {vendor}                # `key-agent init --help` lists them; docs/hsm.md
module_path = {module}
token_label = {token_label}
# token_serial = "..."                   # where two tokens have one label
pin_file = {pin}
# method = "auto"                        # or one of docs/hsm.md, for KEKs made from now on
"""
_OPENBAO: Final = """\
[openbao]
# docs/key-servers.md has the policy that the token needs.
url = {url}
token_file = {token}
ca_file = {ca}
mount = "transit"
"""
_KMIP: Final = """\
[kmip]
host = {host}
port = 5696
ca_file = {ca}
# Our identity at the server.
certificate_file = {certificate}
key_file = {key}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hsm:
    """A token reached by PKCS#11."""

    module: Path
    token_label: str
    vendor: str = GENERIC

    def section(self, files_dir: Path) -> tuple[str, list[Path]]:
        """Its text, and the files that it names."""
        pin = files_dir / "pin"
        values = {
            "vendor": self.vendor,
            "module": str(self.module.absolute()),
            "token_label": self.token_label,
            "pin": str(pin),
        }
        return _PKCS11.format(**{name: _toml(value) for name, value in values.items()}), [pin]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBaoServer:
    url: str

    def section(self, files_dir: Path) -> tuple[str, list[Path]]:
        files = {"token": files_dir / "openbao-token", "ca": files_dir / "openbao-ca.pem"}
        values = {name: _toml(str(path)) for name, path in files.items()}
        return _OPENBAO.format(url=_toml(self.url), **values), list(files.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class KmipServer:
    host: str

    def section(self, files_dir: Path) -> tuple[str, list[Path]]:
        files = {
            "ca": files_dir / "kmip-ca.pem",
            "certificate": files_dir / "kmip.pem",
            "key": files_dir / "kmip.key",
        }
        values = {name: _toml(str(path)) for name, path in files.items()}
        return _KMIP.format(host=_toml(self.host), **values), list(files.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    tenant: str
    agent: str
    environment: str
    source: Hsm | OpenBaoServer | KmipServer
    state_dir: Path
    files_dir: Path
    """Where root.pem, signing.*, tls.* and the key source's files are to be put."""


def initialise(config_file: Path, answers: Answers) -> dict[str, object]:
    """Write *config_file* and make the directories. CommandError if it exists; FormatError for a bad id."""
    for kind in ("tenant", "agent", "environment"):
        check_name(kind, getattr(answers, kind))
    files_dir, state_dir = answers.files_dir.absolute(), answers.state_dir.absolute()
    files = {
        "root": files_dir / "root.pem",
        "signing_certificate": files_dir / "signing.pem",
        "signing_key": files_dir / "signing.key",
        "tls_certificate": files_dir / "tls.pem",
        "tls_key": files_dir / "tls.key",
    }
    section, source_files = answers.source.section(files_dir)
    values = {name: _toml(str(path)) for name, path in files.items()}
    text = _TEMPLATE.format(
        agent=_toml(answers.agent),
        tenant=_toml(answers.tenant),
        agent_plain=answers.agent,
        tenant_plain=answers.tenant,
        environment=_toml(answers.environment),
        state_dir=_toml(str(state_dir)),
        source=section,
        **values,
    )
    config_file.parent.mkdir(parents=True, exist_ok=True)
    for directory in (state_dir, files_dir):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(config_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise CommandError(
            f"{config_file} exists", "edit it, or give another --config", ExitCode.REFUSED, code="exists"
        ) from None
    with open(descriptor, "w", encoding="utf-8") as stream:  # noqa: PTH123 - created exclusively
        os.fchmod(descriptor, 0o644)  # no secret is in it, and our umask lets nobody else read
        stream.write(text)
    return {
        "config": str(config_file),
        "state_dir": str(state_dir),
        "missing": [str(path) for path in (*files.values(), *source_files) if not path.exists()],
    }


def what_is_missing(result: Any) -> str:
    lines = [f"written: {result['config']}", f"made: {result['state_dir']}"]
    if result["missing"]:
        lines.append("now put these in place (keys, PIN and token with mode 0600):")
        lines += [f"  {path}" for path in result["missing"]]
    lines.append("then: key-agent doctor; key-agent kek create; key-agent run")
    return "\n".join(lines)


def _toml(text: str) -> str:
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")

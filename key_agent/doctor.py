"""`key-agent doctor`: what is wrong with an installation, and how to mend it.

1. Checks only look; nothing is changed, and at most one login reaches the HSM.
2. A check that another one's failure makes pointless is left out rather than failed.
"""

import stat
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from envelope.certificates import CertificateError
from key_agent import app, config
from key_agent.config import Settings
from key_agent.errors import KeyAgentError
from key_agent.sources.verdict import NEXT_STEPS
from key_agent.state_dir import AUDIT_NAME, StateDirError, check_state_dir
from runtime import machine
from runtime.cli import CommandError
from runtime.doctor import Check, failed, has_failed, ok, validity, warning
from runtime.lifecycle import harden_process
from runtime.settings import SettingsError, read_secret_file

_MAX_CLOCK_DIFFERENCE_S: Final = 30
"""A proxy refuses envelopes from further ahead (format.md 5)."""


def examine(
    config_file: Path, load: Callable[[], Settings], diagnose: Callable[[Settings], dict[str, object]]
) -> list[Check]:
    """Every check that makes sense. *diagnose* asks the running agent, or opens HSM and registry itself."""
    try:
        settings = load()
        config.database_url(settings.agent)
    except SettingsError as error:
        return [
            failed("configuration", str(error), f"mend {config_file}; `key-agent init` writes a fresh one")
        ]
    checks = [ok("configuration", str(config_file))]
    checks += _memory()
    checks += machine.check_cores()
    checks += machine.check_swap()
    checks += machine.check_clock()
    checks += _state_dir(settings)
    checks += _files(settings)
    if has_failed(checks):
        return checks
    try:
        found = diagnose(settings)
    except CommandError as error:
        return [*checks, failed("agent", error.cause, error.next_step)]
    return [
        *checks,
        *_lease(found),
        *_hsm(found),
        *_certificates(found),
        *_authorities(found),
        *_proxies(found),
    ]


def _memory() -> Iterator[Check]:
    for cause in harden_process():
        yield warning("memory", cause, "use deploy/systemd/key-agent.service, which sets the limits")


def _state_dir(settings: Settings) -> Iterator[Check]:
    try:
        check_state_dir(settings.agent.state_dir)
    except StateDirError as error:
        yield failed("state_dir", str(error), error.next_step)
    else:
        yield ok("state_dir", str(settings.agent.state_dir))
        yield from machine.check_disk("state_dir space", settings.agent.state_dir)
        yield from machine.check_audit(settings.agent.state_dir / AUDIT_NAME)


def _files(settings: Settings) -> Iterator[Check]:
    now_s = time.time()
    files, secrets = config.source_files(settings)
    for name, path in (
        ("signing.key_file", settings.signing.key_file),
        ("tls.key_file", settings.tls.key_file),
        *secrets.items(),
    ):
        try:
            secret = read_secret_file(path)
        except SettingsError as error:
            yield failed(
                name, str(error), f"put the file in place, readable by the agent alone: chmod 600 {path}"
            )
        else:
            secret[:] = bytes(len(secret))
            yield ok(name, str(path))
    for name, path in files.items():
        try:
            is_file = stat.S_ISREG(path.stat().st_mode)
        except OSError:
            is_file = False
        if is_file:
            yield ok(name, str(path))
        else:
            yield failed(name, f"{path} is no file", "install it, or correct the setting")
    try:
        root = app.load_root(settings)
    except SettingsError as error:
        yield failed(
            "agent.root_certificate_file", str(error), "put the tenant's root certificate there (PEM)"
        )
        return
    yield _valid("agent.root_certificate_file", root)
    loaders: tuple[tuple[str, Callable[[], x509.Certificate]], ...] = (
        ("signing.certificate_file", lambda: app.load_signing(settings, root, now_s=now_s).certificate),
        ("tls.certificate_file", lambda: app.check_tls_identity(settings, root, now_s=now_s)),
    )
    for name, load in loaders:
        try:
            leaf = load()
            yield _valid(name, leaf)
            if name == "tls.certificate_file" and settings.environments is not None:
                yield _serves_peers(leaf)
        except CertificateError as error:
            yield failed(name, f"{error.code}: {error}", "have the tenant's root issue it (certs/README.md)")
        except (SettingsError, KeyAgentError) as error:
            yield failed(name, str(error), "put the certificate and its own key there (PEM)")


def _serves_peers(leaf: x509.Certificate) -> Check:
    name = "tls.certificate_file for peers"
    try:
        purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        purposes = x509.ExtendedKeyUsage([])
    if ExtendedKeyUsageOID.SERVER_AUTH in purposes:
        return ok(name, "has the purpose serverAuth")
    return failed(
        name,
        "has no purpose serverAuth, so agents of other environments will not speak to this one",
        "have it issued anew with a host name (docs/environments.md); no restart is needed",
    )


def _valid(name: str, certificate: x509.Certificate) -> Check:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return validity(name, begin, end, now=datetime.now(UTC), mend="have it renewed")


def _lease(found: Any) -> Iterator[Check]:
    lease = found["lease"]
    if lease["leads"]:
        yield ok("lease", f"this agent leads, term {lease['term']}")
    else:
        yield failed(
            "lease",
            "this agent cannot rely on the registry's lease: no keys are pushed",
            "check the database and the way to it; `key-agent run` has to reach it every few seconds",
        )


def _hsm(found: Any) -> Iterator[Check]:
    if found["source_error"] is not None:
        yield failed(
            "hsm", found["source_error"], "check the settings of the key source, its login, and that it is on"
        )
    else:
        yield ok("hsm", _facts(found["source"]))
    kek = found["kek"]
    if kek["kek"] is None:
        yield failed(
            "kek",
            "there is none",
            "key-agent kek create; or, if there were keys before this machine: key-agent backup import FILE",
        )
        return
    verdict, detail = kek["diagnosis"]["verdict"], kek["diagnosis"]["detail"]
    if verdict == "ok" and kek["kek"]["state"] == "active":
        yield ok("kek", f"{kek['kek']['id']}: {detail}")
    elif verdict == "ok":
        yield failed(
            "kek",
            f"works in the HSM, but is {kek['kek']['state']}: {kek['kek']['reason']}",
            "key-agent reinstate --restore uses it again; key-agent reinstate makes a new one",
        )
    else:
        yield failed(
            "kek", f"{verdict}: {detail}", NEXT_STEPS.get(verdict, "see the HSM's own tools and logs")
        )


def _facts(facts: Any) -> str:
    token = facts.get("token") if isinstance(facts, dict) else None
    if isinstance(token, dict):
        return f"token {token.get('label')!s}, serial {token.get('serial')!s}"
    server = facts.get("server") if isinstance(facts, dict) else None
    if isinstance(server, dict):
        return ", ".join(f"{name} {value}" for name, value in server.items() if value is not None)[:200]
    return str(facts)[:200]


def _certificates(found: Any) -> Iterator[Check]:
    for link in found["links"]:
        name = f"certificate of {link['service']} at {link['proxy']}"
        if link["problem"] is not None:
            yield failed(
                name, link["problem"], "import the renewed one: key-agent service add ... --certificate FILE"
            )
            continue
        end = datetime.fromisoformat(link["not_after"])
        mend = "renew it, then key-agent service add again"
        yield validity(name, None, end, now=datetime.now(UTC), mend=mend)


def _authorities(found: Any) -> Iterator[Check]:
    """Certificates and lists that are not looked at elsewhere."""
    mends = {
        "proxy-authority": "have the proxy's operator renew it: key-agent proxy add ID --url ... --ca FILE",
        "kek": "key-agent kek rotate, before it ends",
        "revocation-list": "have the tenant's root sign a new one: agent.revocation_list_file",
    }
    for row in found["lifetimes"]:
        if (mend := mends.get(row["kind"])) is None:
            continue
        name = row["kind"] if row["name"] == row["kind"] else f"{row['kind']} of {row['name']}"
        if row["problem"] is not None or row["not_after"] is None:
            yield failed(name, row["problem"] or "there is none", mend)
        else:
            end = datetime.fromisoformat(row["not_after"])
            yield validity(name, None, end, now=datetime.now(UTC), mend=mend)


def _proxies(found: Any) -> Iterator[Check]:
    for proxy in found["proxies"]:
        name = f"proxy {proxy['proxy']}"
        if not proxy["reachable"]:
            yield failed(
                name,
                f"{proxy['code']}: {proxy['error']}",
                _mend_proxy(proxy),
            )
            continue
        ahead_s = proxy["clock_ahead_s"]
        if abs(ahead_s) > _MAX_CLOCK_DIFFERENCE_S:
            yield failed(
                name,
                f"its clock is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine's",
                "have both machines follow the same time servers",
            )
        else:
            yield ok(name, f"reachable, clock within {abs(ahead_s):.1f} s")
        yield from _hosting(proxy, found["links"])


def _mend_proxy(proxy: Any) -> str:
    name, url = proxy["proxy"], proxy["url"]
    if proxy["code"] == "wrong-proxy":
        return (
            f"correct the address: key-agent proxy add {name} --url https://... --ca FILE; or, if {url} is "
            f"right, add it by the id it gives itself (proxy.id there), then key-agent proxy remove {name}"
        )
    return f"check {url}, its authority (key-agent proxy add), that it trusts our root"


def _hosting(proxy: Any, links: Any) -> Iterator[Check]:
    for link in links:
        if link["proxy"] != proxy["proxy"]:
            continue
        name = f"{link['service']} at {proxy['proxy']}"
        theirs = proxy["services"].get(link["service"])
        if theirs is None:
            yield failed(name, "the proxy does not host it", "sealgate service add there, or remove it here")
        elif theirs != link["certificate_sha256"]:
            yield failed(
                name,
                "the proxy uses another certificate for it",
                "key-agent service add again, with the certificate that was imported at the proxy",
            )
        else:
            yield ok(name, "hosted, same certificate")

"""`key-agent incident` (docs/environments.md, docs/runbooks.md).

1. Opening an incident asks nothing and waits for nobody. What gives something back names an approval of two
   administrators.
2. Evidence is verified without any agent, configuration or network: `incident verify FILE --root ROOT`.
"""

import base64
import contextlib
import getpass
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from cryptography import x509

from envelope.certificates import CertificateError
from envelope.errors import FormatError, IntegrityError
from key_agent.command_line.performing import Options, perform, show
from key_agent.command_line.wording import counted
from key_agent.environments.incidents.evidence import verify_bundle
from key_agent.environments.states import EnvironmentState
from runtime.cli import CommandError, ExitCode
from runtime.files import write_new_file

incident_app = typer.Typer(no_args_is_help=True, help="Breaches: contained, healed, proven.")

_WATCH_S: Final = 1.0
EnvironmentName = Annotated[str, typer.Argument(metavar="ENVIRONMENT", help="Its id.")]
IncidentName = Annotated[str, typer.Argument(metavar="INCIDENT", help="inc-7: `incident list` shows them.")]
ApproveWith = Annotated[
    str, typer.Option("--approve-with", metavar="ID", help="The approval: `key-agent approval request`.")
]
KeyNames = Annotated[str, typer.Option("--keys", help="Key ids in hex, separated by commas.")]


def operator() -> str:
    """Who gives the command, as the machine knows them: for the rows and the audit log, no proof."""
    with contextlib.suppress(OSError, KeyError):
        return os.environ.get("SUDO_USER") or getpass.getuser()
    return f"uid {os.getuid()}"


def moment_ms(text: str) -> int:
    """Milliseconds since the epoch of an ISO 8601 time. CommandError."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise CommandError(
            f"not a time: {text!r}", "write it as 2026-11-22T01:00Z", ExitCode.USAGE, code="usage"
        ) from None
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1000)


def key_ids(text: str) -> list[str]:
    """What `--keys` names."""
    return [one.strip() for one in text.split(",") if one.strip()]


# Incidents.


@incident_app.command("open")
def incident_open(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    env: Annotated[str, typer.Option(help="The environment that is, or may be, breached.")],
    kind: Annotated[str, typer.Option(help="suspected, dek, runtime, kek, db or service_cert.")],
    reason: Annotated[str, typer.Option(help="A ticket, or what was seen.")],
    since: Annotated[
        str | None, typer.Option(help="When the breach began: 2026-11-22T01:00Z. Default: now.")
    ] = None,
    keys: Annotated[str, typer.Option(help="Kind dek: the keys, by id, separated by commas.")] = "",
    service: Annotated[str | None, typer.Option(help="Kind service_cert: whose certificate.")] = None,
    keep_keys: Annotated[
        bool, typer.Option("--keep-keys", help="Kind suspected: its keys stay active, in the others.")
    ] = False,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Of several calls with the same one, one opens an incident.")
    ] = None,
) -> None:
    """What has to stop, stops in every environment. Nothing is asked, and nobody is waited for."""
    data = perform(
        context.obj,
        "incident_open",
        environment=env,
        kind=kind,
        reason=reason,
        since_ms=None if since is None else moment_ms(since),
        keys=key_ids(keys),
        service=service,
        keep_keys=keep_keys,
        idempotency_key=idempotency_key,
        by=operator(),
    )

    def text(data: Any) -> str:
        what = "opened" if data["new"] else "was open already"
        lines = [f"{data['incident']} {what}, epoch {data['epoch']}; {env} is {data['environment_state']}"]
        late = sorted(name for name, has in data["told"].items() if not has)
        lines += [f"not told yet: {', '.join(late)}; they are as soon as they answer"] if late else []
        lines.append(scope_text(data))
        lines.append(f"`key-agent incident status {data['incident']} --watch` shows who has acknowledged it")
        return "\n".join(lines)

    show(context, data, text)


@incident_app.command("list")
def incident_list(context: typer.Context) -> None:
    """All incidents, the newest first."""

    def text(data: Any) -> str:
        rows = [
            f"{row['incident']}  {row['state']}  {row['environment']} {row['kind']}  "
            f"{_time(row['opened_at_ms'])} by {row['opened_by']}: {row['reason']}"
            for row in data["incidents"]
        ]
        return "\n".join(rows) or "no incidents"

    show(context, perform(context.obj, "incident_list"), text)


@incident_app.command("status")
def incident_status(
    context: typer.Context,
    incident: IncidentName,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again and again, until Ctrl-C or contained.")
    ] = False,
) -> None:
    """Who has acknowledged it: environments, their proxies, load balancers; and what is left to do."""
    options: Options = context.obj
    if not watch:
        show(context, perform(options, "incident_status", incident=incident), status_text)
        return
    while True:
        data: Any = perform(options, "incident_status", incident=incident)
        if options.as_json:
            typer.echo(json.dumps(data))
        else:
            clear = "\x1b[H\x1b[2J" if sys.stdout.isatty() else ""
            typer.echo(clear + status_text(data))
        if data["contained"]:
            return
        time.sleep(_WATCH_S)


@incident_app.command("scope")
def incident_scope(context: typer.Context, incident: IncidentName) -> None:
    """Every key that it concerns, and how."""
    show(context, perform(context.obj, "incident_scope", incident=incident), scope_text)


@incident_app.command("compromise")
def incident_compromise(
    context: typer.Context, incident: IncidentName, keys: KeyNames, approve_with: ApproveWith
) -> None:
    """Further keys of it are disabled everywhere, for good."""
    data = perform(
        context.obj, "incident_compromise", incident=incident, keys=key_ids(keys), approval=approve_with
    )
    show(context, data, scope_text)


@incident_app.command("rekey")
def incident_rekey(
    context: typer.Context,
    incident: IncidentName,
    generator: Annotated[
        str | None, typer.Option(help="The environment whose HSM makes the keys. Default: a healthy one.")
    ] = None,
) -> None:
    """New keys in the place of those that were taken away. Repeat it until it says that all are active."""
    data = perform(context.obj, "incident_rekey", incident=incident, generator=generator)

    def text(data: Any) -> str:
        lines = [f"{data['incident']} is {data['state']}; {counted(len(data['made']), 'key')} made"]
        if data["without_successor"]:
            lines.append(
                f"{len(data['without_successor'])} are not active yet: every environment that serves has to "
                "have them first"
            )
        return "\n".join(lines)

    show(context, data, text)


@incident_app.command("cancel")
def incident_cancel(context: typer.Context, incident: IncidentName, approve_with: ApproveWith) -> None:
    """A false alarm: suspended keys come back. The environment heals and rejoins all the same."""
    show(
        context,
        perform(context.obj, "incident_cancel", incident=incident, approval=approve_with),
        cancelled_text,
    )


@incident_app.command("close")
def incident_close(context: typer.Context, incident: IncidentName) -> None:
    """Nothing is left to do."""
    show(context, perform(context.obj, "incident_close", incident=incident), _state_text)


@incident_app.command("evidence")
def incident_evidence(
    context: typer.Context,
    incident: IncidentName,
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write; must not exist.")],
) -> None:
    """Write all that is known of it into a file that proves itself."""
    if output.exists():
        raise CommandError(f"{output} exists and is not overwritten", "name another file", ExitCode.REFUSED)
    data: Any = perform(context.obj, "incident_evidence", incident=incident)
    try:
        write_new_file(output, base64.b64decode(data.pop("content_base64")))
    except OSError as error:
        raise CommandError(f"{output}: {error.strerror}", "name a file that you may write") from None
    data["file"] = str(output)
    show(
        context,
        data,
        lambda data: (
            f"{data['file']}: {data['bytes']} bytes, registry at epoch {data['epoch']}\n"
            f"`key-agent incident verify {data['file']} --root ROOT` needs nothing else"
        ),
    )


@incident_app.command("verify")
def incident_verify(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `incident evidence` wrote.")],
    root: Annotated[Path, typer.Option(help="The tenant's root certificate (PEM).")],
) -> None:
    """Verify evidence, offline: exit code 3 if anything in it was changed."""
    try:
        content, [anchor] = file.read_bytes(), x509.load_pem_x509_certificates(root.read_bytes())
    except OSError as error:
        raise CommandError(f"{error.filename}: {error.strerror}", "give files that you may read") from None
    except ValueError:
        raise CommandError(f"{root}: not one certificate", "give the tenant's root (PEM)") from None
    try:
        found = verify_bundle(content, root=anchor)
    except (FormatError, IntegrityError, CertificateError) as error:
        raise CommandError(
            f"{file} proves nothing: {error}",
            "get it again from whoever wrote it; keep this one",
            ExitCode.REFUSED,
            code="evidence",
        ) from None
    data = {
        "file": str(file),
        "tenant": found.evidence.tenant,
        "incident": found.incident_id,
        "made_at_ms": found.evidence.made_at_ms,
        "made_by": found.evidence.made_by,
        **msgspec.to_builtins(found.incident),
        "rows": found.rows,
        "term": found.term,
        "epoch": found.epoch,
        "digest": found.digest,
        "managers": [
            {"term": term, "agent": agent, "fingerprint": fingerprint}
            for term, agent, fingerprint in found.managers
        ],
        "audit_from": str(found.audit_from),
        "audit_to": str(found.audit_to),
        "approved_by": {name: list(who) for name, who in found.approved_by.items()},
        "keys": {key: [body.disposition, found.key_states[key]] for key, body in found.keys.items()},
        "acknowledgements": found.acknowledgements,
    }
    context.obj.emit(data, lambda: _evidence_text(data))


# What people read.


def scope_text(data: Any) -> str:
    """The keys that an incident concerns."""
    rows = [
        f"  {row['kid']}  {row['service']} {row['use']} of {row['owner']}: {row['disposition']}, "
        f"was {row['previous']}, is {row['state']}"
        + (f", followed by {row['replaced_by']}" if row["replaced_by"] else "")
        for row in data["keys"]
    ]
    return "\n".join([f"{counted(len(rows), 'key')}:", *rows]) if rows else "no keys"


def status_text(data: Any) -> str:
    """The acknowledgement matrix."""
    lines = [
        f"{data['incident']} {data['state']}: {data['environment']} {data['kind']}, {data['reason']}",
        f"opened {_time(data['opened_at_ms'])} by {data['opened_by']}, epoch {data['opened_epoch']}",
    ]
    for row in data["environments"]:
        clear = sum(place["is_clear"] for place in row["places"])
        what = "has it" if row["has_it"] else "DOES NOT HAVE IT"
        lines.append(
            f"  {row['environment']}: {row['error']}"
            if row["error"]
            else f"  {row['environment']}: {what}; {clear} of {len(row['places'])} places are clear"
        )
        lines += [
            f"    {place['service']} at {place['proxy']}: silent; holds nothing from "
            f"{_time(place['holds_until_ms'])}"
            for place in row["places"]
            if not place["is_clear"]
        ]
    for row in data["load_balancers"]:
        state = "has it" if row["has_it"] else "DOES NOT HAVE IT"
        lines.append(f"  load balancer {row['load_balancer']}: {state if row['live'] else 'SILENT'}")
    if data["undecided"]:
        lines.append(f"{len(data['undecided'])} suspended keys wait for a decision: compromise, or cancel")
    if data["without_successor"]:
        lines.append(f"{len(data['without_successor'])} places have no active key: `incident rekey`")
    lines.append("contained" if data["contained"] else "NOT contained yet")
    return "\n".join(lines)


def _state_text(data: Any) -> str:
    return f"{data['incident']} is {data['state']}"


def cancelled_text(data: Any) -> str:
    text = _state_text(data)
    if data["environment_state"] == EnvironmentState.HEALING:
        name = data["environment"]
        text += (
            f"\n{name} heals still and serves nothing: `key-agent env heal-complete {name} --attest CHANGE`, "
            f"then `key-agent env rejoin {name}`"
        )
    return text


def _evidence_text(data: Any) -> str:
    lines = [
        f"{data['file']} verifies: {data['incident']} of {data['tenant']}, {data['state']}",
        f"  written {_time(data['made_at_ms'])} by agent {data['made_by']}, certified by that root",
        f"  {data['environment']} {data['kind']} since {_time(data['since_ms'])}: {data['reason']}",
        f"  opened {_time(data['opened_at_ms'])} by {data['opened_by']}",
        f"  {data['rows']} signed rows at epoch {data['epoch']} of term {data['term']}",
        f"  digest {data['digest']}",
        f"  audit log from {data['audit_from']} to {data['audit_to']}, unbroken",
        "  compare the first manager's fingerprint with what was noted when the environments were founded:",
    ]
    lines += [f"  term {one['term']}: {one['agent']}, key {one['fingerprint']}" for one in data["managers"]]
    lines += [f"  approval {name}: {', '.join(who)}" for name, who in data["approved_by"].items()]
    lines += [f"  key {key}: {said}, is {state}" for key, (said, state) in data["keys"].items()]
    return "\n".join(lines)


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")

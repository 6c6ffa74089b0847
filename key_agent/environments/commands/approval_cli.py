"""`key-agent admin` and `approval`: who may approve, and what they have approved.

1. A private key is read by the process that the administrator starts, and by no agent: `approval sign` with
   `--statement` needs no agent at all, `approval submit` takes a signature from wherever it was made.
2. What is signed is shown, as the statement itself says it: the agent that shows the payload beside it may be
   the one to be afraid of. Nothing but a statement is signed.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from envelope.errors import SealgateError
from key_agent.command_line.performing import confirm, perform, show
from key_agent.environments.commands.admin_signatures import (
    HELP_ON_PASSPHRASES,
    SIGNATURE_HELP,
    STATEMENT_HELP,
    read_signature,
    sign_with_file,
    write_statement,
)
from key_agent.environments.commands.incident_cli import operator
from key_agent.environments.commands.old_keys_cli import loss_text
from key_agent.environments.shared import approvals
from key_agent.explaining import explain_agent
from runtime.cli import CommandError, ExitCode

admin_app = typer.Typer(no_args_is_help=True, help="Administrators: two of them approve.")
approval_app = typer.Typer(no_args_is_help=True, help="Approvals: what two administrators have signed.")

AdminName = Annotated[str, typer.Argument(metavar="ADMIN", help="A short name in lower case.")]
ApprovalName = Annotated[str, typer.Argument(metavar="APPROVAL", help="a-...: `approval list` shows them.")]
MaybeApproved = Annotated[
    str | None, typer.Option("--approve-with", metavar="ID", help="Needed from the third administrator on.")
]
PassphraseFile = Annotated[Path | None, typer.Option(help=HELP_ON_PASSPHRASES)]
KeyFile = Annotated[Path, typer.Option("--key", help="Your private key (PEM, mode 0600).")]


@admin_app.command("list")
def admin_list(context: typer.Context) -> None:
    """Who may approve."""

    def text(data: Any) -> str:
        rows = [
            f"{row['name']}  {row['state']}  since {_time(row['added_at_ms'])} by {row['added_by']}"
            for row in data["admins"]
        ]
        rows += [] if len(rows) >= data["required"] else [f"{data['required']} are needed for an approval"]
        return "\n".join(rows)

    show(context, perform(context.obj, "admin_list"), text)


@admin_app.command("add")
def admin_add(
    context: typer.Context,
    admin: AdminName,
    public_key: Annotated[Path, typer.Option(help="Their public key (PEM): Ed25519 or EC P-256.")],
    approve_with: MaybeApproved = None,
) -> None:
    """Make an administrator known, by a public key; the private one stays with them."""
    data = perform(
        context.obj,
        "admin_add",
        admin=admin,
        public_key_pem=_read(public_key),
        approval=approve_with,
        by=operator(),
    )
    show(context, data, lambda data: f"{data['admin']} may approve")


@admin_app.command("remove")
def admin_remove(context: typer.Context, admin: AdminName, approve_with: MaybeApproved = None) -> None:
    """Their signatures count no more, those under open approvals included."""
    data = perform(context.obj, "admin_remove", admin=admin, approval=approve_with, by=operator())
    show(context, data, lambda data: f"{data['admin']} may not approve any more")


@approval_app.command("request")
def approval_request(
    context: typer.Context,
    action: Annotated[str, typer.Argument(help=f"One of {', '.join(approvals.Action)}.")],
    subject: Annotated[str, typer.Argument(help="An incident, an environment, an administrator, a tenant.")],
    payload: Annotated[
        str, typer.Option(help="JSON of exactly what is to be done; docs/environments.md lists it.")
    ] = "{}",
    valid_s: Annotated[int, typer.Option(help="It can be signed and used for so long.")] = (
        approvals.VALIDITY_S
    ),
) -> None:
    """Ask two administrators to approve of something."""
    try:
        asked = json.loads(payload)
    except ValueError as error:
        raise CommandError(f"--payload is no JSON: {error}", "give an object", ExitCode.USAGE) from None
    if not isinstance(asked, dict):
        raise CommandError("--payload is no JSON object", "give an object", ExitCode.USAGE)
    data = perform(
        context.obj,
        "approval_request",
        action=action,
        subject=subject,
        payload=asked,
        by=operator(),
        valid_s=valid_s,
    )
    show(context, data, approval_text)


@approval_app.command("list")
def approval_list(context: typer.Context) -> None:
    """All of them, the newest first."""
    show(
        context,
        perform(context.obj, "approval_list"),
        lambda data: "\n".join(map(approval_text, data["approvals"])) or "no approvals",
    )


@approval_app.command("show")
def approval_show(
    context: typer.Context,
    approval: ApprovalName,
    statement: Annotated[Path | None, typer.Option(help=STATEMENT_HELP)] = None,
) -> None:
    """One approval; its statement is what administrators sign."""
    data: Any = perform(context.obj, "approval_show", approval=approval)
    if statement is not None:
        write_statement(statement, data["statement"].encode("ascii"))
    show(
        context,
        data,
        lambda data: f"{_asked_text(data)}\nSHA-256 {data['payload_sha256']}",
    )


@approval_app.command("sign")
def approval_sign(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    approval: ApprovalName,
    admin: Annotated[str, typer.Option(help="Your name, as it is registered.")],
    key: KeyFile,
    passphrase_file: PassphraseFile = None,
    yes: Annotated[bool, typer.Option("--yes", help="You have read the statement.")] = False,
) -> None:
    """Read what is asked, and sign it with your key. The agent gets the signature alone."""
    asked: Any = perform(context.obj, "approval_show", approval=approval)
    confirm(context.obj, f"{_asked_text(asked)}\nYou sign this.", yes=yes)
    statement = asked["statement"].encode("ascii")
    if _said(statement) != (approval, asked["action"], asked["subject"], _sha256(asked["payload"])):
        raise CommandError(
            f"the statement of {approval} is not of what is shown",
            "sign nothing; find out who has changed this agent",
            ExitCode.REFUSED,
        )
    signature = sign_with_file(statement, key, passphrase_file)
    data = perform(context.obj, "approval_sign", approval=approval, admin=admin, signature=signature)
    show(context, data, approval_text)


@approval_app.command("sign-file")
def approval_sign_file(
    context: typer.Context,
    statement: Annotated[Path, typer.Argument(help="What `approval show --statement` wrote.")],
    key: KeyFile,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a statement, on a machine without an agent; prints what `approval submit` takes.

    What it allows goes to the terminal: compare it with `approval show` elsewhere.
    """
    try:
        content = statement.read_bytes()
    except OSError as error:
        raise CommandError(f"{statement}: {error.strerror}", "give a file that you may read") from None
    approval, action, subject, payload_sha256 = _said(content)
    what = f"{approval}: {action} of {subject}, payload of SHA-256 {payload_sha256}"
    data: dict[str, object] = {
        "signature": sign_with_file(content, key, passphrase_file),
        "approval": approval,
        "action": action,
        "subject": subject,
        "payload_sha256": payload_sha256,
    }
    if not context.obj.as_json:
        typer.echo(f"signed {what}", err=True)
    context.obj.emit(data, lambda: str(data["signature"]))


@approval_app.command("submit")
def approval_submit(
    context: typer.Context,
    approval: ApprovalName,
    admin: Annotated[str, typer.Option(help="Who has signed.")],
    signature: Annotated[Path, typer.Option(help=SIGNATURE_HELP)],
) -> None:
    """Hand a signature in that was made elsewhere."""
    text = read_signature(signature)
    data = perform(context.obj, "approval_sign", approval=approval, admin=admin, signature=text)
    show(context, data, approval_text)


def _said(statement: bytes) -> tuple[str, str, str, str]:
    """Approval, action, subject, SHA-256 of the payload. CommandError: it is no statement."""
    try:
        said = approvals.read_statement(statement)
    except SealgateError as error:
        raise explain_agent(error) from error
    found = (said.approval, said.action, said.subject, said.payload_sha256)
    if not all(text.isprintable() for text in found):
        raise CommandError("a terminal would show something else", "sign nothing of that", ExitCode.REFUSED)
    return found


def _sha256(payload: object) -> str:
    try:
        return approvals.payload_sha256(str(payload))
    except UnicodeEncodeError:
        return ""


def approval_text(data: Any) -> str:
    """One approval, for people."""
    signed = ", ".join(sorted(data["signatures"])) or "nobody"
    missing = f", {data['missing']} more needed" if data["missing"] and data["state"] == "open" else ""
    used = f", used {_time(data['used_at_ms'])}" if data["used_at_ms"] else ""
    return (
        f"{data['approval']}  {data['state']}: {data['action']} of {data['subject']}, asked by "
        f"{data['requested_by']}, until {_time(data['expires_at_ms'])}; signed by {signed}{missing}{used}"
    )


def _asked_text(data: Any) -> str:
    """With what it is about, and what this agent knows of the loss that it accepts."""
    asked = f"{approval_text(data)}\n{data['payload']}"
    return asked if data.get("loss") is None else f"{asked}\n{loss_text(data['loss'])}"


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", "give a file that you may read") from None
    except UnicodeDecodeError:
        raise CommandError(f"{file}: not PEM", "give a public key in PEM form") from None


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")

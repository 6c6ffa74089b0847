"""`key-agent env`: the administrator's commands on environments (docs/environments.md)."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from envelope.errors import FormatError, SealgateError
from key_agent.command_line.performing import confirm, perform, show
from key_agent.command_line.wording import counted
from key_agent.environments.commands.admin_signatures import (
    HELP_ON_PASSPHRASES,
    SIGNATURE_HELP,
    STATEMENT_HELP,
    read_signature,
    sign_with_file,
    write_statement,
)
from key_agent.environments.shared import approvals
from key_agent.environments.shared.documents import ApprovalBody
from key_agent.environments.shared.registry_key import fingerprint_of
from key_agent.explaining import explain_agent
from runtime.cli import CommandError, ExitCode
from runtime.files import replace_file, write_new_file

environment_app = typer.Typer(
    no_args_is_help=True, help="Environments: several sites of one tenant, together."
)

EnvironmentName = Annotated[
    str, typer.Argument(metavar="ENVIRONMENT", help="Its id: agent.environment_id there.")
]
ReasonText = Annotated[str | None, typer.Option("--reason", help="Why, for the list and the audit log.")]
OwnUrl = Annotated[
    str,
    typer.Option(
        "--url", help="https://host:port where the other agents reach this one (environments.port)."
    ),
]
Region = Annotated[str, typer.Option(help="Where it is, for people and load balancers.")]
Geo = Annotated[str, typer.Option(help="The part of the world that it serves.")]
Address = Annotated[str, typer.Option(help="host:port of its data plane, as the load balancer reaches it.")]
BalancerName = Annotated[
    str, typer.Option("--lb-server", help="The name of its server in the load balancer. Default: its id.")
]
NewFile = Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it; not overwritten.")]
WrittenFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="What `env promotion` or `env recovery` wrote.")
]
_SIGNED_IN_FILES: Final = (approvals.Action.ENVIRONMENT_PROMOTE, approvals.Action.ENVIRONMENT_RECOVER)
_WRITTEN_BY: Final = "give the file that `env promotion` or `env recovery` wrote"


@environment_app.command("identity")
def identity(context: typer.Context) -> None:
    """Who this agent is to the others; the fingerprint is what two administrators compare."""
    show(
        context,
        perform(context.obj, "env_identity"),
        lambda data: (
            f"environment {data['environment']}, agent {data['agent']} of {data['tenant']}\n"
            f"fingerprint {data['fingerprint']}"
        ),
    )


@environment_app.command("init")
def init(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    url: OwnUrl,
    region: Region = "",
    geo: Geo = "",
    address: Address = "",
    load_balancer_name: BalancerName = "",
    lease_s: Annotated[
        int,
        typer.Option(help="For how long an environment serves that cannot hear the others; 60 is strict."),
    ] = 300,
) -> None:
    """Make this environment the first of several, its agent the manager. Its keys stay as they are."""
    data = perform(
        context.obj,
        "env_init",
        url=url,
        region=region,
        geo=geo,
        address=address,
        load_balancer_name=load_balancer_name,
        lease_s=lease_s,
    )
    show(
        context,
        data,
        lambda data: (
            f"{data['environment']} is the first environment: {counted(data['services'], 'service')}, "
            f"{counted(data['keys'], 'key')}\n"
            f"fingerprint {data['fingerprint']}: for `env join` at the next one"
        ),
    )


@environment_app.command("join")
def join(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    url: OwnUrl,
    manager_url: Annotated[str, typer.Option(help="https://host:port of the manager's agent.")],
    manager_agent: Annotated[str, typer.Option(help="Its id, as in its certificate.")],
    fingerprint: Annotated[str, typer.Option(help="Of its registry key: `key-agent env identity` there.")],
    region: Region = "",
    geo: Geo = "",
    address: Address = "",
    load_balancer_name: BalancerName = "",
) -> None:
    """Ask the manager to add this environment. Its administrator has to say yes: `env add` there."""
    data = perform(
        context.obj,
        "env_join",
        url=url,
        manager_url=manager_url,
        manager_agent=manager_agent,
        fingerprint=fingerprint,
        region=region,
        geo=geo,
        address=address,
        load_balancer_name=load_balancer_name,
    )
    show(context, data, lambda data: f"asked; now {data['next_step']}")


@environment_app.command("add")
def add(
    context: typer.Context,
    environment: EnvironmentName,
    fingerprint: Annotated[
        str, typer.Option(help="Of its registry key: what `key-agent env join` printed there.")
    ],
) -> None:
    """Say yes to an environment that asks. It gets every key, and serves when all are proven there."""
    data = perform(context.obj, "env_add", environment=environment, fingerprint=fingerprint)
    show(context, data, _changed_text)


@environment_app.command("list")
def list_environments(context: typer.Context) -> None:
    """All environments, what was heard of them, and who asks to be added."""
    show(context, perform(context.obj, "env_list"), environments_text)


@environment_app.command("status")
def status(context: typer.Context, environment: EnvironmentName) -> None:
    """One environment."""
    show(
        context,
        perform(context.obj, "env_status", environment=environment),
        lambda data: "\n".join(f"{name}: {value}" for name, value in data.items() if value not in (None, "")),
    )


@environment_app.command("policy")
def policy(
    context: typer.Context,
    service: Annotated[str, typer.Argument(metavar="SERVICE", help="`service` or `tenant/service`.")],
    name: Annotated[
        str | None, typer.Argument(metavar="[own|origin|pinned]", help="Without it: show what is set.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="pinned: the id of an active key of this service.")] = None,
    home: Annotated[
        str | None, typer.Option(help="origin: the environment. Default: the tenant's first.")
    ] = None,
) -> None:
    """Which key seals: each environment's own, that of the home environment, or a named one."""
    if name is None:
        if key is not None or home is not None:
            raise CommandError(
                "--key and --home are for a policy", "name it: own, origin or pinned", ExitCode.USAGE
            )
        data = perform(context.obj, "env_policy", service=service)
    else:
        data = perform(context.obj, "env_policy_set", service=service, policy=name, key=key, home=home)
    show(context, data, _policy_text)


@environment_app.command("drain")
def drain(context: typer.Context, environment: EnvironmentName, reason: ReasonText = None) -> None:
    """It finishes what it has begun and opens objects, and gets no new work."""
    show(context, perform(context.obj, "env_drain", environment=environment, reason=reason), _changed_text)


@environment_app.command("undrain")
def undrain(context: typer.Context, environment: EnvironmentName) -> None:
    """Every key is proven there once more, then it is active again."""
    show(context, perform(context.obj, "env_undrain", environment=environment), _changed_text)


@environment_app.command("retire")
def retire(
    context: typer.Context,
    environment: EnvironmentName,
    approve_with: Annotated[
        str, typer.Option(help="The approval of two administrators: `key-agent approval`.")
    ],
    reason: ReasonText = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """It is none of the environments any more, for good. Drain it first."""
    confirm(context.obj, f"{environment} will hold no keys any more, and cannot come back.", yes=yes)
    data = perform(context.obj, "env_retire", environment=environment, approval=approve_with, reason=reason)
    show(context, data, _changed_text)


# The manager.


@environment_app.command("promotion")
def promotion(context: typer.Context, file: NewFile) -> None:
    """Write FILE, for two administrators to sign (`env sign`): that this agent becomes the manager."""
    data = perform(context.obj, "env_promotion")
    write_to_sign(file, data)
    show(
        context,
        {"file": str(file), "approval": data["approval"], "statement": data["statement"]},
        lambda data: (
            f"{data['file']}: two administrators sign it, `key-agent env sign {data['file']} "
            "--admin NAME --key FILE`; then `key-agent env promote`"
        ),
    )


@environment_app.command("sign")
def sign(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    file: WrittenFile,
    admin: Annotated[str, typer.Option(help="Your name, as it is registered: `key-agent admin list`.")],
    key: Annotated[Path | None, typer.Option(help="Your private key (PEM, mode 0600).")] = None,
    passphrase_file: Annotated[Path | None, typer.Option(help=HELP_ON_PASSPHRASES)] = None,
    statement_file: Annotated[Path | None, typer.Option("--statement", help=STATEMENT_HELP)] = None,
    signature_file: Annotated[Path | None, typer.Option("--signature", help=SIGNATURE_HELP)] = None,
) -> None:
    """Add your signature to FILE, and say what it is for. Needs no agent: do it on a machine of your own.

    Your key is on a smart card: --statement writes what it signs, --signature brings the signature in.
    """
    data, asked = read_to_sign(file)
    what = _asked_text(file, asked)
    try:
        statement = approvals.statement(str(data["tenant"]), str(data["approval"]), asked)
    except SealgateError as error:
        raise explain_agent(error) from error
    match key, signature_file, statement_file, passphrase_file:
        case Path() as own, None, None, _:
            signature = sign_with_file(statement, own, passphrase_file)
        case None, Path() as brought, None, None:
            signature = read_signature(brought)
        case None, None, Path() as to_sign, None:
            write_statement(to_sign, statement)
            show(
                context,
                {
                    "file": str(file),
                    "action": asked.action,
                    "payload": asked.payload,
                    "statement": str(to_sign),
                },
                lambda data: (
                    f"{what}\n{data['statement']} is what you sign, if that is what you have compared; then "
                    f"`key-agent env sign {data['file']} --admin {admin} --signature FILE`"
                ),
            )
            return
        case _:
            raise CommandError(
                "one of --key, --statement and --signature is needed, and --passphrase-file goes with --key",
                "--key FILE; or, for a smart card, --statement FILE first and --signature FILE then",
                ExitCode.USAGE,
            )
    data["asked"] = msgspec.to_builtins(
        msgspec.structs.replace(asked, signatures={**asked.signatures, admin: signature})
    )
    replace_file(file, json.dumps(data, indent=2).encode() + b"\n")
    show(
        context,
        {
            "file": str(file),
            "action": asked.action,
            "payload": asked.payload,
            "signed_by": sorted(data["asked"]["signatures"]),
        },
        lambda data: (
            f"{what}\n{data['file']}: signed by {', '.join(data['signed_by'])}\n"
            "not what you have compared? Destroy this file"
        ),
    )


@environment_app.command("promote")
def promote(context: typer.Context, file: WrittenFile) -> None:
    """This agent becomes the manager, by what two administrators have signed in FILE."""
    data, _ = read_to_sign(file)
    result = perform(context.obj, "env_promote", approval=data["approval"], asked=data["asked"])

    def text(data: Any) -> str:
        lines = [
            f"{data['environment']} is the manager's environment, term {data['term']}",
            spread_text(data),
        ]
        if data["former"] is not None and not data["former_knows"]:
            lines.append(
                f"{data['former']} does not know it: it can change nothing any more, and if it is cut off it "
                f"stops serving within {data['former_may_serve_for_s']} s"
            )
        return "\n".join(line for line in lines if line)

    show(context, result, text)


def write_to_sign(file: Path, data: Any) -> None:
    """What two administrators are to sign, into a file that is not there yet."""
    try:
        write_new_file(file, json.dumps(data, indent=2).encode() + b"\n")
    except FileExistsError:
        raise CommandError(
            f"{file} exists and is not overwritten", "name another file", ExitCode.REFUSED
        ) from None
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", "name a file that you may write") from None


def read_to_sign(file: Path) -> tuple[dict[str, Any], ApprovalBody]:
    """What `write_to_sign` wrote, signed or not."""
    try:
        data = json.loads(file.read_bytes())
        return data, msgspec.convert(data["asked"], ApprovalBody)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", _WRITTEN_BY) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{file}: nothing to sign ({type(error).__name__})", _WRITTEN_BY) from None


# What people read.


def _changed_text(data: Any) -> str:
    return "\n".join(line for line in (f"{data['environment']}: {data['state']}", spread_text(data)) if line)


def _asked_text(file: Path, asked: ApprovalBody) -> str:
    """What is signed, and not what else FILE says: the agent that wrote it may be the one to be afraid of."""
    if asked.action not in _SIGNED_IN_FILES:
        raise CommandError(
            f"{file} asks for {asked.action}, which is not signed in a file",
            "sign nothing that came with it; other approvals: `key-agent approval sign`",
            ExitCode.REFUSED,
        )
    try:
        said = json.loads(asked.payload)
        on = said["builds_on"]
        lines = [
            f"{asked.action}: {said['environment']} by agent {said['agent']}, term {said['term']}",
            f"registry key, fingerprint {fingerprint_of(said['registry_key'])}",
            f"registry of term {on['term']} at epoch {on['epoch']}, {digest_text(on['digest'])}",
        ]
        if asked.action == approvals.Action.ENVIRONMENT_RECOVER:
            source = "no KEK of before" if said["old_kek"] is None else f"KEK {said['old_kek']}"
            lines.append(f"KEK {said['new_kek']}, fingerprint {said['kek_fingerprint']}; keys from {source}")
            if said["lost"]:
                lines.append("WHAT IS NOT UNDER THAT KEK IS GIVEN UP FOR EVER")
    except (ValueError, KeyError, TypeError, FormatError) as error:
        raise CommandError(
            f"{file}: nothing to sign ({type(error).__name__})", _WRITTEN_BY, ExitCode.REFUSED
        ) from None
    if not all(line.isprintable() for line in lines):
        raise CommandError(f"{file}: a terminal would show something else", _WRITTEN_BY, ExitCode.REFUSED)
    return "\n".join(lines)


def _policy_text(data: Any) -> str:
    which = {
        "own": "each environment seals with its own key",
        "origin": f"the key of {data['home_environment'] or 'the first environment'} seals everywhere",
        "pinned": f"key {data['pinned_key']} seals everywhere",
    }
    lines = [f"{data['service']}: {which[data['policy']]}"]
    for ring in data["rings"]:
        use = ring["algorithm"] or ring["use"]
        for one in ring["keys"]:
            key = "no active key" if one["key"] is None else f"{one['key']} of {one['owner']}"
            lines.append(f"  {one['environment']}  {use}  {key}")
    return "\n".join([*lines, *filter(None, [spread_text(data) if "spread" in data else ""])])


def spread_text(data: Any) -> str:
    late = sorted(name for name, knows in data["spread"].items() if not knows)
    return f"not told yet: {', '.join(late)}; they are as soon as they answer" if late else ""


def digest_text(digest: str) -> str:
    """As much of a registry's digest as people compare."""
    return f"{digest[:16]}..."


def environments_text(data: Any) -> str:
    """The page of `key-agent env list`."""
    lines = []
    if data["joining"] is not None:
        asked = data["joining"]
        lines.append(
            f"asks {asked['manager_agent']} at {asked['manager_url']}: {asked['problem'] or 'added'}"
        )
    if not data["united"]:
        lines.append("this is the only environment; `key-agent env init` begins a set of them")
    else:
        proven = "never" if data["proven_ago_s"] is None else f"{data['proven_ago_s']:.0f} s ago"
        lines.append(
            f"manager: {data['manager']}, term {data['term']}, epoch {data['epoch']} "
            f"({digest_text(data['digest'])}); a majority was heard {proven} (lease {data['lease_s']} s)"
        )
    if data["reason"]:
        lines.append(f"{data['environment']} {data['serves']}: {data['reason']}")
    if (told := data["told"]) is not None and told["reason"] and told["reason"] != data["reason"]:
        lines.append(f"its proxies are told that it is {told['state']}: {told['reason']}")
    lines += [_environment_text(row, data["epoch"]) for row in data["environments"]]
    lines += [
        f"proxy {row['proxy']} does not know it yet ({row['state']}): {row['error']}"
        for row in data["proxies"]
        if row["error"]
    ]
    lines += [
        f"asks to be added: {row['environment']} (agent {row['agent']}, {row['url']})\n"
        f"  fingerprint {row['fingerprint']}"
        for row in data["waiting"]
    ]
    return "\n".join(lines)


def _environment_text(row: Any, epoch: int) -> str:
    since = datetime.fromtimestamp(row["since_ms"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    text = f"{row['environment']}  {row['state']} since {since}"
    if row["reason"]:
        text += f" ({row['reason']})"
    if row["own"]:
        text += "; this one"
    elif row["answers"] is None:
        text += "; not asked yet"
    elif not row["answers"]:
        text += f"; DOES NOT ANSWER: {row['answers_error']}"
    else:
        behind = epoch - (row["epoch"] or 0)
        text += f"; answers in {row['latency_ms']:.0f} ms" + (
            f", {behind} epochs behind" if behind > 0 else ""
        )
    if row["acts"] not in (None, row["state"]):
        text += f"; acts as {row['acts']}"
    if row["declared"]:
        text += f"; says of itself: {row['declared']}"
    if row["lacks"]:
        text += f"\n  its keys: {row['lacks']}"
    return text

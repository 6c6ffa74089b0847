"""`key-agent backup`: the registry in a file that only this HSM opens."""

import base64
from pathlib import Path
from typing import Annotated, Any

import typer

from key_agent.command_line.performing import perform, show
from key_agent.command_line.wording import counted, outcomes_text, time_text
from runtime.cli import CommandError, ExitCode
from runtime.files import write_new_file

backup_app = typer.Typer(no_args_is_help=True, help="The registry in a file that only this HSM opens.")


@backup_app.command("export")
def backup_export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it; must not exist.")],
) -> None:
    """Write wrapped keys, states, services and proxies to FILE, encrypted: it needs the HSM to be read."""
    if file.exists():
        raise CommandError(f"{file} exists and is not overwritten", "name another file", ExitCode.REFUSED)
    data: Any = perform(context.obj, "backup_export")
    content = base64.b64decode(data.pop("content_base64"))
    try:
        write_new_file(file, content)
    except OSError as error:
        raise CommandError(
            f"{file}: {error.strerror}", "name a file in a directory that you may write"
        ) from None
    data["file"] = str(file)
    show(
        context,
        data,
        lambda data: (
            f"{data['file']}: {counted(data['keys'], 'key')} of {counted(data['services'], 'service')}, "
            f"{data['bytes']} bytes\n"
            f"It opens only where KEK {data['kek']} is in the HSM. Keep it apart from the HSM's own backup."
        ),
    )


@backup_app.command("import")
def backup_import(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup export` wrote.")],
    trial: Annotated[
        bool, typer.Option("--try", help="Only verify it, and say what an import would do.")
    ] = False,
) -> None:
    """Fill what is missing here. What exists stays as it is, what is destroyed stays destroyed."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", "give a file that you may read") from None
    data = perform(
        context.obj, "backup_import", content_base64=base64.b64encode(content).decode(), trial=trial
    )
    show(context, data, imported_text)


def imported_text(data: Any) -> str:
    """What `backup import` did, or with `--try` would do."""
    would = "would be " if data["trial"] else ""
    keys, wraps = counted(len(data["keys"]), "key"), counted(len(data["wraps"]), "wrap")
    services = counted(len(data["services"]), "service")
    proxies = counted(len(data["proxies_added"]), "proxy", "proxies")
    lines = [
        f"backup of {time_text(data['made_at_ms'])}, every wrap opened in the HSM where its KEK is there",
        f"{keys} {would}added, {wraps} {would}restored",
        f"{services}, {proxies} {would}added",
    ]
    lines += [f"KEK {kek_id} {would}added" for kek_id in data["keks"]]
    lines += [f"KEK {kek_id} is not in the HSM: {why}" for kek_id, why in data["absent_keks"].items()]
    if data["waiting"]:
        lines.append(
            f"{counted(len(data['waiting']), 'key')} without their KEK: bring it back, then "
            "`key-agent reinstate --restore`"
        )
    lines += [f"{kid} {would}{state}: the backup knew that" for kid, state in data["ended"].items()]
    lines += [f"{kid} stays: {why}" for kid, why in data["kept"].items()]
    lines += [f"{kid} is NOT taken: {why}" for kid, why in data["refused"].items()]
    return "\n".join([*lines, outcomes_text(data)])

"""`key-agent status`: who holds which keys until when, what the KEK says, what stands out.

docs/key-agent.md explains each line.
"""

import asyncio
import logging
import os
import sys
from typing import Annotated, Any

import typer

from key_agent.command_line import live_status
from key_agent.command_line.performing import Options, perform, show
from key_agent.command_line.wording import counted, time_text
from key_agent.environments.commands.cli import environments_text
from key_agent.state_dir import SOCKET_NAME
from runtime import observe
from runtime.cli import CommandError, ExitCode
from runtime.clock import SystemClock


def status(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("--watch", help="A live table, until Ctrl-C; with --json a line each second.")
    ] = False,
) -> None:
    """Services and proxies: what was acknowledged, until when it is valid, and what the KEK says."""
    if follow:
        _watch(context.obj)
        return
    show(context, perform(context.obj, "status"), status_text)


def _watch(options: Options) -> None:
    observe.configure_logging(level=logging.CRITICAL)
    socket = options.load().agent.state_dir / SOCKET_NAME
    display: live_status.Display
    if options.as_json:
        display = live_status.JsonLines(sys.stdout)
    elif sys.stdout.isatty():
        is_coloured = "NO_COLOR" not in os.environ
        display = live_status.Screen(sys.stdout, notes=_notes, is_coloured=is_coloured)
    else:
        raise CommandError("--watch draws on a terminal", "add --json, or leave --watch out", ExitCode.USAGE)
    asyncio.run(live_status.watch(lambda: live_status.ask(socket), display, SystemClock()))


def _notes(data: Any) -> list[str]:
    return [
        *(f"rotation: {rotation_text(row)}" for row in data["rotations"]),
        *(f"certificate: {lifetime_text(row)}" for row in data["ending"]),
    ]


def status_text(data: Any) -> str:
    """The status page of `key-agent status` (docs/key-agent.md explains each line)."""
    found = data["diagnosis"]
    proof = f": {found['verdict']} ({found['detail']})" if found else ""
    if found and found["next_step"]:
        proof += f"; next: {found['next_step']}"
    kek = data["kek"]
    lines = [
        f"agent {data['agent']} of {data['tenant']}, environment {data['environment']}: "
        + ("running" if data["running"] else "NOT running"),
        f"consent: {data['standing']} since {time_text(data['since_ms'])}{proof}",
        f"KEK: {kek['id']} {kek['state']}" if kek else "KEK: none",
    ]
    if (environments := data.get("environments")) is not None and environments["united"]:
        lines += [f"environments: {line}" for line in environments_text(environments).splitlines()]
    lines += [f"problem: {problem}" for problem in data["problems"]]
    lines += [f"rotation: {rotation_text(row)}" for row in data["rotations"]]
    lines += [f"certificate: {lifetime_text(row)}" for row in data["ending"]]
    proxies = {proxy["proxy"] for proxy in data["proxies"]}
    for service in data["services"]:
        lost = f", {service['unreadable_keys']} under a lost KEK" if service["unreadable_keys"] else ""
        lines.append(f"{service['service']}  ({counted(service['keys'], 'key')}{lost})")
        lines += [
            f"  {_place_text(place)}"
            for place in service["proxies"]
            if place["state"] != "withdrawn" or place["proxy"] in proxies  # one that was removed is no news
        ]
    lines += [
        f"proxy {proxy['proxy']}  {proxy['url']}  last push: {_push_text(proxy)}" for proxy in data["proxies"]
    ]
    return "\n".join(lines)


def rotation_text(row: Any) -> str:
    """Where a rotation stands, in one line."""
    text = (
        f"{row['service']} ({row['use']}) to {row['new_kid']}: "
        f"{row['phase']} since {time_text(row['since_ms'])}"
    )
    if row["waiting_for"]:
        text += f"; waits for {', '.join(row['waiting_for'])}, until {time_text(row['until_ms'])} at most"
    if row["late"]:
        text += f"; activated without {', '.join(row['late'])}"
    return text + (f"; NOT activated: {row['problem']}" if row["problem"] else "")


def lifetime_text(row: Any) -> str:
    """How long a certificate still lives, in one line."""
    name = row["kind"] if row["name"] == row["kind"] else f"{row['kind']} {row['name']}"
    if row["problem"]:
        return f"{name}: {row['problem']}"
    if row["days_left"] is None:
        return f"{name}: nobody can tell when it ends"
    end = row["not_after"][:10]
    return (
        f"{name}: EXPIRED {end}"
        if row["days_left"] < 0
        else f"{name}: ends {end}, in {row['days_left']:.0f} days"
    )


def _place_text(place: Any) -> str:
    match place["state"]:
        case "valid":
            since = time_text(place["acknowledged_at_ms"])
            text = f"valid for {place['valid_for_s']:.0f} s, acknowledged {since}"
        case "expired":
            text = f"EXPIRED {time_text(place['valid_until_ms'])}"
        case "withdrawing":
            text = f"WITHDRAWING, unconfirmed; silent from {time_text(place['may_hold_keys_until_ms'])}"
        case "withdrawn":
            text = (
                f"withdrawn {time_text(place['withdrawn_at_ms'])}"
                if place["withdrawn_at_ms"]
                else "withdrawn"
            )
        case _:
            text = "never acknowledged"
    error = f"; last error {time_text(place['error_at_ms'])}: {place['error']}" if place["error"] else ""
    return f"{place['proxy']}: {text}{error}"


def _push_text(proxy: Any) -> str:
    silent = ""
    if proxy["answers"] is False:
        silent = f"; not answering since {time_text(proxy['answers_since_ms'])} ({proxy['answers_error']})"
    if proxy["outcome"] is None:
        return f"none since the agent started{silent}"
    error = f" ({proxy['error']}; {proxy['failures_in_a_row']} in a row)" if proxy["error"] else ""
    return f"{proxy['outcome']} {time_text(proxy['last_push_at_ms'])}{error}{silent}"

"""`sealgate errors`: every answer the proxy gives in place of forwarding."""

import typer

from proxy import refusals
from proxy.command_line.operating import options_of
from proxy.refusals import Refusal


def errors(context: typer.Context) -> None:
    """Every answer the proxy gives in place of forwarding, as a Markdown table."""
    found = all_refusals()
    options_of(context).emit(
        {
            "errors": [
                {
                    "code": refusal.code,
                    "status": refusal.status,
                    "cause": refusal.cause,
                    "next_step": refusal.next_step,
                    "retry_after_s": refusal.retry_after_s,
                }
                for refusal in found
            ]
        },
        refusal_table,
    )


def all_refusals() -> list[Refusal]:
    """The table of proxy/refusals.py, in its order."""
    return [value for value in vars(refusals).values() if isinstance(value, Refusal)]


def refusal_table() -> str:
    """`all_refusals` as the Markdown table of docs/proxy.md."""
    lines = ["| code | status | cause | next step | retry after |", "|---|---|---|---|---|"]
    for refusal in all_refusals():
        retry = "" if refusal.retry_after_s is None else f"{refusal.retry_after_s} s"
        lines.append(
            f"| `{refusal.code}` | {refusal.status} | {refusal.cause} | {refusal.next_step} | {retry} |"
        )
    return "\n".join(lines)

"""What both `doctor` commands find, and how they say it.

1. A check is ok, a warning (works, but not for long or not as well as it should) or failed.
2. What is not ok says how to mend it.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

EXPIRY_WARNING: Final = timedelta(days=30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    name: str
    outcome: Literal["ok", "warning", "failed"]
    detail: str
    mend: str | None = None


def ok(name: str, detail: str) -> Check:
    return Check(name=name, outcome="ok", detail=detail)


def warning(name: str, detail: str, mend: str) -> Check:
    return Check(name=name, outcome="warning", detail=detail, mend=mend)


def failed(name: str, detail: str, mend: str) -> Check:
    return Check(name=name, outcome="failed", detail=detail, mend=mend)


def validity(name: str, begin: datetime | None, end: datetime, *, now: datetime, mend: str) -> Check:
    """Of a certificate that is good from *begin* (None: that was checked already) to *end*."""
    if now > end:
        return failed(name, f"expired on {end.date()}", mend)
    if begin is not None and now < begin:
        return failed(name, f"valid from {begin.isoformat()} on", "check this machine's clock")
    if end - now < EXPIRY_WARNING:
        return warning(name, f"expires on {end.date()}, in {(end - now).days} days", mend)
    return ok(name, f"valid until {end.date()}")


def has_failed(checks: Sequence[Check]) -> bool:
    return any(check.outcome == "failed" for check in checks)


def as_json(checks: Sequence[Check]) -> dict[str, object]:
    return {"ok": not has_failed(checks), "checks": [asdict(check) for check in checks]}


def as_text(checks: Sequence[Check]) -> str:
    lines = []
    for check in checks:
        lines.append(f"{check.outcome:8}{check.name}: {check.detail}")
        if check.mend is not None:
            lines.append(f"        mend: {check.mend}")
    return "\n".join(lines)

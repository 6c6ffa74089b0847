"""What commands say alike: numbers, times, uses of keys, what each proxy has answered."""

from datetime import UTC, datetime
from typing import Any


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """`1 key`, `2 keys`, `2 proxies`."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def time_text(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def use_text(key: Any) -> str:
    return f"sign {key['algorithm']}" if key["use"] == "sign" else str(key["use"])


def outcomes_text(data: Any) -> str:
    lines = []
    for row in data["proxies"]:
        until_ms = row.get("may_hold_keys_until_ms")
        more = f"; may hold keys until {time_text(until_ms)}" if until_ms else ""
        error = f": {row['error']}" if row.get("error") else ""
        lines.append(f"  {row['proxy']}: {row['outcome']}{error}{more}")
    if any(row["outcome"] == "failed" for row in data["proxies"]):
        lines.append("  `key-agent doctor` says how to mend what failed")
    return "\n".join(lines)


def objects_text(listed: Any) -> str:
    """The services whose objects are at stake, with their keys."""
    rows = [
        f"  {row['service']} ({counted(sum(key['state'] != 'destroyed' for key in row['keys']), 'key')})"
        for row in listed["services"]
    ]
    return "\n".join(rows) or "  (there are no services)"

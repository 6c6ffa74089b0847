"""What a comparison yields: rows of bench/results.json and of the table."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

RESULTS_FILE: Final = Path(__file__).with_name("results.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result. *ratio*: ours to *baseline*'s, above 1 where we are better. *extra*: fields of its own."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    goal: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"name": self.name, "value": _round(self.value), "unit": self.unit}
        for name in ("baseline", "ratio", "goal"):
            if (value := getattr(self, name)) is not None:
                fields[name] = _round(value)
        return fields | {name: _round(value) for name, value in self.extra.items()}


def compare(
    name: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    goal: float | None = None,
    **extra: Any,
) -> Row:
    """A row from the rounds of both sides: medians, and the ratio of the medians."""
    value, baseline = statistics.median(ours), statistics.median(theirs)
    extra |= {"rounds": len(ours), "spread": _spread(ours), "baseline_spread": _spread(theirs)}
    return Row(
        name=name, value=value, unit=unit, baseline=baseline, ratio=value / baseline, goal=goal, extra=extra
    )


def _spread(rounds: Sequence[float]) -> float:
    """Largest distance from the median, as a part of it."""
    middle = statistics.median(rounds)
    return max(abs(one - middle) for one in rounds) / middle if middle else 0.0


def save(rows: Sequence[dict[str, Any]], path: Path = RESULTS_FILE) -> None:
    """Replace the rows of the same names in *path*, keep the others, add the new ones."""
    kept: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    fresh = {row["name"]: row for row in rows}
    merged = [fresh.pop(row["name"], row) for row in kept] + list(fresh.values())
    path.write_text(json.dumps(merged, indent=1) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for people, the fields of their own below each."""
    lines = [f"{'name':24} {'value':>10} {'baseline':>10} {'unit':14} {'ratio':>7} {'goal':>6}"]
    for row in rows:
        known = {name: row.get(name) for name in ("baseline", "ratio", "goal")}
        baseline, ratio, goal = ("" if value is None else f"{value:.4g}" for value in known.values())
        missed = known["goal"] is not None and known["ratio"] is not None and known["ratio"] < known["goal"]
        lines.append(
            f"{row['name']:24} {row['value']:>10.4g} {baseline:>10} {row['unit']:14} {ratio:>7} {goal:>6}"
            + ("  missed" if missed else "")
        )
        own = {name: value for name, value in row.items() if name not in {"name", "value", "unit", *known}}
        if own:
            lines.append("    " + ", ".join(f"{name} {value}" for name, value in own.items()))
    return "\n".join(lines)


def _round(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value

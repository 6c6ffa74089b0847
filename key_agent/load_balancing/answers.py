"""What HAProxy is answered for each server: the worst of what signed rows and the server itself say. Pure.

1. HAProxy takes exactly `up ready N%`, `drain`, `maint` and `down #reason`, with a newline; whatever else it
   gets leaves the server as it was. So nothing else is ever answered.
2. Unknown is down: a server nobody configured, an environment that stands in no row, rows that are old, a
   server that does not answer.
3. A weight is never 0: for HAProxy that would be another word for drain.
4. A server that drains by its own word alone, since its HSM is silent, has keys for some minutes. While
   another one is up it drains; the last one goes on.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from key_agent.environments.states import EnvironmentState

MIN_WEIGHT: Final = 5
FULL_WEIGHT: Final = 100
_SMOOTHING: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a server says of itself."""

    serves: bool
    state: str
    latency_s: float
    reason: str | None = None
    """Why, for people."""


def answer(
    state: EnvironmentState | None,
    report: Report | None,
    *,
    is_fresh: bool,
    weight: int = FULL_WEIGHT,
    is_last: bool = False,
) -> str:
    """One line. *state*: of the environment, by the newest rows; *is_fresh*: whether they are of now.
    *is_last*: no other server is up (rule 4).
    """
    if not is_fresh or state is None:
        return "down #unknown\n"
    match state:
        case EnvironmentState.ACTIVE | EnvironmentState.DRAINING:
            if report is None:
                return "down #silent\n"
            if not report.serves:
                return f"down #{_word(report.state)}\n"
            if state is EnvironmentState.DRAINING or (drains_by_itself(state, report) and not is_last):
                return "drain\n"
            return f"up ready {min(max(weight, MIN_WEIGHT), FULL_WEIGHT)}%\n"
        case EnvironmentState.PROVISIONING | EnvironmentState.JOINING | EnvironmentState.RETIRED:
            return "maint\n"
        case _:
            return f"down #{state}\n"


def is_up(line: str) -> bool:
    """Whether HAProxy sends requests after this answer."""
    return line.startswith("up ")


def drains_by_itself(state: EnvironmentState | None, report: Report | None) -> bool:
    """Whether the server's own word is that it drains, and the rows do not ask for it."""
    return (
        state is EnvironmentState.ACTIVE
        and report is not None
        and report.serves
        and report.state == EnvironmentState.DRAINING
    )


def _word(text: str) -> str:
    """What may stand behind `#`: the server's own word is not to be trusted with a newline."""
    kept = "".join(char for char in text[:32] if char.isascii() and (char.isalnum() or char == "-"))
    return kept or "refuses"


def weights(latencies_s: Mapping[str, float]) -> dict[str, int]:
    """By server: 100 for the fastest, less for the others in proportion, 5 at least."""
    best_s = min(latencies_s.values(), default=0.0)
    return {
        name: max(MIN_WEIGHT, min(FULL_WEIGHT, round(FULL_WEIGHT * best_s / latency_s)))
        if latency_s > 0
        else FULL_WEIGHT
        for name, latency_s in latencies_s.items()
    }


def smoothed(before_s: float | None, measured_s: float) -> float:
    """An exponentially weighted mean of latencies."""
    return measured_s if before_s is None else before_s + _SMOOTHING * (measured_s - before_s)

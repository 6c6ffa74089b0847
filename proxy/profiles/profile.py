"""What a profile is: the rules of one kind of cloud service.

1. A profile decides from the head of a request, without I/O and without state.
2. What it has no rule for it refuses: `refusals.UNKNOWN_ROUTE`, and nothing was sent.
3. It may only use the edits it is given plus its own; framing, hops and digests are the planner's business.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from proxy.message import BodyFrame, RequestHead
from proxy.plan import Edits, RequestPlan
from proxy.tenants.model import ServiceEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Limitation:
    """Something that works against the service directly and does not, or not fully, on ciphertext."""

    what: str
    why: str


class Profile(ABC):
    name: ClassVar[str]
    summary: ClassVar[str]
    operations: ClassVar[tuple[tuple[str, str], ...]]
    """(operation, what becomes of it), for `sealgate profile show`."""
    limitations: ClassVar[tuple[Limitation, ...]]

    @abstractmethod
    def plan(self, head: RequestHead, frame: BodyFrame, edits: Edits, service: ServiceEntry) -> RequestPlan:
        """The plan of one request. RefusedError (or a Refuse) for what this profile has no rule for."""

    def describe(self) -> dict[str, object]:
        """For `sealgate profile show --json`."""
        return {
            "name": self.name,
            "summary": self.summary,
            "operations": [{"operation": name, "becomes": text} for name, text in self.operations],
            "limitations": [{"what": item.what, "why": item.why} for item in self.limitations],
        }

    def text(self) -> str:
        """For `sealgate profile show`."""
        width = max(len(name) for name, _ in self.operations)
        lines = [f"Profile {self.name}: {self.summary}", "", "Operations"]
        lines += [f"  {name:<{width}}  {text}" for name, text in self.operations]
        lines += ["", "What stops working on ciphertext"]
        lines += [f"  {item.what}: {item.why}" for item in self.limitations]
        return "\n".join(lines)

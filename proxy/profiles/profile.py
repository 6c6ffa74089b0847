"""What a profile is: the rules of one kind of cloud service.

1. A profile plans from the head of a request, without I/O and without state. What needs more (a body to read,
   the service to ask) is planned as `Converse`: then its handler is called, and may wait.
2. What it has no rule for it refuses: `refusals.UNKNOWN_ROUTE`, and nothing was sent.
3. It may only use the edits it is given plus its own; framing, hops and digests are the planner's business.
4. Whoever authenticates its clients by signatures does so in `plan`, before anything is asked or sent.
5. What any of its methods raises refuses the flow.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from proxy.messages.message import AnswerHead, RequestHead
from proxy.plans.answer_plan import AnswerPlan
from proxy.plans.plan import Going, RequestPlan
from proxy.plans.profile_options import ProfileOptions
from proxy.plans.request import Request
from proxy.refusals import Refusal, Shaped


@dataclass(frozen=True, slots=True, kw_only=True)
class Limitation:
    """Something that works against the service directly and does not, or not fully, on ciphertext."""

    what: str
    why: str


class Profile(ABC):
    name: ClassVar[str]
    summary: ClassVar[str]
    encrypts: ClassVar[str]
    """What of this kind of service's content is sealed."""
    sizes: ClassVar[str]
    """How the sizes that clients see are found."""
    validators: ClassVar[str]
    """What becomes of ETags and dates."""
    digests: ClassVar[str]
    """What becomes of digests, in requests and answers."""
    operations: ClassVar[tuple[tuple[str, str], ...]]
    """(operation, what becomes of it), for `sealgate profile show`."""
    limitations: ClassVar[tuple[Limitation, ...]]
    options: ClassVar[type[ProfileOptions]] = ProfileOptions
    makes_composites: ClassVar[bool] = False
    """Whether objects of this profile may have been put together by the service (format.md 3.5)."""

    @abstractmethod
    def plan(self, request: Request) -> RequestPlan:
        """The plan of one request. RefusedError (or a Refuse) for what this profile has no rule for."""

    def plan_answer(
        self,
        request: Request,  # noqa: ARG002 - for those who override it
        plan: Going,  # noqa: ARG002
        answer: AnswerHead,  # noqa: ARG002
        proposed: AnswerPlan,
    ) -> AnswerPlan:
        """The plan of the answer to *request*, which went on by *plan*.

        *proposed* is what the rules for all services come to; a profile adds edits, or the mapping of a body
        that passes. It must not make plaintext of what was to be opened, or pass what was refused.
        """
        return proposed

    def may_be_composite(self, request: Request, answer: AnswerHead) -> bool:  # noqa: ARG002
        """Whether the object that *answer* (to a HEAD, say) is about may be a composite: then its size costs
        a look at its first bytes, once per version. Where the service says so (`-N` in S3's ETags), less."""
        return self.makes_composites

    def shape(self, refusal: Refusal, head: RequestHead) -> Shaped | None:  # noqa: ARG002
        """A refusal of what *head* asks in the dialect's own shape; None: our JSON."""
        return None

    def describe(self) -> dict[str, object]:
        """For `sealgate profile show --json`."""
        return {
            "name": self.name,
            "summary": self.summary,
            "encrypts": self.encrypts,
            "sizes": self.sizes,
            "validators": self.validators,
            "digests": self.digests,
            "operations": [{"operation": name, "becomes": text} for name, text in self.operations],
            "options": sorted(self.options.__struct_fields__),
            "limitations": [{"what": item.what, "why": item.why} for item in self.limitations],
        }

    def text(self) -> str:
        """For `sealgate profile show`."""
        width = max(len(name) for name, _ in self.operations)
        lines = [f"Profile {self.name}: {self.summary}", ""]
        lines += [
            f"Encrypts    {self.encrypts}",
            f"Sizes       {self.sizes}",
            f"Validators  {self.validators}",
            f"Digests     {self.digests}",
            f"Options     {', '.join(sorted(self.options.__struct_fields__))}",
            "",
            "Operations",
        ]
        lines += [f"  {name:<{width}}  {text}" for name, text in self.operations]
        lines += ["", "What stops working on ciphertext"]
        lines += [f"  {item.what}: {item.why}" for item in self.limitations]
        return "\n".join(lines)

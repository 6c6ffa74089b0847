"""Whether rows that somebody brings are believed: whoever relays them, only who held a term has written them.

1. The terms among them follow those that are known (terms.py); the newest one's holder has signed the head
   that they lead to, and has not been withdrawn by what is known.
2. Each row bears the signature of whoever held its term.
3. An elected term is believed when the election says so; asked last, it may take time.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from envelope.errors import IntegrityError
from key_agent.environments.shared.documents import Delta, check_head, check_shape
from key_agent.environments.shared.shared_errors import StaleTermError
from key_agent.environments.shared.shared_state import State
from key_agent.environments.shared.terms import Holder, Judgement, Known, check_goes_on, judge

_MANY: Final = 1000
"""Rows whose signatures, or whose digest, take longer than others should wait for the event loop."""

type Confirm = Callable[[Holder], Awaitable[None]]
"""IntegrityError unless the election gave that holder its term. What else it raises: nobody can tell."""


@dataclass(slots=True)
class Believing:
    tenant: str
    pins: dict[str, str] = field(default_factory=dict)
    """Registry keys by agent, of who may hold a term while no rows are known."""
    confirm: Confirm | None = None
    """Asks the election about a new term; None: there is none, so no elected term is believed."""

    async def check(self, delta: Delta, known: Known, after: State) -> Judgement:
        """By whom *after*, to which *delta* leads, was written: the holders of its terms, and nobody else.

        StaleTermError, IntegrityError, FormatError. *after* bears the delta's head then.
        """
        check_shape(delta)
        if known.terms.newest is None:
            known = Known(pins=self.pins)
        judged = judge(self.tenant, known, after.rows.values())
        if judged.overruled:
            raise StaleTermError(f"term {delta.term} has two managers, and ours was approved later")
        holder = judged.terms.newest
        if holder is None or (holder.term, holder.agent) != (delta.term, delta.signer):
            raise IntegrityError(f"a delta of term {delta.term} is not its holder's")
        check_goes_on(known, holder)
        check_head(self.tenant, delta.head, holder.key)

        def check_rows() -> None:
            for row in delta.rows:
                judged.terms.check(self.tenant, row)

        await beside(len(delta.rows), check_rows)
        if judged.elected is not None:
            if self.confirm is None:
                raise IntegrityError(f"term {judged.elected.term} was elected, and no election is known here")
            await self.confirm(judged.elected)
        after.sign(delta.signature)
        return judged


async def beside[T](rows: int, work: Callable[[], T]) -> T:
    """What *work* returns; in a thread if it is about many rows: whoever asks meanwhile is answered.

    It touches nothing but values, or what the caller's lock keeps to itself.
    """
    return work() if rows < _MANY else await asyncio.to_thread(work)

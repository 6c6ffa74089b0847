"""This environment's proxies are told what it is: at once when it changes, and again whenever one forgot.

1. The word goes to every proxy that this agent feeds or has fed, whether keys flow or not: one that must not
   serve has to know, whatever it still holds.
2. It has been told once it is in force there. Who cannot be told is tried again; its keys end by themselves.
3. A proxy that restarted has forgotten it, and serves nothing until it hears it. Every RESTATE_S the word is
   said again; to many proxies less often, as presence.py asks them.
4. An environment by itself, without shared rows, tells nobody anything.
5. One that is active while its KEK cannot be used (an HSM that hangs, a refused login, a revoked KEK) says
   that it is draining, so load balancers send callers to the others. Its proxies go on with the keys that
   they have, as long as those are valid and not taken back. (A key server that throttles us works, and the
   others would be throttled next.) So does one whose HSM is merely slow
   (sources/pace.py): long before a time-out tells that it hangs, callers are elsewhere.
6. What is said is what is true when it leaves, not when it began to wait. Proxies that do not answer wait
   apart from those that do (push/places.py).
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

import structlog

from key_agent.consent import Consent, Standing
from key_agent.environments.states import EnvironmentState
from key_agent.journal import Journal
from key_agent.push.places import Places
from key_agent.push.targets import Targets
from key_agent.push.transport import EnvironmentWord, PushError, Transport
from key_agent.refresh import wait_until
from key_agent.registry.model import Proxy
from key_agent.sources.pace import Pace
from runtime.clock import Clock

if TYPE_CHECKING:
    from key_agent.environments.peers.peering import Peering
    from key_agent.environments.peers.standing import Verdict

log = structlog.get_logger(__name__)

RESTATE_S: Final = 5.0
MAX_RESTATEMENTS_PER_S: Final = 50
"""What nobody waits for is not worth a core: proxies that restarted get their keys no sooner."""
TIMEOUT_S: Final = 5.0
AT_ONCE: Final = {"quick": 128, "slow": 384}
_FIRST_RETRY_S: Final = 0.25
_MAX_RETRY_S: Final = 5.0
_USABLE: Final = frozenset({Standing.CONSENTED, Standing.UNPROVEN, Standing.THROTTLED})
"""What is known of the KEK while there is no reason to go elsewhere (rule 5)."""


@dataclass(frozen=True, slots=True)
class Told:
    """How far one proxy is."""

    word: EnvironmentWord
    at_boot_s: float
    error: str | None = None
    """Why it does not act on `word`; None: it does."""


class Telling:
    def __init__(
        self,
        *,
        transport: Transport,
        targets: Targets,
        journal: Journal,
        clock: Clock,
        word: Callable[[], EnvironmentWord | None],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """*word*: what is to be told now; None: nothing."""
        self._transport = transport
        self._targets = targets
        self._journal = journal
        self._clock = clock
        self._word = word
        self._wake = asyncio.Event()
        self._timeout_s = timeout_s
        self._places = Places(**AT_ONCE)
        self._told: dict[str, Told] = {}
        self._next_s: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._under_way: set[str] = set()

    @classmethod
    def of(
        cls,
        peering: "Peering",
        *,
        consent: Consent,
        pace: Pace,
        transport: Transport,
        targets: Targets,
        journal: Journal,
        clock: Clock,
    ) -> "Telling":
        """What *peering*'s verdict, the KEK's standing and the HSM's pace say, from now on."""

        def word() -> EnvironmentWord | None:
            if not peering.is_united:
                return None
            position = peering.position
            state, reason = said(peering.verdict, consent.standing, slow=pace.slow)
            return EnvironmentWord(
                environment=peering.environment,
                state=state,
                reason=None if reason is None else reason[:500],
                term=position.term,
                epoch=position.epoch,
            )

        telling = cls(transport=transport, targets=targets, journal=journal, clock=clock, word=word)
        peering.listen(lambda _view: telling.wake())
        consent.listen(lambda _change: telling.wake())
        pace.listen(lambda _slow: telling.wake())
        return telling

    @property
    def word(self) -> EnvironmentWord | None:
        """What is to be told now; None: nothing."""
        return self._word()

    @property
    def told(self) -> Mapping[str, Told]:
        """By proxy: what it was told last, and whether it acts on it."""
        return self._told

    def wake(self) -> None:
        """The word has changed."""
        self._wake.set()

    async def run(self) -> NoReturn:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                word = self._word()
                next_s: float | None = None
                if word is not None:
                    next_s = self._begin(group, word)
                await wait_until(self._clock, self._wake, next_s)
        raise AssertionError("unreachable: the loop above does not end")

    def _begin(self, group: asyncio.TaskGroup, word: EnvironmentWord) -> float:
        proxies = self._targets.proxies
        for gone in self._told.keys() - proxies.keys():
            del self._told[gone]
        now_s = self._clock.boot_s()
        next_s = now_s + self._restate_s()
        for name, proxy in proxies.items():
            told = self._told.get(name)
            is_new = told is None or told.word != word
            due_s = 0.0 if is_new and not self._failures.get(name) else self._next_s.get(name, 0.0)
            if name in self._under_way:
                continue
            if due_s <= now_s:
                self._under_way.add(name)
                group.create_task(self._tell(proxy, word), name=f"environment:{name}")
            else:
                next_s = min(next_s, due_s)
        return next_s

    def _restate_s(self) -> float:
        return max(RESTATE_S, len(self._targets.proxies) / MAX_RESTATEMENTS_PER_S)

    async def _tell(self, proxy: Proxy, word: EnvironmentWord) -> None:
        error: str | None = None
        try:
            async with self._places.taken(is_slow=bool(self._failures.get(proxy.id))):
                if (now := self._word()) is None:  # nothing is to be told any more
                    self._under_way.discard(proxy.id)
                    return
                word = now
                async with asyncio.timeout(self._timeout_s):
                    found = await self._transport.tell_environment(proxy, word)
            if (found.term, found.epoch) != (word.term, word.epoch) or found.state != word.state:
                error = f"it acts on epoch {found.epoch} of term {found.term}: {found.state}"
        except PushError as failure:
            error = str(failure)
        except TimeoutError:
            error = f"no answer within {self._timeout_s:g} s"
        except Exception as failure:  # noqa: BLE001 - whatever one proxy does stops no loop; told by its name
            error = type(failure).__name__
        self._note(proxy.id, word, error)

    def _note(self, name: str, word: EnvironmentWord, error: str | None) -> None:
        self._under_way.discard(name)
        now_s = self._clock.boot_s()
        before = self._told.get(name)
        self._told[name] = Told(word, now_s, error)
        failures = 0 if error is None else self._failures.get(name, 0) + 1
        self._failures[name] = failures
        pause_s = min(_MAX_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(failures - 1, 10))
        self._next_s[name] = now_s + (pause_s if failures else self._restate_s())
        if before is None or before.word.state != word.state or (before.error is None) != (error is None):
            if error is None:
                self._journal.note("environment-told", proxy=name, state=word.state, epoch=word.epoch)
            else:
                log.warning("a proxy does not know what its environment is", proxy=name, cause=error)
        if error is not None or word != self._word():
            self._wake.set()  # else all thousand answers would have the loop look at all thousand proxies


def said(verdict: "Verdict", kek: Standing, *, slow: str | None = None) -> tuple[str, str | None]:
    """State and reason that the proxies are told (rule 5). *slow*: why the HSM is to be spared."""
    if verdict.state == EnvironmentState.ACTIVE:
        if kek not in _USABLE:
            return EnvironmentState.DRAINING, f"its KEK cannot be used now: {kek}"
        if slow is not None:
            return EnvironmentState.DRAINING, f"slow: {slow}"
    return verdict.state, verdict.reason

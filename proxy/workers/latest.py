"""The envelopes that a new worker needs to hold what the others hold.

1. Per network service: the latest that replaced everything, and what was added since. A withdrawal replaces
   everything, so that a new worker is told of it as well.
2. As they came, sealed: whoever reads them here learns nothing. What has run out the worker refuses.
3. Bounded: more than MAX_ADDED additions without a replacement, and nothing is kept of that service; then its
   agent is asked to push again.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from proxy.keys.relay import Relayed

MAX_ADDED: Final = 64


class LatestEnvelopes:
    """What was relayed last, by network service."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Relayed]] = {}
        self._too_many: set[str] = set()

    def keep(self, relayed: Relayed, codes: Iterable[str]) -> None:
        """Remember of *relayed* what was in force everywhere: those whose code is empty."""
        for token, service, replaces, code in zip(
            relayed.tokens, relayed.services, relayed.replaces, codes, strict=True
        ):
            if code:
                continue
            single = Relayed(
                tenant=relayed.tenant,
                agent=relayed.agent,
                challenge=relayed.challenge,
                signing_certificate_der=relayed.signing_certificate_der,
                tokens=(token,),
                services=(service,),
                replaces=(replaces,),
                is_challenged=relayed.is_challenged,
                takes_keys=relayed.takes_keys,
            )
            if replaces:
                self._too_many.discard(service)
                self._kept[service] = [single]
            elif len(kept := self._kept.setdefault(service, [])) <= MAX_ADDED:
                kept.append(single)
            else:
                self._too_many.add(service)
                del self._kept[service]

    def forget(self, services: Iterable[str]) -> None:
        """These are not provisioned any more."""
        for service in services:
            self._kept.pop(service, None)
            self._too_many.discard(service)

    def services(self) -> set[str]:
        return self._kept.keys() | self._too_many

    @property
    def is_complete(self) -> bool:
        """Whether what is kept is all that the others hold."""
        return not self._too_many

    def __iter__(self) -> Iterator[Relayed]:
        """In the order to be taken in."""
        for kept in list(self._kept.values()):
            yield from kept

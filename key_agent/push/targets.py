"""Who gets what, who acknowledged what, and until when: the registry's answer, held in memory too.

1. Each change is written to the registry; memory follows. Only this process writes (the lock in `state_dir`).
   Receipts are the exception: memory has them at once, the registry a moment later. A reading that was made
   in between takes nothing back.
2. A withdrawal works from memory alone: a database that hangs or is gone does not stop it.
3. What is asked once per proxy costs as much as that proxy has services, not as many as there are in all.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from envelope.keys import NetworkService
from key_agent.registry.model import Book, Link, Proxy, Receipt, Reservation

type Place = tuple[NetworkService, str]


class Targets:
    def __init__(self, book: Book) -> None:
        self._proxies: dict[str, Proxy] = {}
        self._links: dict[Place, Link] = {}
        self._sequences: dict[NetworkService, int] = {}
        self._owners: dict[str, list[NetworkService]] = {}
        """By proxy id: whose links there are."""
        self._fed: dict[str, Proxy] | None = None
        self.load(book)

    def load(self, book: Book) -> None:
        """Take over a fresh reading of the registry."""
        self._proxies = dict(book.proxies)
        before = self._links
        self._links = {(link.owner, link.proxy_id): link for link in book.links}
        for place in before.keys() & self._links.keys():
            self._links[place] = _with_receipts_of(before[place], self._links[place])
        self._owners = {}
        for owner, proxy_id in self._links:
            self._owners.setdefault(proxy_id, []).append(owner)
        self._fed = None
        for owner, sequence in book.sequences.items():
            # Withdrawals may have used higher ones that the database never got to hear of.
            self._sequences[owner] = max(sequence, self._sequences.get(owner, 0))

    @property
    def proxies(self) -> Mapping[str, Proxy]:
        return self._proxies

    @property
    def links(self) -> list[Link]:
        return list(self._links.values())

    def links_at(self, proxy_id: str) -> list[Link]:
        """Withdrawn ones too."""
        return [self._links[owner, proxy_id] for owner in self._owners.get(proxy_id, ())]

    def fed(self) -> Mapping[str, Proxy]:
        """The proxies that should hold keys: not removed, with at least one service.

        The same object until the registry is read again.
        """
        if self._fed is None:
            wanted = {link.proxy_id for link in self._links.values() if not link.withdrawn}
            self._fed = {
                name: proxy for name, proxy in self._proxies.items() if name in wanted and not proxy.removed
            }
        return self._fed

    def owners_at(self, proxy_id: str) -> list[NetworkService]:
        return [link.owner for link in self.links_at(proxy_id) if not link.withdrawn]

    def to_withdraw(self, now_ms: int, boot_s: float, *, everything: bool) -> dict[str, list[Link]]:
        """By proxy: links where keys may be valid though they should not be. All of them, if *everything*."""
        found = {
            name: self.to_withdraw_at(name, now_ms, boot_s, everything=everything) for name in self._owners
        }
        return {name: links for name, links in found.items() if links}

    def to_withdraw_at(self, proxy_id: str, now_ms: int, boot_s: float, *, everything: bool) -> list[Link]:
        """The same for one proxy."""
        if proxy_id not in self._proxies:
            return []
        return [
            link
            for link in self.links_at(proxy_id)
            if (everything or link.withdrawn) and link.may_hold_keys(now_ms, boot_s)
        ]

    def next_sequences(self, owners: Iterable[NetworkService], now_ms: int) -> dict[NetworkService, int]:
        """A sequence above every earlier one for each of *owners*, by the rule of format.md 5."""
        chosen = {owner: max(self._sequences.get(owner, 0) + 1, now_ms) for owner in owners}
        self._sequences.update(chosen)
        return chosen

    def note_issued(self, reservations: Sequence[Reservation], until_ms: int, *, until_boot_s: float) -> None:
        """What `Registry.reserve` has committed; *until_boot_s* with all that a proxy may add to it."""
        for made in reservations:
            self._sequences[made.owner] = max(made.sequence, self._sequences.get(made.owner, 0))
            for link in made.links:
                place = (link.owner, link.proxy_id)
                if (known := self._links.get(place)) is not None:
                    self._links[place] = replace(
                        known,
                        issued_sequence=made.sequence,
                        issued_until_ms=until_ms,
                        issued_until_boot_s=until_boot_s,
                    )

    def note_receipts(self, receipts: Iterable[Receipt]) -> None:
        for receipt in receipts:
            place = (receipt.owner, receipt.proxy_id)
            if (link := self._links.get(place)) is not None:
                self._links[place] = _after(link, receipt)


def _with_receipts_of(known: Link, read: Link) -> Link:
    """*read* from the registry, with what memory knows and the registry has not stored yet (rule 1)."""
    link = replace(read, issued_until_boot_s=known.issued_until_boot_s)
    if known.accepted_sequence > read.accepted_sequence:
        link = replace(
            link,
            accepted_sequence=known.accepted_sequence,
            accepted_at_ms=known.accepted_at_ms,
            valid_until_ms=known.valid_until_ms,
            error=known.error,
            error_at_ms=known.error_at_ms,
        )
    if known.withdrawn_sequence > read.withdrawn_sequence:
        link = replace(
            link,
            withdrawn_sequence=known.withdrawn_sequence,
            withdrawn_at_ms=known.withdrawn_at_ms,
            valid_until_ms=known.valid_until_ms,
            error=known.error,
            error_at_ms=known.error_at_ms,
        )
    return link


def _after(link: Link, receipt: Receipt) -> Link:
    """*link* once *receipt* is known; mirrors the registry's update."""
    if not receipt.accepted:
        return replace(link, error=receipt.error, error_at_ms=receipt.at_ms)
    if receipt.keys > 0:
        if receipt.sequence <= link.accepted_sequence:
            return link
        return replace(
            link,
            accepted_sequence=receipt.sequence,
            accepted_at_ms=receipt.at_ms,
            valid_until_ms=receipt.valid_until_ms,
            error=None,
            error_at_ms=None,
        )
    if receipt.sequence <= link.withdrawn_sequence:
        return link
    return replace(
        link,
        withdrawn_sequence=receipt.sequence,
        withdrawn_at_ms=receipt.at_ms,
        valid_until_ms=None,
        error=None,
        error_at_ms=None,
    )

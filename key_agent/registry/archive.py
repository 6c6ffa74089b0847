"""The registry's content as one value: what a backup holds.

Rows as they are written, wraps included, receipts left out: those are old news.
"""

from dataclasses import dataclass, field

import msgspec

from envelope.keys import KeyId, KeyUse, NetworkService
from key_agent.sources.source import Kek, KekReference, WrapMethod, WrappedKey


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A row, or several that belong together."""


class KekEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    label: str
    object_id: bytes
    version: int
    state: str
    reason: str | None
    since_ms: int
    rotated_to: str | None
    method: str | None = None
    token_serial: str = ""
    canary_ciphertext: bytes = b""
    canary_sha256: bytes = b""
    made_at_ms: int = 0
    public_key_der: bytes = b""
    valid_from_s: int | None = None
    valid_until_s: int | None = None
    is_adopted: bool = False

    def kek(self, environment_id: str) -> Kek | None:
        """None if it was never made."""
        if self.method is None:
            return None
        return Kek(
            reference=KekReference(
                kek_id=self.id, label=self.label, object_id=self.object_id, environment_id=environment_id
            ),
            method=WrapMethod(self.method),
            token_serial=self.token_serial,
            canary_ciphertext=self.canary_ciphertext,
            canary_sha256=self.canary_sha256,
            created_at_ms=self.made_at_ms,
            public_key_der=self.public_key_der,
            valid_from_s=self.valid_from_s,
            valid_until_s=self.valid_until_s,
            is_adopted=self.is_adopted,
        )


class WrapEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kek_id: str
    method: str
    wrapped: bytes
    token_serial: str
    made_at_ms: int


class KeyEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kid: str
    service: str
    use: str
    algorithm: str | None
    version: int
    state: str
    reason: str | None
    since_ms: int
    activated_at_ms: int | None
    suspended_from: str | None
    kcv: bytes
    created_at_ms: int
    wraps: tuple[WrapEntry, ...]

    def wrapped(self, wrap: WrapEntry, environment_id: str) -> WrappedKey:
        return WrappedKey(
            owner=NetworkService.parse(self.service),
            key_id=KeyId.parse(self.kid),
            kek_id=wrap.kek_id,
            environment_id=environment_id,
            method=WrapMethod(wrap.method),
            wrapped=wrap.wrapped,
            kcv=self.kcv,
            token_serial=wrap.token_serial,
            created_at_ms=wrap.made_at_ms,
            use=KeyUse(self.use),
            algorithm=self.algorithm,
            version=self.version,
        )


class ServiceEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    removed: bool
    rotate_after_days: int | None


class ProxyEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: str
    url: str
    ca_pem: str
    removed: bool


class LinkEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    service: str
    proxy: str
    certificate_pem: str
    withdrawn: bool
    issued_sequence: int
    issued_until_ms: int
    withdrawn_sequence: int


class SequenceEntry(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    issuer: str
    service: str
    sequence: int


class Archive(_Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything but receipts, which are old news."""

    tenant: str
    environment: str
    agent: str
    made_at_ms: int
    keks: tuple[KekEntry, ...]
    services: tuple[ServiceEntry, ...]
    proxies: tuple[ProxyEntry, ...]
    links: tuple[LinkEntry, ...]
    keys: tuple[KeyEntry, ...]
    sequences: tuple[SequenceEntry, ...]


@dataclass(slots=True)
class Restored:
    """What an import did, or would do."""

    keks: list[str] = field(default_factory=list)
    services: list[str] = field(default_factory=list)
    proxies: list[str] = field(default_factory=list)
    links: int = 0
    keys: list[str] = field(default_factory=list)
    """New here."""
    wraps: list[str] = field(default_factory=list)
    """Of keys that were here without a sound one."""
    waiting: list[str] = field(default_factory=list)
    """Their KEK is not in the HSM."""
    ended: dict[str, str] = field(default_factory=dict)
    """Key id -> the final state that the backup knew and the registry did not."""
    kept: dict[str, str] = field(default_factory=dict)
    """Key id -> why what is here stays as it is though the backup says something else."""

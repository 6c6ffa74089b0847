"""A core with real keys, a real audit log and a clock that only the test moves."""

import json
import os
from collections.abc import Mapping
from ipaddress import ip_network
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from envelope.keys import KeyId, KeyMaterial, KeyState, KeyUse, NetworkService, SigningAlgorithm
from envelope.material import Operation
from proxy.encryption_service.access import Access, Caller
from proxy.encryption_service.call import Peer
from proxy.encryption_service.core import Core
from proxy.encryption_service.credentials import SecretSealer, new_access_key, new_bearer
from proxy.encryption_service.limits import Limiter, Limits
from proxy.encryption_service.model import (
    OPERATIONS_OF,
    CredentialEntry,
    CredentialKind,
    DialectEntry,
    DialectName,
    DialectSettings,
    KaclsSettings,
    NamedKey,
    NativeSettings,
    Op,
    ServiceDirectory,
    TransitSettings,
    XksSettings,
)
from proxy.keys.cache import KeyCache
from runtime.audit import AuditLog
from tests.fakes.clock import ManualClock

TENANT = "acme"
PEER = Peer(address="127.0.0.1")
VALIDITY_S = 330.0
_NO_SETTINGS: Mapping[DialectName, DialectSettings] = {
    DialectName.NATIVE: NativeSettings(),
    DialectName.XKS: XksSettings(),
    DialectName.TRANSIT: TransitSettings(),
    DialectName.KACLS: KaclsSettings(),
}


def signing_material(algorithm: SigningAlgorithm) -> bytes:
    """A fresh private key as PKCS#8 DER."""
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
    if algorithm is SigningAlgorithm.ES256:
        key = ec.generate_private_key(ec.SECP256R1())
    elif algorithm is SigningAlgorithm.EDDSA:
        key = ed25519.Ed25519PrivateKey.generate()
    else:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


class ServiceRig:
    """`core`, `access` and `limiter` as a process has them; the directory is changed by `serve`."""

    def __init__(self, directory: Path, *, limits: Limits | None = None) -> None:
        self.clock = ManualClock()
        self.audit_file = directory / "audit.log"
        self.audit = AuditLog.open(self.audit_file, self.clock)
        self.keys = KeyCache(self.clock)
        self.sealer = SecretSealer(directory)
        self.directory = ServiceDirectory.of()
        self.several: set[str] = set()
        """Tenants with several environments, of which this is one."""
        self.access = Access(lambda: self.directory, self.clock, self.sealer)
        self.limiter = Limiter(
            self.clock,
            limits,
            credential_rate=lambda name: self.directory.credentials[name].requests_per_s,
        )
        self.core = Core(
            keys=self.keys,
            access=self.access,
            directory=lambda: self.directory,
            audit=self.audit,
            clock=self.clock,
            limiter=self.limiter,
            is_one_of_several=lambda tenant: tenant in self.several,
        )
        self._materials: dict[NetworkService, dict[int, tuple[KeyId, bytes]]] = {}

    def close(self) -> None:
        self.keys.close()
        self.audit.close()

    # Provisioning.

    def serve(self, *entries: NamedKey | DialectEntry | CredentialEntry) -> None:
        """Add to the directory, replacing what has the same name."""
        now = self.directory
        keys, dialects, credentials = dict(now.keys), dict(now.dialects), dict(now.credentials)
        for entry in entries:
            match entry:
                case NamedKey():
                    keys[entry.owner] = entry
                case DialectEntry():
                    dialects[entry.tenant, entry.dialect] = entry
                case CredentialEntry():
                    credentials[entry.id] = entry
        self.directory = ServiceDirectory(keys=keys, dialects=dialects, credentials=credentials)

    def revoke(self, credential_id: str) -> None:
        now = self.directory
        credentials = {name: entry for name, entry in now.credentials.items() if name != credential_id}
        self.directory = ServiceDirectory(keys=now.keys, dialects=now.dialects, credentials=credentials)

    def add_key(
        self,
        name: str = "orders",
        *,
        tenant: str = TENANT,
        algorithm: SigningAlgorithm | None = None,
        blocked: bool = False,
        operations: frozenset[Op] | None = None,
    ) -> NamedKey:
        """A named key in the directory; nothing is pushed yet."""
        use = KeyUse.DATA if algorithm is None else KeyUse.SIGN
        key = NamedKey(
            owner=NetworkService(tenant, name),
            use=use,
            algorithm=algorithm,
            blocked=blocked,
            operations=OPERATIONS_OF[use] if operations is None else operations,
        )
        self.serve(key)
        return key

    def add_dialect(
        self, dialect: DialectName, settings: DialectSettings | None = None, *, tenant: str = TENANT
    ) -> DialectEntry:
        entry = DialectEntry(
            tenant=tenant, dialect=dialect, settings=_NO_SETTINGS[dialect] if settings is None else settings
        )
        self.serve(entry)
        return entry

    def add_bearer(
        self,
        dialect: DialectName = DialectName.NATIVE,
        *,
        tenant: str = TENANT,
        keys: frozenset[str] | None = None,
        operations: frozenset[Op] = frozenset(Op),
        endpoint: str | None = None,
        networks: tuple[str, ...] = (),
        not_after_s: float | None = None,
        requests_per_s: float | None = None,
    ) -> str:
        """Issue a bearer token and return it; its id is the part between its dots."""
        made = new_bearer()
        self.serve(
            CredentialEntry(
                id=made.id,
                tenant=tenant,
                dialect=dialect,
                kind=CredentialKind.BEARER,
                label="tests",
                keys=keys,
                operations=operations,
                endpoint=endpoint,
                networks=tuple(ip_network(text) for text in networks),
                not_after_s=not_after_s,
                verifier=made.verifier,
                requests_per_s=requests_per_s,
            )
        )
        return made.token

    def add_access_key(
        self,
        prefix: str,
        *,
        tenant: str = TENANT,
        keys: frozenset[str] | None = None,
        operations: frozenset[Op] = frozenset(Op),
        networks: tuple[str, ...] = (),
        not_after_s: float | None = None,
    ) -> tuple[str, str]:
        """Issue a SigV4 credential for the XKS store at *prefix*: access key id and raw secret."""
        made = new_access_key()
        self.serve(
            CredentialEntry(
                id=made.id,
                tenant=tenant,
                dialect=DialectName.XKS,
                kind=CredentialKind.SIGV4,
                label="tests",
                keys=keys,
                operations=operations,
                endpoint=prefix,
                networks=tuple(ip_network(text) for text in networks),
                not_after_s=not_after_s,
                verifier=self.sealer.seal(made.secret, made.id, tenant),
            )
        )
        return made.id, made.secret

    def caller(self, dialect: DialectName = DialectName.NATIVE, *, tenant: str = TENANT) -> Caller:
        """Somebody who may do everything of *tenant*'s over *dialect*, which is switched on for it."""
        if self.directory.dialect(tenant, dialect) is None:
            self.add_dialect(dialect, tenant=tenant)
        if dialect is DialectName.XKS:
            access_key_id, _secret = self.add_access_key("prefix", tenant=tenant)
            candidate = self.access.sigv4(access_key_id, dialect=dialect, endpoint="prefix", peer=PEER)
            return candidate.admit(matches=True)
        if dialect is DialectName.KACLS:
            return Caller(tenant=tenant, dialect=dialect, name="user@example.com")
        return self.access.bearer(self.add_bearer(dialect, tenant=tenant), dialect=dialect, peer=PEER)

    # Pushing.

    def push(
        self,
        key: NamedKey,
        *states: KeyState,
        validity_s: float = VALIDITY_S,
        versions: tuple[int, ...] | None = None,
    ) -> None:
        """What an accepted `set` does: version 1, 2, ... in these states (default: version 1, active)."""
        states = states or (KeyState.ACTIVE,)
        numbers = versions or tuple(range(1, len(states) + 1))
        materials = [
            self._material(key, version, state) for version, state in zip(numbers, states, strict=True)
        ]
        self.keys.install(key.owner, materials, deadline_boot_s=self.clock.boot_s() + validity_s)

    def withdraw(self, key: NamedKey) -> None:
        """What an accepted empty `set` does."""
        self.keys.install(key.owner, [], deadline_boot_s=self.clock.boot_s() + 1, operation=Operation.SET)

    def secret(self, key: NamedKey, version: int = 1) -> bytes:
        return self._known(key, version)[1]

    def key_id(self, key: NamedKey, version: int = 1) -> KeyId:
        return self._known(key, version)[0]

    def _known(self, key: NamedKey, version: int) -> tuple[KeyId, bytes]:
        of_key = self._materials.setdefault(key.owner, {})
        if version not in of_key:
            secret = os.urandom(32) if key.algorithm is None else signing_material(key.algorithm)
            of_key[version] = (KeyId.random(), secret)
        return of_key[version]

    def _material(self, key: NamedKey, version: int, state: KeyState) -> KeyMaterial:
        key_id, secret = self._known(key, version)
        return KeyMaterial(
            owner=key.owner,
            key_id=key_id,
            state=state,
            use=key.use,
            algorithm=key.algorithm,
            version=version,
            secret=bytearray() if state is KeyState.DESTROYED else bytearray(secret),
        )

    # Judging.

    def records(self) -> list[dict[str, object]]:
        """The audit records of calls, oldest first."""
        lines = self.audit_file.read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        return [event for event in events if event["action"] == "service-call"]

"""`backup export` and `backup import`: the registry in a file that only the HSM opens (docs/adr/0012).

1. The file's key is a key like any other: made and wrapped by the source, bound to a name that no service can
   have. It comes out of the source in an envelope for a key pair that lives for this one call, so whatever
   the source is (HSM, key server), it needs no other operation, and no key of a service is opened for it.
2. The file is a line that says what it is, a line with what the HSM needs (KEK, wrapped file key), and one
   sealed object (docs/format.md 2) that is bound to both lines. A changed byte anywhere is found.
3. An import has the HSM open every wrap, with its check value, before it counts. What exists here stays;
   what is destroyed on either side is destroyed (registry/archiving.py).
4. Without the KEK the file says nothing, and a file from before a rotation of KEKs needs the old KEK.
"""

import base64
import binascii
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import batched
from typing import Final

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from envelope.certificates import Identity, Role, fingerprint, identity_uri, key_usage
from envelope.derive import object_key
from envelope.errors import SealgateError
from envelope.keys import KeyMaterial, KeyState, NetworkService
from envelope.material import Expectation, Signer, open_envelope
from envelope.objects import Bind, Opener, Sealer
from key_agent.agent import Agent
from key_agent.errors import KeyAgentError, KeySourceError
from key_agent.operations.commands import Commands, Json
from key_agent.registry.archive import Archive, KekEntry, KeyEntry, Restored, WrapEntry
from key_agent.registry.archiving import WrapName
from key_agent.registry.store import RefusedChangeError
from key_agent.rotation import unopenable
from key_agent.sources.source import EnvelopeRequest, Kek, NewKey, Recipient, Verdict, WrappedKey

RESERVED_SERVICE: Final = "sealgate-backup"
"""No network service has this name: it is the file key's owner."""
MAX_FILE_BYTES: Final = 256 << 20
_MAGIC: Final = b"sealgate-backup 1\n"
_MAX_HEADER_BYTES: Final = 64 << 10
_AUDIENCE: Final = "backup"
_VALIDITY_S: Final = 60
_BATCH: Final = 500


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must be known to ask the HSM for the file's key; nothing of it is secret."""

    tenant: str
    environment: str
    made_at_ms: int
    kek: KekEntry
    file_key: KeyEntry


class BackupError(KeyAgentError):
    """The file is not one of ours, or not as it was written."""


class BackupCommands(Commands):
    async def backup_export(self) -> Json:
        """The registry as an encrypted file, in base64: only with the HSM's KEK can it be read."""
        async with self._one_at_a_time:
            agent = self._agent
            kek = await self._usable_kek()
            await agent.journal.record("backup-export", outcome="begun", kek=kek.reference.kek_id)
            archive = await agent.registry.archive(now_ms=agent.now_ms())
            [wrapped] = await agent.source.generate(kek, [NewKey(owner=_owner(agent))])
            header = _header(archive, kek, wrapped)
            async with _FileKey(agent, kek, wrapped) as material:
                content = _seal(header, material, msgspec.json.encode(archive))
                # What was not read back is no backup.
                if _unseal(content, material) != archive:
                    raise BackupError("the file does not read back as what was written")
            await agent.journal.record("backup-export", kek=kek.reference.kek_id, keys=len(archive.keys))
            return {
                "content_base64": base64.b64encode(content).decode(),
                "bytes": len(content),
                "sha256": sha256(content).hexdigest(),
                "kek": kek.reference.kek_id,
                "made_at_ms": archive.made_at_ms,
                "services": sum(not service.removed for service in archive.services),
                "keys": sum(key.state != KeyState.DESTROYED for key in archive.keys),
            }

    async def backup_import(self, *, content_base64: str, trial: bool = False) -> Json:
        """Fill what is missing here from a file; with *trial* only say what that would be."""
        async with self._one_at_a_time:
            if self._manager() is not None:
                raise RefusedChangeError(
                    "the keys of several environments come from the others, not from a backup",
                    "`key-agent env list` shows which of them answers",
                )
            agent = self._agent
            content = _decoded(content_base64)
            header = _read_header(content)
            if (header.tenant, header.environment) != (agent.tenant, agent.environment_id):
                raise RefusedChangeError(
                    f"the backup is of {header.tenant}, environment {header.environment}",
                    "import it at an agent of that tenant and environment",
                )
            action = "backup-try" if trial else "backup-import"
            kek, wrapped = _named(header, agent)
            await agent.journal.record(action, outcome="begun", kek=kek.reference.kek_id)
            proof = await agent.source.diagnose(kek)
            if proof.verdict is not Verdict.OK:
                raise RefusedChangeError(
                    f"the backup's KEK {kek.reference.kek_id} (label {kek.reference.label}) is not in the "
                    f"HSM: {proof.verdict}: {proof.detail}",
                    "bring that KEK back into its token first; without it the file cannot be read",
                )
            async with _FileKey(agent, kek, wrapped) as material:
                archive = _unseal(content, material)
            if header.kek not in archive.keks:
                raise BackupError("the file names another KEK outside than inside")
            opened, refused, absent = await self._opened(archive)
            done = await agent.registry.restore(
                archive, opened=opened, refused=refused.keys(), now_ms=agent.now_ms(), is_trial=trial
            )
            if not trial:
                await agent.reload(kek_changed=True)
                if agent.consent.kek is not None:
                    await agent.watch.look()
                agent.rotations.wake()
            await agent.journal.record(
                action, keks=len(done.keks), keys=len(done.keys), wraps=len(done.wraps), ended=len(done.ended)
            )
            pushed = [] if trial else await self._pushed()
            return _result(archive, done, refused=refused, absent=absent, trial=trial) | {"proxies": pushed}

    async def _opened(self, archive: Archive) -> tuple[set[WrapName], dict[WrapName, str], dict[str, str]]:
        """Wraps that the HSM opens, those that it does not and why, and KEKs that are not there and why."""
        agent = self._agent
        opened: set[WrapName] = set()
        refused: dict[WrapName, str] = {}
        absent: dict[str, str] = {}
        for entry in archive.keks:
            kek = entry.kek(agent.environment_id)
            wraps = _wraps_under(archive, entry.id, agent.environment_id)
            if kek is None or not wraps:
                continue
            found = await agent.source.diagnose(kek)
            if found.verdict is not Verdict.OK:
                absent[entry.id] = f"{found.verdict}: {found.detail}"
                continue
            for some in batched(wraps, _BATCH):
                failed = await unopenable(agent.source, kek, some)
                for key in some:
                    name = (str(key.key_id), entry.id)
                    if key.key_id in failed:
                        refused[name] = failed[key.key_id]
                    else:
                        opened.add(name)
        return opened, refused, absent


class _FileKey:
    """The file's key in this process's memory, for as long as the block runs."""

    def __init__(self, agent: Agent, kek: Kek, wrapped: WrappedKey) -> None:
        self._agent = agent
        self._kek = kek
        self._wrapped = wrapped
        self._keys: tuple[KeyMaterial, ...] = ()

    async def __aenter__(self) -> KeyMaterial:
        agent, key = self._agent, self._wrapped
        private = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(key.owner, private, agent.clock.wall_s())
        nonce, now_s = os.urandom(16), int(agent.clock.wall_s())
        request = EnvelopeRequest(
            owner=key.owner,
            keys=((key, KeyState.ACTIVE),),
            recipients=(
                Recipient(
                    audience=_AUDIENCE,
                    nonce=nonce,
                    certificate_der=certificate.public_bytes(Encoding.DER),
                    sequence=1,
                ),
            ),
            issued_at_s=now_s,
            expires_at_s=now_s + _VALIDITY_S,
        )
        [result] = await agent.source.seal_envelopes(self._kek, [request])
        if (token := result.tokens.get(_AUDIENCE)) is None:
            reasons = [*result.failed_keys.values(), *result.failed_recipients.values()]
            raise BackupError(
                f"the HSM does not open the file's key: {'; '.join(reasons) or 'no reason given'}"
            )
        signer = agent.signing.certificate
        claims = open_envelope(
            token,
            Expectation(
                owner=key.owner,
                audience=_AUDIENCE,
                recipient_certificate=certificate,
                recipient_key=private,
                signers={fingerprint(signer): Signer(signer, agent.agent_id)},
                now_s=agent.clock.wall_s(),
                validity_s=_VALIDITY_S,
                nonce=nonce,
                last_sequence=0,
                seen_token_ids=(),
            ),
        )
        self._keys = claims.keys
        for found in claims.keys:
            if found.key_id == key.key_id:
                return found
        raise KeySourceError("the source answered with another key than it was asked for")

    async def __aexit__(self, *_: object) -> None:
        for key in self._keys:
            key.wipe()


def _seal(header: _Header, material: KeyMaterial, plain: bytes) -> bytes:
    lines = _MAGIC + msgspec.json.encode(header) + b"\n"
    with _derived(material) as key:
        sealer = Sealer(key, material.owner, material.key_id, bind=Bind.NAME, name=sha256(lines).digest())
        return lines + bytes(sealer.update(plain)) + bytes(sealer.finalize())


def _unseal(content: bytes, material: KeyMaterial) -> Archive:
    """BackupError if anything in *content* is not as it was written."""
    lines = content[: _header_end(content)]
    try:
        with _derived(material) as key:
            opener = Opener(material.owner, lambda _: key, bind=Bind.NAME, name=sha256(lines).digest())
            plain = bytes(opener.update(content[len(lines) :])) + bytes(opener.finalize())
        return msgspec.json.decode(plain, type=Archive)
    except SealgateError as error:
        raise BackupError(f"the backup is not as it was written: {error}") from error
    except msgspec.DecodeError:
        raise BackupError("the backup is of another version of Sealgate") from None


@contextmanager
def _derived(material: KeyMaterial) -> Iterator[bytearray]:
    key = bytearray(object_key(material.secret, material.owner, material.key_id))
    try:
        yield key
    finally:
        key[:] = bytes(len(key))


def _decoded(content_base64: str) -> bytes:
    try:
        content = base64.b64decode(content_base64, validate=True)
    except (binascii.Error, ValueError):
        raise BackupError("not a backup: the content is no base64") from None
    if len(content) > MAX_FILE_BYTES:
        raise BackupError(f"larger than {MAX_FILE_BYTES} bytes")
    return content


def _header_end(content: bytes) -> int:
    if not content.startswith(_MAGIC):
        raise BackupError("not a backup of Sealgate, or of a newer version")
    end = content.find(b"\n", len(_MAGIC), len(_MAGIC) + _MAX_HEADER_BYTES)
    if end < 0:
        raise BackupError("the backup is cut, or no backup")
    return end + 1


def _read_header(content: bytes) -> _Header:
    """BackupError. Nothing of it is believed before the object behind it has opened."""
    try:
        return msgspec.json.decode(content[len(_MAGIC) : _header_end(content)], type=_Header)
    except msgspec.DecodeError as error:
        raise BackupError(f"the backup's second line cannot be read: {error}") from None


def _named(header: _Header, agent: Agent) -> tuple[Kek, WrappedKey]:
    try:
        kek = header.kek.kek(agent.environment_id)
        [wrap] = header.file_key.wraps
        wrapped = header.file_key.wrapped(wrap, agent.environment_id)
    except (ValueError, SealgateError) as error:
        raise BackupError(f"the backup's second line does not fit: {error}") from None
    if kek is None or wrapped.owner != _owner(agent) or wrapped.kek_id != kek.reference.kek_id:
        raise BackupError("the backup's second line does not fit")
    return kek, wrapped


def _header(archive: Archive, kek: Kek, wrapped: WrappedKey) -> _Header:
    [entry] = [entry for entry in archive.keks if entry.id == kek.reference.kek_id]
    return _Header(
        tenant=archive.tenant,
        environment=archive.environment,
        made_at_ms=archive.made_at_ms,
        kek=entry,
        file_key=KeyEntry(
            kid=str(wrapped.key_id),
            service=str(wrapped.owner),
            use=wrapped.use,
            algorithm=wrapped.algorithm,
            version=wrapped.version,
            state=KeyState.ACTIVE,
            reason=None,
            since_ms=archive.made_at_ms,
            activated_at_ms=None,
            suspended_from=None,
            kcv=wrapped.kcv,
            created_at_ms=wrapped.created_at_ms,
            wraps=(
                WrapEntry(
                    kek_id=wrapped.kek_id,
                    method=wrapped.method,
                    wrapped=wrapped.wrapped,
                    token_serial=wrapped.token_serial,
                    made_at_ms=wrapped.created_at_ms,
                ),
            ),
        ),
    )


def _owner(agent: Agent) -> NetworkService:
    return NetworkService(agent.tenant, RESERVED_SERVICE)


def _wraps_under(archive: Archive, kek_id: str, environment_id: str) -> list[WrappedKey]:
    return [
        key.wrapped(wrap, environment_id)
        for key in archive.keys
        for wrap in key.wraps
        if wrap.kek_id == kek_id and key.state != KeyState.DESTROYED
    ]


def _certificate(
    owner: NetworkService, private: ec.EllipticCurvePrivateKey, now_s: float
) -> x509.Certificate:
    """For the one envelope with the file's key: signed by itself, nobody has to believe it."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, RESERVED_SERVICE)])
    uri = identity_uri(Identity(owner.tenant, Role.SERVICE, owner.service))
    now = datetime.fromtimestamp(int(now_s), UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(minutes=5))
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
        .add_extension(key_usage(key_agreement=True), critical=True)
        .sign(private, hashes.SHA256())
    )


def _result(
    archive: Archive,
    done: Restored,
    *,
    refused: dict[WrapName, str],
    absent: dict[str, str],
    trial: bool,
) -> Json:
    return {
        "trial": trial,
        "made_at_ms": archive.made_at_ms,
        "keks": done.keks,
        "services": done.services,
        "proxies_added": done.proxies,
        "links": done.links,
        "keys": done.keys,
        "wraps": done.wraps,
        "waiting": _unique(done.waiting),
        "ended": done.ended,
        "kept": done.kept,
        "refused": {kid: reason for (kid, _), reason in refused.items()},
        "absent_keks": absent,
    }


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))

"""A KMIP server as key server: the AES key and the MAC key stay there and work there.

1. Decrypt and MAC are the server's operations, not Get: there the server enforces the key's state, while Get
   hands out a revoked key like any other. GCM is no choice: PyKMIP drops the tag.
2. A key *name* is two objects, `name` (AES-256, encrypt and decrypt) and `name-mac` (HMAC-SHA-256). One of
   them gone or revoked, the key is gone or revoked. Wrapped: IV (16) ‖ ciphertext ‖ MAC (32); the MAC is over
   lp(binding) ‖ IV ‖ ciphertext and is verified before anything is decrypted.
3. Objects are found by name, exactly one each, and their state is asked for anew at every call.
4. After any exception the connection is closed: PyKMIP's next call would read the previous answer.
5. PyKMIP checks no host names and refuses TLS 1.3, and reads answers of up to 4 GiB; the connection is made
   here instead.
"""

import contextlib
import hmac
import logging
import os
import ssl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, override

from kmip.core import enums
from kmip.core.factories.attributes import AttributeFactory
from kmip.pie import objects
from kmip.pie.client import ProxyKmipClient
from kmip.pie.exceptions import KmipOperationFailure
from kmip.services.kmip_client import KMIPProxy
from kmip.services.kmip_protocol import KMIPProtocol

from envelope.derive import lp
from key_agent.sources.servers.server import (
    Found,
    Item,
    KeyGoneError,
    KeyServer,
    ServerUnavailableError,
    Standing,
    Unopened,
    Unsupported,
)
from key_agent.sources.source import WrapMethod

ANSWER_LIMIT: Final = 1024 * 1024
IV_SIZE: Final = 16
BLOCK_SIZE: Final = 16
MAC_SIZE: Final = 32
KEY_BITS: Final = 256
_MAC_SUFFIX: Final = "-mac"
_CBC: Final[dict[str, Any]] = {
    "cryptographic_algorithm": enums.CryptographicAlgorithm.AES,
    "block_cipher_mode": enums.BlockCipherMode.CBC,
    "padding_method": enums.PaddingMethod.PKCS5,
}
_CIPHER_USE: Final = [enums.CryptographicUsageMask.ENCRYPT, enums.CryptographicUsageMask.DECRYPT]
_MAC_USE: Final = [enums.CryptographicUsageMask.MAC_GENERATE, enums.CryptographicUsageMask.MAC_VERIFY]
_LOST: Final = frozenset({enums.ResultReason.ITEM_NOT_FOUND, enums.ResultReason.PERMISSION_DENIED})


class _Protocol(KMIPProtocol):  # type: ignore[misc]  # PyKMIP has no types
    """Rule 5."""

    def _recv_all(self, total_bytes_to_be_read: int) -> bytes:
        if total_bytes_to_be_read > ANSWER_LIMIT:
            raise ValueError("the answer is too long")
        data: bytes = super()._recv_all(total_bytes_to_be_read)
        return data


class _Proxy(KMIPProxy):  # type: ignore[misc]  # PyKMIP has no types
    """Rule 5."""

    def __init__(self, context: ssl.SSLContext, host: str, port: int, timeout_s: float) -> None:
        super().__init__(host=host, port=port, config_file=os.devnull)
        self._context = context
        self.timeout = timeout_s

    def open(self) -> None:
        super().open()
        self.protocol = _Protocol(self.socket)

    def _create_socket(self, sock: Any) -> None:
        sock.settimeout(self.timeout)
        self.socket = self._context.wrap_socket(sock, server_hostname=self.host)


class Kmip(KeyServer):
    """*host*: as in the server's certificate; the client certificate is our identity there."""

    method = WrapMethod.CBC_HMAC

    def __init__(
        self,
        host: str,
        port: int,
        *,
        canary_name: str,
        ca_file: Path,
        certificate_file: Path,
        key_file: Path,
        timeout_s: float,
    ) -> None:
        logging.getLogger("kmip").setLevel(logging.CRITICAL)  # it logs what it sends
        self._address = (host, port)
        self._canary_name = canary_name
        self._files = (ca_file, certificate_file, key_file)
        self._timeout_s = timeout_s
        self._client: ProxyKmipClient | None = None
        self._attributes = AttributeFactory()

    @override
    def identity(self) -> str:
        """The canary key's id there and the second it was made in; no server has two such."""
        found = self._call(lambda client: self._locate(client, self._canary_name))
        if len(found) != 1:
            return "kmip:none"
        [uid] = found
        made = self._call(lambda client: self._attribute(client, uid, "Initial Date"))
        return f"kmip:{uid}:{made}"

    @override
    def find(self, name: str) -> Found:
        return self._call(lambda client: self._standing(client, name))[0]

    @override
    def create(self, name: str) -> None:
        def make(client: ProxyKmipClient) -> None:
            uid = client.create(
                enums.CryptographicAlgorithm.AES, KEY_BITS, name=name, cryptographic_usage_mask=_CIPHER_USE
            )
            client.activate(uid)
            # Create makes no HMAC keys; the worker's own random bytes are registered and forgotten.
            secret = os.urandom(KEY_BITS // 8)
            mac = objects.SymmetricKey(
                enums.CryptographicAlgorithm.HMAC_SHA256, KEY_BITS, secret, _MAC_USE, name + _MAC_SUFFIX
            )
            client.activate(client.register(mac))

        self._administer("make the key", make)

    @override
    def destroy(self, name: str) -> None:
        def work(client: ProxyKmipClient) -> None:
            for object_name in (name, name + _MAC_SUFFIX):
                for uid in self._locate(client, object_name):
                    state = self._attribute(client, uid, "State")
                    if state is enums.State.ACTIVE:
                        client.revoke(enums.RevocationReasonCode.CESSATION_OF_OPERATION, uid)
                    if state not in (enums.State.DESTROYED, enums.State.DESTROYED_COMPROMISED):
                        client.destroy(uid)

        self._administer("destroy the key", work)

    @override
    def set_enabled(self, name: str, *, enabled: bool) -> None:
        raise Unsupported("KMIP has no state that can be taken back: revoke the key, or destroy it")

    @override
    def random(self, size: int) -> bytes:
        return os.urandom(size)  # PyKMIP has no RNG Retrieve

    @override
    def sealed_size(self, size: int) -> int:
        return IV_SIZE + size + BLOCK_SIZE - size % BLOCK_SIZE + MAC_SIZE

    @override
    def seal(self, name: str, items: Sequence[Item]) -> list[bytes]:
        def work(client: ProxyKmipClient) -> list[bytes]:
            cipher_uid, mac_uid = self._usable(client, name)
            sealed = []
            for item in items:
                iv = os.urandom(IV_SIZE)
                ciphertext, _ = client.encrypt(item.data, cipher_uid, _CBC, iv)
                mac = self._mac(client, mac_uid, item.binding, iv + ciphertext)
                sealed.append(iv + ciphertext + mac)
            return sealed

        return self._using(work)

    @override
    def open(self, name: str, items: Sequence[Item]) -> list[bytes | Unopened]:
        def work(client: ProxyKmipClient) -> list[bytes | Unopened]:
            cipher_uid, mac_uid = self._usable(client, name)
            opened = [self._open_one(client, cipher_uid, mac_uid, item) for item in items]
            # States never go back: usable now, the key was usable all the while.
            self._usable(client, name)
            return opened

        return self._using(work)

    @override
    def describe(self) -> dict[str, object]:
        host, port = self._address
        found = self._call(lambda client: self._locate(client, self._canary_name))
        return {"kind": "KMIP", "host": host, "port": port, "canary_keys": len(found)}

    @override
    def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):  # of a library: there is nothing left to do
                client.close()

    # Within.

    def _open_one(
        self, client: ProxyKmipClient, cipher_uid: str, mac_uid: str, item: Item
    ) -> bytes | Unopened:
        sealed = item.data
        body = len(sealed) - IV_SIZE - MAC_SIZE
        if body < BLOCK_SIZE or body % BLOCK_SIZE:
            return Unopened(f"has {len(sealed)} bytes, which nothing is sealed to")
        expected = self._mac(client, mac_uid, item.binding, sealed[:-MAC_SIZE])
        if not hmac.compare_digest(expected, sealed[-MAC_SIZE:]):
            return Unopened("does not verify")
        plain: bytes = client.decrypt(sealed[IV_SIZE:-MAC_SIZE], cipher_uid, _CBC, sealed[:IV_SIZE])
        return plain

    def _mac(self, client: ProxyKmipClient, uid: str, binding: bytes, data: bytes) -> bytes:
        _, mac = client.mac(lp(binding) + data, uid, enums.CryptographicAlgorithm.HMAC_SHA256)
        if not isinstance(mac, bytes) or len(mac) != MAC_SIZE:
            raise ValueError("a MAC of another length")
        return mac

    def _usable(self, client: ProxyKmipClient, name: str) -> tuple[str, str]:
        found, uids = self._standing(client, name)
        if found.standing is not Standing.USABLE:
            raise KeyGoneError(found.detail)
        cipher_uid, mac_uid = uids
        return cipher_uid, mac_uid

    def _standing(self, client: ProxyKmipClient, name: str) -> tuple[Found, list[str]]:
        uids: list[str] = []
        for object_name, algorithm in (
            (name, enums.CryptographicAlgorithm.AES),
            (name + _MAC_SUFFIX, enums.CryptographicAlgorithm.HMAC_SHA256),
        ):
            found = self._locate(client, object_name)
            if not found:
                return Found(Standing.ABSENT, f"the server shows no object {object_name!r}"), []
            if len(found) > 1:
                return Found(Standing.AMBIGUOUS, f"{len(found)} objects are named {object_name!r}"), []
            [uid] = found
            state = self._attribute(client, uid, "State")
            if state in (enums.State.DESTROYED, enums.State.DESTROYED_COMPROMISED):
                return Found(Standing.ABSENT, f"{object_name!r} is destroyed"), []
            if state is not enums.State.ACTIVE:
                name_of_state = getattr(state, "name", str(state)).lower()
                return Found(Standing.DISABLED, f"{object_name!r} is {name_of_state}"), []
            is_ours = (
                self._attribute(client, uid, "Cryptographic Algorithm") is algorithm
                and self._attribute(client, uid, "Cryptographic Length") == KEY_BITS
            )
            if not is_ours:
                return Found(Standing.FOREIGN, f"{object_name!r} is of another kind"), []
            uids.append(uid)
        return Found(Standing.USABLE), uids

    def _locate(self, client: ProxyKmipClient, name: str) -> list[str]:
        attribute = self._attributes.create_attribute(enums.AttributeType.NAME, name)
        return [str(uid) for uid in client.locate(attributes=[attribute])]

    def _attribute(self, client: ProxyKmipClient, uid: str, name: str) -> Any:
        _, told = client.get_attributes(uid, [name])
        if len(told) != 1 or told[0].attribute_name.value != name:
            raise ValueError(f"the server does not tell {name}")
        return told[0].attribute_value.value

    def _using[T](self, work: Callable[[ProxyKmipClient], T]) -> T:
        """KeyGoneError where the server refuses the key; what it means is decided by looking (rule 3)."""
        try:
            return self._call(work)
        except KmipOperationFailure as failure:
            if failure.reason in _LOST:
                raise KeyGoneError(f"the server says {failure.reason.name.lower()}") from None
            raise ServerUnavailableError(f"the server says {_name(failure)}") from None

    def _administer(self, what: str, work: Callable[[ProxyKmipClient], None]) -> None:
        try:
            self._call(work)
        except KmipOperationFailure as failure:
            raise Unsupported(f"the server does not let us {what}: {_name(failure)}") from None

    def _call[T](self, work: Callable[[ProxyKmipClient], T]) -> T:
        """KmipOperationFailure passes; anything else is no answer."""
        try:
            return work(self._connected())
        except (KeyGoneError, Unsupported):
            self.close()
            raise
        except KmipOperationFailure:
            self.close()
            raise
        except Exception as error:  # noqa: BLE001 - PyKMIP raises whatever it stumbles over
            self.close()
            raise ServerUnavailableError(f"no answer ({_text(error)})") from None
        except BaseException:
            self.close()
            raise

    def _connected(self) -> ProxyKmipClient:
        if self._client is None:
            ca_file, certificate_file, key_file = self._files
            context = ssl.create_default_context(cafile=str(ca_file))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(certificate_file, key_file)
            host, port = self._address
            client = ProxyKmipClient(hostname=host, port=port, config_file=os.devnull)
            client.proxy = _Proxy(context, host, port, self._timeout_s)
            client.open()
            self._client = client
        return self._client


def _name(failure: KmipOperationFailure) -> str:
    return str(getattr(failure.reason, "name", failure.reason)).lower()


def _text(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not verify: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__

"""OpenBao's (or Vault's) transit engine as key server.

1. The EKM's binding is `associated_data`: a ciphertext filed under another place is refused by the server.
2. A missing key is never encrypted with: a token that may create would make a new one. So the key is looked
   for before the first encryption of a connection, and revocation is told by decrypting (diagnosis.py).
3. What the engine says of a key: 400 with one of `_KEY_SAYS`. A sealed server, a missing mount, a token that
   may not, every 5xx, and any text not known here say nothing about a key. 403 (denied) and 429 (throttled)
   are told apart from the others, for people and for what the agent asks next.
4. The token is read from its file at each connection, renewed while it is renewable, and is in no message.
"""

import base64
import binascii
import contextlib
import http.client
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, override
from urllib.parse import quote, urlsplit

from key_agent.sources.servers.server import (
    Found,
    Item,
    KeyGoneError,
    KeyServer,
    ServerDeniedError,
    ServerThrottledError,
    ServerUnavailableError,
    Standing,
    Unopened,
    Unsupported,
)
from key_agent.sources.source import WrapMethod

ANSWER_LIMIT: Final = 4 * 1024 * 1024
_KEY_TYPE: Final = "aes256-gcm96"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_KEY_SAYS: Final[Mapping[str, Standing]] = {
    "encryption key not found": Standing.ABSENT,
    "refusing to use soft-deleted key": Standing.DISABLED,
    "key is soft-deleted": Standing.DISABLED,
}
_TOO_OLD: Final = "ciphertext or signature version is disallowed by policy (too old)"


class OpenBao(KeyServer):
    """*url*: `https://host:port`; *mount* without slashes at its ends. Connects at the first call."""

    method = WrapMethod.TRANSIT

    def __init__(
        self,
        url: str,
        token: Callable[[], str],
        *,
        mount: str = "transit",
        namespace: str | None = None,
        ca_file: Path | None = None,
        certificate_file: Path | None = None,
        key_file: Path | None = None,
        timeout_s: float,
    ) -> None:
        self._address = urlsplit(url)
        self._token_of = token
        self._mount = quote(mount, safe="/")
        self._namespace = namespace
        self._tls_files = (ca_file, certificate_file, key_file)
        self._timeout_s = timeout_s
        self._connection: http.client.HTTPConnection | None = None
        self._token = ""
        self._renew_at_s = 0.0
        self._retry_after_s = 0.0
        """As the last answer said."""
        self._seen: set[str] = set()

    @override
    def identity(self) -> str:
        told = self._ask("GET", f"sys/internal/ui/mounts/{self._mount}")
        unique = told.get("uuid")
        if told.get("type") != "transit" or not isinstance(unique, str) or not unique:
            raise ServerUnavailableError(f"{self._mount} is no transit engine")
        return f"transit:{unique}"

    @override
    def find(self, name: str) -> Found:
        status, body = self._call("GET", self._key(name))
        if status == 404 and _errors(body) == []:
            return Found(Standing.ABSENT, "the server has no key of that name")
        told = _data(self._sound(status, body))
        if told.get("soft_deleted"):
            return Found(Standing.DISABLED, "the key is soft-deleted")
        wanted: dict[str, object] = {
            "type": _KEY_TYPE,
            "exportable": False,
            "allow_plaintext_backup": False,
            "derived": False,
            "imported_key": False,
        }
        wrong = [name for name, value in wanted.items() if told.get(name, value) != value]
        if wrong:
            return Found(Standing.FOREIGN, f"{', '.join(sorted(wrong))} of the key not as demanded")
        self._seen.add(name)
        return Found(Standing.USABLE)

    @override
    def create(self, name: str) -> None:
        self._administer("POST", self._key(name), {"type": _KEY_TYPE, "exportable": False})

    @override
    def destroy(self, name: str) -> None:
        self._seen.discard(name)
        if self.find(name).standing is Standing.ABSENT:
            return
        self._administer("POST", f"{self._key(name)}/config", {"deletion_allowed": True})
        self._administer("DELETE", self._key(name))

    @override
    def set_enabled(self, name: str, *, enabled: bool) -> None:
        if enabled:
            self._administer("POST", f"{self._key(name)}/soft-delete-restore", {})
        else:
            self._administer("DELETE", f"{self._key(name)}/soft-delete")

    @override
    def random(self, size: int) -> bytes:
        try:
            told = self._ask("POST", f"{self._mount}/random/{size}", {"format": "base64"})
        except ServerUnavailableError:
            # A minimal policy does not grant it; then the kernel's alone.
            return os.urandom(size)
        theirs = _decoded(told.get("random_bytes"))
        if len(theirs) != size:
            raise ServerUnavailableError("the server's generator answered with another length")
        # Either alone suffices: neither the server's owner nor this machine's steers the sum.
        return bytes(a ^ b for a, b in zip(theirs, os.urandom(size), strict=True))

    @override
    def sealed_size(self, size: int) -> None:
        return None

    @override
    def seal(self, name: str, items: Sequence[Item]) -> list[bytes]:
        if name not in self._seen and (found := self.find(name)).standing is not Standing.USABLE:
            raise KeyGoneError(found.detail)
        results = self._batch("encrypt", name, "plaintext", items)
        sealed = []
        for result in results:
            text = result.get("ciphertext")
            if result.get("error") or not isinstance(text, str) or not text.startswith("vault:v"):
                raise ServerUnavailableError("the server did not encrypt")
            sealed.append(text.encode("ascii"))
        return sealed

    @override
    def open(self, name: str, items: Sequence[Item]) -> list[bytes | Unopened]:
        results = self._batch("decrypt", name, "ciphertext", items)
        opened: list[bytes | Unopened] = []
        for result in results:
            error = result.get("error")
            if error == _TOO_OLD:
                # min_decryption_version was raised above it.
                text = "its version of the key is disallowed by the key's owner"
                opened.append(Unopened(text, is_disallowed=True))
            elif error:
                opened.append(Unopened("is refused by the server"))
            else:
                opened.append(_decoded(result.get("plaintext")))
        return opened

    @override
    def describe(self) -> dict[str, object]:
        status, body = self._call("GET", "sys/health?standbyok=true", anonymous=True)
        told = body if isinstance(body, dict) else {}
        return {
            "kind": "OpenBao transit",
            "url": self._address.geturl(),
            "mount": self._mount,
            "namespace": self._namespace,
            "version": str(told.get("version", "unknown")),
            "sealed": bool(told.get("sealed", status == 503)),
        }

    @override
    def close(self) -> None:
        connection, self._connection = self._connection, None
        self._token, self._renew_at_s = "", 0.0
        self._seen.clear()
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.close()

    # Within.

    def _key(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise Unsupported(f"{name!r} is no name for a transit key")
        return f"{self._mount}/keys/{name}"

    def _batch(self, operation: str, name: str, what: str, items: Sequence[Item]) -> list[dict[str, Any]]:
        batch = []
        for item in items:
            value = item.data.decode("ascii", "replace") if what == "ciphertext" else _b64(item.data)
            batch.append({what: value, "associated_data": _b64(item.binding)})
        self._key(name)
        status, body = self._call("POST", f"{self._mount}/{operation}/{name}", {"batch_input": batch})
        for error in _errors(body) or []:
            for text, standing in _KEY_SAYS.items():
                if status == 400 and text in error:
                    raise KeyGoneError(f"the server says {standing}")
        results = _data(body).get("batch_results") if isinstance(body, dict) else None
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            self._sound(status, body)
            raise ServerUnavailableError(f"an answer without results (HTTP {status})")
        if len(results) != len(items):
            raise ServerUnavailableError("the server answered for another number of items")
        for result in results:
            if any(text in str(result.get("error", "")) for text in _KEY_SAYS):
                raise KeyGoneError("the server says the key is not there, or soft-deleted")
        return results

    def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        return _data(self._sound(*self._call(method, path, body)))

    def _administer(self, method: str, path: str, body: object = None) -> None:
        status, answer = self._call(method, path, body)
        if status in (400, 403, 405):
            raise Unsupported(f"the server refuses {method} {path} (HTTP {status}): its owner has to do it")
        self._sound(status, answer)

    def _sound(self, status: int, body: object) -> object:
        if 200 <= status < 300:
            return body
        text = "; ".join(_errors(body) or [])[:200]
        told = f"HTTP {status}{': ' + text if text else ''}"
        match status:
            case 403:
                raise ServerDeniedError(told)
            case 429:
                raise ServerThrottledError(told, retry_after_s=self._retry_after_s)
            case _:
                raise ServerUnavailableError(told)

    def _call(
        self, method: str, path: str, body: object = None, *, anonymous: bool = False
    ) -> tuple[int, object]:
        try:
            if not anonymous:
                self._have_token()
            return self._exchange(method, path, body, anonymous=anonymous)
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            # Whatever it was: the next question goes over another connection.
            self.close()
            raise ServerUnavailableError(f"no answer ({_reason(error)})") from None
        except BaseException:
            self.close()
            raise

    def _exchange(self, method: str, path: str, body: object, *, anonymous: bool) -> tuple[int, object]:
        connection = self._connection or self._connect()
        headers = {"X-Vault-Request": "true", "Content-Type": "application/json"}
        if not anonymous:
            headers["X-Vault-Token"] = self._token
        if self._namespace:
            headers["X-Vault-Namespace"] = self._namespace
        content = None if body is None else json.dumps(body).encode()
        connection.request(method, f"{self._address.path.rstrip('/')}/v1/{path}", content, headers)
        answer = connection.getresponse()
        self._retry_after_s = _seconds(answer.getheader("Retry-After"))
        data = answer.read(ANSWER_LIMIT + 1)
        if len(data) > ANSWER_LIMIT:
            raise ValueError("the answer is too long")
        return answer.status, json.loads(data) if data else {}

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._address.hostname or "", self._address.port
        connection: http.client.HTTPConnection
        if self._address.scheme == "https":
            ca_file, certificate_file, key_file = self._tls_files
            context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if certificate_file is not None:
                context.load_cert_chain(certificate_file, key_file)
            connection = http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        return connection

    def _have_token(self) -> None:
        """Read it for a new connection; renew it in time. That it cannot be renewed is no error yet."""
        if self._connection is None or not self._token:
            self._token = self._token_of()
            self._renew_at_s = 0.0
        if time.monotonic() < self._renew_at_s:
            return
        status, body = self._exchange("GET", "auth/token/lookup-self", None, anonymous=False)
        if status == 429:  # nobody knows when it ends: it is looked at with the next question
            self._sound(status, body)
        told = _data(body) if status == 200 else {}
        ttl_s = told.get("ttl")
        if not isinstance(ttl_s, int) or ttl_s <= 0:
            self._renew_at_s = time.monotonic() + 3600.0  # it does not end, or nobody says
            return
        creation_s = told.get("creation_ttl")
        whole_s = creation_s if isinstance(creation_s, int) and creation_s > 0 else ttl_s
        if told.get("renewable") and ttl_s < 2 * whole_s / 3:
            self._exchange("POST", "auth/token/renew-self", {}, anonymous=False)
            ttl_s = whole_s
        self._renew_at_s = time.monotonic() + max(1.0, min(3600.0, ttl_s / 6))


def _data(body: object) -> dict[str, Any]:
    told = body.get("data") if isinstance(body, dict) else None
    return told if isinstance(told, dict) else {}


def _errors(body: object) -> list[str] | None:
    told = body.get("errors") if isinstance(body, dict) else None
    return [str(text) for text in told] if isinstance(told, list) else None


def _seconds(text: str | None) -> float:
    """Of a Retry-After header (RFC 9110, 10.2.3): a number of seconds, or 0. A date is not taken."""
    return float(text) if text is not None and re.fullmatch("[0-9]{1,5}", text) else 0.0


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decoded(text: object) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except (binascii.Error, ValueError):
        raise ServerUnavailableError("the server's answer is not base64") from None


def _reason(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not verify: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return type(error).__name__

"""The worker of a key server: a process of its own, because key material passes through it.

It is to a key server what worker_main.py is to an HSM, and imports no PKCS#11; the client of a server is
loaded only where it is used, so that an agent without PyKMIP can use OpenBao.
"""

import contextlib
from pathlib import Path
from typing import NoReturn, override

from envelope.keys import KeyId
from key_agent.sources import wire, worker_process
from key_agent.sources.parcels import load_transport_key
from key_agent.sources.servers import keks, material
from key_agent.sources.servers.diagnosis import diagnose
from key_agent.sources.servers.server import (
    CANARY_NAME,
    KeyGoneError,
    KeyServer,
    ServerUnavailableError,
    Unsupported,
)
from key_agent.sources.source import Kek, KekType, Parcel, WrappedKey
from key_agent.sources.verdict import Diagnosis, Verdict
from runtime.settings import SettingsError, read_secret_file


def main() -> NoReturn:
    """`python -I -m key_agent.sources.server_worker_main PARENT_PID`, started by worker.py only."""
    worker_process.run(_begin)


def _begin(greeting: wire.Greeting) -> "_Worker":
    if isinstance(greeting, wire.Hello):
        raise wire.ProtocolError("this worker is for key servers")
    return _Worker(greeting)


def _connect(greeting: wire.OpenBaoHello | wire.KmipHello) -> KeyServer:
    if isinstance(greeting, wire.OpenBaoHello):
        from key_agent.sources.servers.openbao import OpenBao  # noqa: PLC0415 - see above

        token_file = Path(greeting.token_file)

        def token() -> str:
            try:
                return bytes(read_secret_file(token_file)).decode("ascii").strip()
            except (SettingsError, UnicodeDecodeError) as error:
                raise OSError(f"token file {token_file}: {error}") from None

        return OpenBao(
            greeting.url,
            token,
            mount=greeting.mount,
            namespace=greeting.namespace,
            ca_file=_path(greeting.ca_file),
            certificate_file=_path(greeting.certificate_file),
            key_file=_path(greeting.key_file),
            timeout_s=greeting.timeout_s,
        )
    from key_agent.sources.servers.kmip import Kmip  # noqa: PLC0415

    return Kmip(
        greeting.host,
        greeting.port,
        canary_name=CANARY_NAME,
        ca_file=Path(greeting.ca_file),
        certificate_file=Path(greeting.certificate_file),
        key_file=Path(greeting.key_file),
        timeout_s=greeting.timeout_s,
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class _Worker(worker_process.Answerer):
    def __init__(self, greeting: wire.OpenBaoHello | wire.KmipHello) -> None:
        self._greeting = greeting
        self._connected: KeyServer | None = None

    @property
    def _server(self) -> KeyServer:
        if self._connected is None:
            self._connected = _connect(self._greeting)
        return self._connected

    @override
    def answer(self, request: wire.Request) -> wire.Reply:
        try:
            return super().answer(request)
        except Unsupported as error:
            return wire.Failed(verdict=Verdict.UNSUPPORTED, detail=str(error))
        except ServerUnavailableError as error:
            return wire.Failed(verdict=error.verdict, detail=str(error), retry_after_s=error.retry_after_s)
        except KeyGoneError as error:
            return wire.Failed(verdict=Verdict.UNREACHABLE, detail=str(error))
        except ImportError as error:
            return wire.Failed(
                verdict=Verdict.UNSUPPORTED,
                detail=f"{error.name} is not installed; requirements-agent.lock brings it",
            )

    @override
    def begin(self) -> None:
        """Nothing: a server that is away must not keep the worker from starting."""

    @override
    def create_kek(self, request: wire.CreateKek) -> Kek:
        return keks.create_kek(
            self._server,
            request.reference,
            KekType.AES_256,
            request.valid_until_s,
            replace_unfinished=request.replace_unfinished,
            now_ms=request.now_ms,
        )

    @override
    def adopt_kek(self, request: wire.AdoptKek) -> Kek:
        return keks.adopt_kek(
            self._server,
            request.reference,
            KekType.AES_256,
            request.valid_from_s,
            request.valid_until_s,
            now_ms=request.now_ms,
        )

    @override
    def destroy_kek(self, kek: Kek) -> None:
        keks.destroy_kek(self._server, kek)

    @override
    def set_kek_enabled(self, kek: Kek, *, enabled: bool) -> None:
        keks.set_kek_enabled(self._server, kek, enabled=enabled)

    @override
    def generate(self, request: wire.Generate) -> tuple[WrappedKey, ...]:
        return material.generate(
            self._server, request.kek, request.wanted, now_ms=request.now_ms, budget_s=request.budget_s
        )

    @override
    def rewrap(self, request: wire.Rewrap) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]:
        return material.rewrap(
            self._server,
            request.old,
            request.new,
            request.keys,
            now_ms=request.now_ms,
            budget_s=request.budget_s,
        )

    @override
    def export_keys(
        self, request: wire.ExportKeys
    ) -> tuple[tuple[Parcel, ...], tuple[tuple[KeyId, str], ...]]:
        return material.export_keys(
            self._server,
            request.kek,
            request.keys,
            request.destinations,
            now_s=request.now_s,
            budget_s=request.budget_s,
        )

    @override
    def import_keys(
        self, request: wire.ImportKeys
    ) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]:
        return material.import_keys(
            self._server,
            request.kek,
            request.arrivals,
            load_transport_key(Path(request.transport_key_file)),
            now_ms=request.now_ms,
            budget_s=request.budget_s,
        )

    @override
    def seal_envelopes(self, request: wire.SealEnvelopes) -> tuple[wire.SealedEnvelopes, ...]:
        signer = worker_process.signer_of(self._greeting)
        return material.seal_envelopes(
            self._server, signer, request.kek, request.requests, budget_s=request.budget_s
        )

    @override
    def diagnose(self, request: wire.Diagnose) -> Diagnosis:
        return diagnose(self._server, request.kek, now_s=request.now_s)

    @override
    def describe(self, request: wire.Describe) -> dict[str, object]:
        server = self._server
        return {"server": server.describe(), "methods": {str(server.method): keks.try_method(server)}}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()

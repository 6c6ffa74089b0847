"""The HSM worker: a process that owns the PKCS#11 module, so that its crash costs a process, not the agent.

1. Started fresh and never forked, single-threaded: what every module supports.
2. Logged in for the length of one request. One wrong PIN and this process never logs in again.
3. Error texts name classes and states, never data.
"""

import contextlib
from pathlib import Path
from typing import NoReturn, override

from pkcs11 import PKCS11Error

from envelope.keys import KeyId
from key_agent.sources import wire, worker_process
from key_agent.sources.hsm import diagnosis, keks, material
from key_agent.sources.hsm.session import Token
from key_agent.sources.parcels import load_transport_key
from key_agent.sources.source import Kek, Parcel, WrappedKey
from key_agent.sources.verdict import Diagnosis, Verdict


def main() -> NoReturn:
    """`python -I -m key_agent.sources.worker_main PARENT_PID`, started by worker.py only."""
    worker_process.run(_begin)


def _begin(greeting: wire.Greeting) -> "_Worker":
    if not isinstance(greeting, wire.Hello):
        raise wire.ProtocolError("this worker is for HSMs")
    return _Worker(greeting)


class _Worker(worker_process.Answerer):
    def __init__(self, hello: wire.Hello) -> None:
        self._token = Token(
            hello.module_path,
            hello.token_label,
            hello.token_serial,
            hello.pin,
            hello.module_arguments,
            hello.quirks,
        )
        self._hello = hello

    @override
    def answer(self, request: wire.Request) -> wire.Reply:
        try:
            return super().answer(request)
        except PKCS11Error as error:
            return wire.Failed(verdict=Verdict.UNREACHABLE, detail=f"PKCS#11: {_text(error)}")
        finally:
            self._token.close()

    @override
    def begin(self) -> None:
        self._token.load()

    @override
    def create_kek(self, request: wire.CreateKek) -> Kek:
        making = keks.Making(
            methods=request.methods, now_ms=request.now_ms, valid_until_s=request.valid_until_s
        )
        return keks.create_kek(
            self._token, request.reference, making, replace_unfinished=request.replace_unfinished
        )

    @override
    def adopt_kek(self, request: wire.AdoptKek) -> Kek:
        making = keks.Making(
            methods=request.methods,
            now_ms=request.now_ms,
            valid_from_s=request.valid_from_s,
            valid_until_s=request.valid_until_s,
        )
        return keks.adopt_kek(
            self._token, request.reference, making, is_method_pinned=request.is_method_pinned
        )

    @override
    def destroy_kek(self, kek: Kek) -> None:
        keks.destroy_kek(self._token, kek)

    @override
    def set_kek_enabled(self, kek: Kek, *, enabled: bool) -> None:
        keks.set_kek_enabled(self._token, kek, enabled=enabled)

    @override
    def generate(self, request: wire.Generate) -> tuple[WrappedKey, ...]:
        return material.generate(
            self._token, request.kek, request.wanted, now_ms=request.now_ms, budget_s=request.budget_s
        )

    @override
    def rewrap(self, request: wire.Rewrap) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]:
        return material.rewrap(
            self._token,
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
            self._token,
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
            self._token,
            request.kek,
            request.arrivals,
            load_transport_key(Path(request.transport_key_file)),
            now_ms=request.now_ms,
            budget_s=request.budget_s,
        )

    @override
    def seal_envelopes(self, request: wire.SealEnvelopes) -> tuple[wire.SealedEnvelopes, ...]:
        signer = worker_process.signer_of(self._hello)
        return material.seal_envelopes(
            self._token, signer, request.kek, request.requests, budget_s=request.budget_s
        )

    @override
    def diagnose(self, request: wire.Diagnose) -> Diagnosis:
        self._token.look_afresh()
        return diagnosis.diagnose(self._token, request.kek, now_s=request.now_s)

    @override
    def describe(self, request: wire.Describe) -> dict[str, object]:
        token, library = self._token.token(), self._token.library
        facts: dict[str, object] = {
            "module": {
                "path": library.so,
                "manufacturer": library.manufacturer_id,
                "description": library.library_description,
                "library_version": ".".join(map(str, library.library_version)),
                "cryptoki_version": ".".join(map(str, library.cryptoki_version)),
            },
            "token": {
                "label": token.label,
                "serial": token.serial.decode(errors="backslashreplace"),
                "manufacturer": token.manufacturer_id,
                "model": token.model,
            },
        }
        facts["methods"] = keks.try_methods(self._token, request.methods)
        return facts


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()

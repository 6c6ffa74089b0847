"""The HSM worker: a process that owns the PKCS#11 module, so that its crash costs a process, not the agent.

1. Started fresh and never forked, single-threaded: what every module supports (hsm.md 1.1, 1.5).
2. Logged in for the length of one request. One wrong PIN and this process never logs in again.
3. Error texts name classes and states, never data.
"""

import contextlib
from typing import NoReturn

from pkcs11 import PKCS11Error

from envelope.errors import SealgateError
from key_agent.errors import KeySourceError
from key_agent.sources import wire, worker_process
from key_agent.sources.hsm import diagnosis, keks, material
from key_agent.sources.hsm.session import Token
from key_agent.sources.verdict import Verdict


def main() -> NoReturn:
    """`python -I -m key_agent.sources.worker_main PARENT_PID`, started by worker.py only."""
    worker_process.run(_begin)


def _begin(greeting: wire.Greeting) -> "_Worker":
    if not isinstance(greeting, wire.Hello):
        raise wire.ProtocolError("this worker is for HSMs")
    return _Worker(greeting)


class _Worker:
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

    def answer(self, request: wire.Request) -> wire.Reply:
        try:
            return self._answer(request)
        except KeySourceError as error:
            notes = getattr(error, "__notes__", ())
            return wire.Failed(verdict=error.verdict, detail="; ".join([error.detail, *notes]))
        except PKCS11Error as error:
            return wire.Failed(verdict=Verdict.UNREACHABLE, detail=f"PKCS#11: {_text(error)}")
        except SealgateError as error:
            return wire.Failed(verdict=Verdict.UNREACHABLE, detail=type(error).__name__)
        finally:
            self._token.close()

    def _answer(self, request: wire.Request) -> wire.Reply:
        token = self._token
        match request:
            case wire.Hello():
                token.load()
            case wire.CreateKek():
                kek = keks.create_kek(
                    token,
                    request.reference,
                    keks.Making(
                        methods=request.methods, now_ms=request.now_ms, valid_until_s=request.valid_until_s
                    ),
                    replace_unfinished=request.replace_unfinished,
                )
                return wire.KekMade(kek=kek)
            case wire.AdoptKek():
                kek = keks.adopt_kek(
                    token,
                    request.reference,
                    keks.Making(
                        methods=request.methods,
                        now_ms=request.now_ms,
                        valid_from_s=request.valid_from_s,
                        valid_until_s=request.valid_until_s,
                    ),
                    is_method_pinned=request.is_method_pinned,
                )
                return wire.KekMade(kek=kek)
            case wire.DestroyKek():
                keks.destroy_kek(token, request.kek)
            case wire.EnableKek():
                keks.set_kek_enabled(token, request.kek, enabled=request.enabled)
            case wire.Generate():
                keys = material.generate(
                    token, request.kek, request.wanted, now_ms=request.now_ms, budget_s=request.budget_s
                )
                return wire.Generated(keys=keys)
            case wire.Rewrap():
                made, failed = material.rewrap(
                    token,
                    request.old,
                    request.new,
                    request.keys,
                    now_ms=request.now_ms,
                    budget_s=request.budget_s,
                )
                return wire.RewrapDone(keys=made, failed_keys=failed)
            case wire.SealEnvelopes():
                results = material.seal_envelopes(
                    token,
                    worker_process.signer_of(self._hello),
                    request.kek,
                    request.requests,
                    budget_s=request.budget_s,
                )
                return wire.Sealed(results=results)
            case wire.Diagnose():
                token.look_afresh()
                found = diagnosis.diagnose(token, request.kek, now_s=request.now_s)
                return wire.Diagnosed(verdict=found.verdict, detail=found.detail)
            case wire.Describe():
                return wire.Described(facts=self._describe(request))
        return wire.Done()

    def _describe(self, request: wire.Describe) -> dict[str, object]:
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

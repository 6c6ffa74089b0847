"""The worker of a key server: a process of its own, because key material passes through it.

It is to a key server what worker_main.py is to an HSM, and imports no PKCS#11; the client of a server is
loaded only where it is used, so that an agent without PyKMIP can use OpenBao.
"""

import contextlib
from pathlib import Path
from typing import NoReturn

from envelope.errors import SealgateError
from key_agent.errors import KeySourceError
from key_agent.sources import wire, worker_process
from key_agent.sources.servers import work
from key_agent.sources.servers.server import KeyGoneError, KeyServer, ServerUnavailableError, Unsupported
from key_agent.sources.source import KekType
from key_agent.sources.verdict import Verdict
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
        canary_name=work.CANARY_NAME,
        ca_file=Path(greeting.ca_file),
        certificate_file=Path(greeting.certificate_file),
        key_file=Path(greeting.key_file),
        timeout_s=greeting.timeout_s,
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


class _Worker:
    def __init__(self, greeting: wire.OpenBaoHello | wire.KmipHello) -> None:
        self._greeting = greeting
        self._server: KeyServer | None = None

    def answer(self, request: wire.Request) -> wire.Reply:
        try:
            if self._server is None:
                self._server = _connect(self._greeting)
            return self._answer(self._server, request)
        except KeySourceError as error:
            notes = getattr(error, "__notes__", ())
            return wire.Failed(verdict=error.verdict, detail="; ".join([error.detail, *notes]))
        except Unsupported as error:
            return wire.Failed(verdict=Verdict.UNSUPPORTED, detail=str(error))
        except (ServerUnavailableError, KeyGoneError) as error:
            return wire.Failed(verdict=Verdict.UNREACHABLE, detail=str(error))
        except ImportError as error:
            return wire.Failed(
                verdict=Verdict.UNSUPPORTED,
                detail=f"{error.name} is not installed; requirements-agent.lock brings it",
            )
        except SealgateError as error:
            return wire.Failed(verdict=Verdict.UNREACHABLE, detail=type(error).__name__)

    def _answer(self, server: KeyServer, request: wire.Request) -> wire.Reply:
        match request:
            case wire.CreateKek():
                kek = work.create_kek(
                    server,
                    request.reference,
                    KekType.AES_256,
                    request.valid_until_s,
                    replace_unfinished=request.replace_unfinished,
                    now_ms=request.now_ms,
                )
                return wire.KekMade(kek=kek)
            case wire.AdoptKek():
                kek = work.adopt_kek(
                    server,
                    request.reference,
                    KekType.AES_256,
                    request.valid_from_s,
                    request.valid_until_s,
                    now_ms=request.now_ms,
                )
                return wire.KekMade(kek=kek)
            case wire.DestroyKek():
                work.destroy_kek(server, request.kek)
            case wire.EnableKek():
                work.set_kek_enabled(server, request.kek, enabled=request.enabled)
            case wire.Generate():
                keys = work.generate(
                    server, request.kek, request.wanted, now_ms=request.now_ms, budget_s=request.budget_s
                )
                return wire.Generated(keys=keys)
            case wire.Rewrap():
                made, failed = work.rewrap(
                    server,
                    request.old,
                    request.new,
                    request.keys,
                    now_ms=request.now_ms,
                    budget_s=request.budget_s,
                )
                return wire.RewrapDone(keys=made, failed_keys=failed)
            case wire.SealEnvelopes():
                results = work.seal_envelopes(
                    server,
                    worker_process.signer_of(self._greeting),
                    request.kek,
                    request.requests,
                    budget_s=request.budget_s,
                )
                return wire.Sealed(results=results)
            case wire.Diagnose():
                found = work.diagnose(server, request.kek, now_s=request.now_s)
                return wire.Diagnosed(verdict=found.verdict, detail=found.detail)
            case wire.Describe():
                facts = server.describe()
                return wire.Described(facts={"server": facts, "methods": self._methods(server)})
        return wire.Done()

    def _methods(self, server: KeyServer) -> dict[str, str]:
        return {str(server.method): work.try_method(server)}


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()

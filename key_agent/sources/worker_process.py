"""What every worker process is, whatever it talks to; its owner is worker.py.

1. Frames come in on a copy of stdin and go out on a copy of stdout; libraries get /dev/null to read and
   stderr to print on, so that a vendor's printf cannot corrupt a frame.
2. No core dump, no /proc/<pid>/mem for others, dead as soon as the agent is. Signals of the terminal or the
   service manager are the agent's business: it closes our input.
3. The signing key is read anew for every batch: a renewed certificate is used without a restart.
"""

import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NoReturn

from envelope.errors import SealgateError
from envelope.keys import KeyId
from key_agent.errors import KeySourceError
from key_agent.sources import wire
from key_agent.sources.envelopes import Signer
from key_agent.sources.source import Kek, Parcel, WrappedKey
from key_agent.sources.verdict import Diagnosis, Verdict
from runtime.lifecycle import end_with_parent, harden_process


class Answerer(ABC):
    """Answers every request of its worker's life, the greeting first. Errors are KeySourceError."""

    def answer(self, request: wire.Request) -> wire.Reply:
        """Never raises but by a bug: failures are replies."""
        try:
            return self._dispatch(request)
        except KeySourceError as error:
            notes = getattr(error, "__notes__", ())
            return wire.Failed(verdict=error.verdict, detail="; ".join([error.detail, *notes]))
        except SealgateError as error:
            return wire.Failed(verdict=Verdict.UNREACHABLE, detail=type(error).__name__)

    def _dispatch(self, request: wire.Request) -> wire.Reply:
        match request:
            case wire.Hello() | wire.OpenBaoHello() | wire.KmipHello():
                self.begin()
            case wire.CreateKek():
                return wire.KekMade(kek=self.create_kek(request))
            case wire.AdoptKek():
                return wire.KekMade(kek=self.adopt_kek(request))
            case wire.DestroyKek():
                self.destroy_kek(request.kek)
            case wire.EnableKek():
                self.set_kek_enabled(request.kek, enabled=request.enabled)
            case wire.Generate():
                return wire.Generated(keys=self.generate(request))
            case wire.Rewrap():
                made, failed = self.rewrap(request)
                return wire.RewrapDone(keys=made, failed_keys=failed)
            case wire.ExportKeys():
                parcels, failed = self.export_keys(request)
                return wire.ExportDone(parcels=parcels, failed_keys=failed)
            case wire.ImportKeys():
                made, failed = self.import_keys(request)
                return wire.RewrapDone(keys=made, failed_keys=failed)
            case wire.SealEnvelopes():
                return wire.Sealed(results=self.seal_envelopes(request))
            case wire.Diagnose():
                found = self.diagnose(request)
                return wire.Diagnosed(
                    verdict=found.verdict, detail=found.detail, retry_after_s=found.retry_after_s
                )
            case wire.Describe():
                return wire.Described(facts=self.describe(request))
        return wire.Done()

    # As the methods of `KeySource`.

    @abstractmethod
    def begin(self) -> None: ...

    @abstractmethod
    def create_kek(self, request: wire.CreateKek) -> Kek: ...

    @abstractmethod
    def adopt_kek(self, request: wire.AdoptKek) -> Kek: ...

    @abstractmethod
    def destroy_kek(self, kek: Kek) -> None: ...

    @abstractmethod
    def set_kek_enabled(self, kek: Kek, *, enabled: bool) -> None: ...

    @abstractmethod
    def generate(self, request: wire.Generate) -> tuple[WrappedKey, ...]: ...

    @abstractmethod
    def rewrap(
        self, request: wire.Rewrap
    ) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]: ...

    @abstractmethod
    def export_keys(
        self, request: wire.ExportKeys
    ) -> tuple[tuple[Parcel, ...], tuple[tuple[KeyId, str], ...]]: ...

    @abstractmethod
    def import_keys(
        self, request: wire.ImportKeys
    ) -> tuple[tuple[WrappedKey, ...], tuple[tuple[KeyId, str], ...]]: ...

    @abstractmethod
    def seal_envelopes(self, request: wire.SealEnvelopes) -> tuple[wire.SealedEnvelopes, ...]: ...

    @abstractmethod
    def diagnose(self, request: wire.Diagnose) -> Diagnosis: ...

    @abstractmethod
    def describe(self, request: wire.Describe) -> dict[str, object]: ...


def run(begin: Callable[[wire.Greeting], Answerer]) -> NoReturn:
    """Serve until the input ends. The parent's pid is the only argument of the command."""
    end_with_parent(int(sys.argv[1]))
    for warning in harden_process():
        print(f"worker: {warning}", file=sys.stderr)  # noqa: T201 - stderr is its log
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = _take_over_standard_streams()
    status = 0
    try:
        _serve(requests, replies, begin)
    except (wire.ProtocolError, OSError) as error:
        print(f"worker: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        status = 1
    # Vendors' destructors are not to be trusted, and python-pkcs11's print tracebacks.
    sys.stderr.flush()
    os._exit(status)


def signer_of(greeting: wire.Greeting) -> Signer:
    """KeySourceError if no signing key is configured, or none can be read."""
    key_file, certificate_file = greeting.signing_key_file, greeting.signing_certificate_file
    if key_file is None or certificate_file is None:
        raise KeySourceError("no signing key is configured")
    return Signer.load(greeting.agent_id, Path(key_file), Path(certificate_file))


def _take_over_standard_streams() -> tuple[BinaryIO, BinaryIO]:
    requests, replies = os.dup(0), os.dup(1)  # not inheritable, unlike 0 and 1
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(requests, "rb"), os.fdopen(replies, "wb")


def _serve(requests: BinaryIO, replies: BinaryIO, begin: Callable[[wire.Greeting], Answerer]) -> None:
    answerer: Answerer | None = None
    while (request := wire.read_request(requests)) is not None:
        if isinstance(request.message, wire.Hello | wire.OpenBaoHello | wire.KmipHello):
            answerer = begin(request.message)
        elif answerer is None:
            raise wire.ProtocolError("the first frame is not a hello")
        replies.write(wire.encode(request.number, answerer.answer(request.message)))
        replies.flush()

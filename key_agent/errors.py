"""Every error the key agent raises, by what the caller does next.

* SealgateError
  + KeyAgentError
    - KeySourceError         no answer to be trusted: push nothing, retry with back-off; `verdict` says why
      . KekRevokedError      proven by a diagnosis: withdraw every key under that KEK
      . LoginRefusedError    the PIN is wrong or locked: no further login until the PIN file changes
      . UnsupportedError     the HSM cannot do what was asked, and never will: refuse to start or to seal
"""

from envelope.errors import SealgateError
from key_agent.sources.verdict import Diagnosis, Verdict


class KeyAgentError(SealgateError):
    """Root of the key agent's errors."""


class KeySourceError(KeyAgentError):
    """The key source gave no answer that could be trusted. Push nothing and try again later."""

    def __init__(self, detail: str, *, verdict: Verdict = Verdict.UNREACHABLE) -> None:
        super().__init__(detail)
        self.detail = detail
        self.verdict = verdict

    @property
    def diagnosis(self) -> Diagnosis:
        return Diagnosis(self.verdict, self.detail)


class KekRevokedError(KeySourceError):
    """Proven: the KEK is revoked, or its token exchanged (`verdict.withdraws`). Withdraw its keys."""

    def __init__(self, diagnosis: Diagnosis) -> None:
        super().__init__(diagnosis.detail, verdict=diagnosis.verdict)


class LoginRefusedError(KeySourceError):
    """The token refused the PIN. One attempt reaches it; then nobody tries until the PIN file changes."""


class UnsupportedError(KeySourceError):
    """The HSM cannot do what was asked (no acceptable wrap method, attribute not changeable ...)."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, verdict=Verdict.UNSUPPORTED)


def error_of(diagnosis: Diagnosis) -> KeySourceError:
    """The error that stands for a diagnosis other than `ok`."""
    if diagnosis.verdict.withdraws:
        return KekRevokedError(diagnosis)
    if diagnosis.verdict.is_login_refusal:
        return LoginRefusedError(diagnosis.detail, verdict=diagnosis.verdict)
    if diagnosis.verdict is Verdict.UNSUPPORTED:
        return UnsupportedError(diagnosis.detail)
    return KeySourceError(diagnosis.detail, verdict=diagnosis.verdict)

"""What an administrator is told of an error: its cause, what to do next, and the exit code.

1. The same whether the running agent has refused (api/server.py) or the command itself.
2. `REFUSED`: another try ends the same way. `UNAVAILABLE`: something has to be mended or waited for, then the
   same command is worth repeating.
"""

from typing import Final

from key_agent.environments.peers.peer_transport import PeerError
from key_agent.environments.shared.approvals import ApprovalError
from key_agent.environments.shared.shared_errors import EpochGapError, RegistryTamperedError, StaleTermError
from key_agent.errors import KeySourceError
from key_agent.operations.backup import BackupError
from key_agent.registry.access import RefusedChangeError
from key_agent.registry.database import RegistryError, RegistryInUseError
from key_agent.sources.verdict import NEXT_STEPS, Verdict
from key_agent.state_dir import StateLockedError
from runtime.cli import CommandError, ExitCode, explain

PROGRAM: Final = "key-agent"


def explain_agent(error: Exception) -> CommandError:
    """What to tell an administrator about *error*."""
    match error:
        case RefusedChangeError():
            return CommandError(str(error), error.next_step, ExitCode.REFUSED, code="refused")
        case KeySourceError():
            withdrawn = error.verdict.withdraws
            next_step = "`key-agent doctor` looks closer"
            if withdrawn:
                next_step = "`key-agent reinstate` after a revocation"
            elif error.verdict in (Verdict.DENIED, Verdict.THROTTLED):
                next_step = NEXT_STEPS[error.verdict]
            elif error.verdict is Verdict.AUTH_PIN:
                next_step = "write the right PIN into that file: until it changes no login is tried again"
            return CommandError(
                f"HSM: {error.verdict}: {error.detail}",
                next_step,
                ExitCode.REFUSED if withdrawn else ExitCode.UNAVAILABLE,
                code=str(error.verdict).replace("_", "-"),
            )
        case BackupError():
            return CommandError(
                str(error),
                "give a file that `key-agent backup export` wrote",
                ExitCode.REFUSED,
                code="backup",
            )
        case ApprovalError():
            return CommandError(str(error), error.next_step, ExitCode.REFUSED, code=f"approval-{error.code}")
        case PeerError():
            return CommandError(
                f"another environment: {error}",
                "`key-agent env list` shows which of them answer",
                ExitCode.UNAVAILABLE if error.is_silence else ExitCode.REFUSED,
                code=f"peer-{error.code.replace('_', '-')}",
            )
        case StaleTermError() | EpochGapError():
            return CommandError(str(error), error.next_step, ExitCode.REFUSED, code="stale-term")
        case RegistryTamperedError():
            return CommandError(str(error), error.next_step, ExitCode.UNAVAILABLE, code="registry-tampered")
        case StateLockedError():
            return CommandError(str(error), error.next_step, ExitCode.UNAVAILABLE, code="locked")
        case RegistryInUseError():
            return CommandError(str(error), error.next_step, ExitCode.UNAVAILABLE, code="registry-in-use")
        case RegistryError():
            return CommandError(
                str(error), "mend the database, then try again", ExitCode.UNAVAILABLE, code="registry"
            )
        case _:
            return explain(error, program=PROGRAM)

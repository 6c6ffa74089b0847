"""What an administrator is told of an error."""

from key_agent.explaining import explain_agent
from key_agent.registry.database import RegistryError
from runtime.cli import ExitCode


def test_a_registry_error_is_worth_trying_again() -> None:
    assert explain_agent(RegistryError("locked")).exit_code is ExitCode.UNAVAILABLE

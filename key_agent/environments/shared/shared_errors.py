"""Why shared rows are not taken over, or not served.

* StaleTermError         written under a term that another manager has followed
* EpochGapError          nothing is wrong, but something is missing in between
* RegistryTamperedError  what is stored is not what was written: nothing of it is served
"""

from key_agent.errors import KeyAgentError


class StaleTermError(KeyAgentError):
    """It was written under a term that another manager has followed."""

    next_step = "ask the newest manager: `key-agent env list` names it"


class EpochGapError(KeyAgentError):
    """A delta that does not begin where this registry ends, or does not lead to what it says."""

    def __init__(self, own_epoch: int) -> None:
        super().__init__(f"the shared registry is at epoch {own_epoch}")
        self.own_epoch = own_epoch

    next_step = "send what is missing, or everything"


class RegistryTamperedError(KeyAgentError):
    """The shared registry is not what was written: edited, rolled back, or incomplete."""

    next_step = (
        "find out who has written to the database; the agent takes the rows of another environment as soon "
        "as it reaches one"
    )

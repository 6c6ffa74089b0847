"""What the directory refuses, and when it cannot be used.

* SealgateError
  + ChangeRefusedError           the change would break a rule
    - NotThereError              ... it is of what does not exist
  + DirectoryUnavailableError    the database cannot be read or written
    - NoDirectoryError           ... there is none yet
"""

from envelope.errors import SealgateError


class ChangeRefusedError(SealgateError):
    """The change would break a rule of the directory; nothing was changed."""

    code = "refused"

    def __init__(self, cause: str, next_step: str) -> None:
        super().__init__(cause)
        self.next_step = next_step


class NotThereError(ChangeRefusedError):
    """The tenant or network service does not exist."""

    code = "not-there"


class DirectoryUnavailableError(SealgateError):
    """The database cannot be read or written."""

    def __init__(
        self,
        cause: str,
        next_step: str = (
            "check proxy.database_url, the disk and the database server; `sealgate doctor` says more"
        ),
    ) -> None:
        super().__init__(f"directory database: {cause}")
        self.next_step = next_step


class NoDirectoryError(DirectoryUnavailableError):
    """There is no database yet, or an empty one: nothing has been provisioned."""

    def __init__(self, place: str) -> None:
        super().__init__(f"{place} does not exist", "the first `sealgate tenant add` makes it")

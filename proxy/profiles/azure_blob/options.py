"""What an azure-blob service may be told beyond what every profile knows (`service add --option`)."""

from enum import StrEnum

from proxy.plans.profile_options import ProfileOptions


class UnknownKeys(StrEnum):
    """What becomes of requests that are signed with the key of an account that is not in the vault."""

    UNCHANGED = "unchanged"  # they go on as they were signed, or not at all; the service judges them
    REFUSE = "refuse"


class Anonymous(StrEnum):
    """What becomes of requests without a signature or a token."""

    ALLOW = "allow"  # the service judges them
    REFUSE = "refuse"


class AzureBlobOptions(ProfileOptions, frozen=True, kw_only=True):
    account_in_path: bool = False
    """The first segment of a path is the account, not the host's first label: Azurite, other emulators."""
    unknown_keys: UnknownKeys = UnknownKeys.UNCHANGED
    anonymous: Anonymous = Anonymous.ALLOW
    directories: bool = False
    """Empty blobs that the service calls directories pass (accounts with a hierarchy of names). The service
    can then show a reader an empty directory in the place of a blob."""

"""What the operations of one kind of cloud service mean: a table from profile name to profile.

A profile is named in the directory (`service add --profile`); an unknown name is refused there, and here too.
"""

from collections.abc import Mapping
from typing import Final

from proxy.profiles.azure_blob.profile import AzureBlobProfile
from proxy.profiles.gcs.profile import GcsProfile
from proxy.profiles.generic import GenericProfile
from proxy.profiles.profile import Profile
from proxy.profiles.s3.profile import S3Profile
from proxy.profiles.web.profile import WebProfile
from proxy.profiles.webdav.profile import WebDavProfile

__all__ = ["PROFILES", "Profile", "UnknownProfileError", "profile_named"]

PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        AzureBlobProfile(),
        GcsProfile(),
        GenericProfile(),
        S3Profile(),
        WebDavProfile(),
        WebProfile(),
    )
}


class UnknownProfileError(LookupError):
    """No profile has this name."""


def profile_named(name: str) -> Profile:
    """UnknownProfileError, naming those there are."""
    try:
        return PROFILES[name]
    except KeyError:
        raise UnknownProfileError(f"no profile {name!r}; there are: {', '.join(sorted(PROFILES))}") from None

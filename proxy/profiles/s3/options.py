"""What an s3 service may be told beyond what every profile knows (`sealgate service add --option`)."""

from enum import StrEnum
from typing import Annotated, override

import msgspec

from proxy.plans.profile_options import ProfileOptions
from proxy.plans.request import Request


class UnknownKeys(StrEnum):
    """What becomes of requests whose access key is not in the vault."""

    UNCHANGED = "unchanged"  # they go on as they were signed, or not at all; the service judges them
    REFUSE = "refuse"


class Anonymous(StrEnum):
    """What becomes of requests without a signature."""

    ALLOW = "allow"  # the service judges them
    REFUSE = "refuse"


class MetadataDigests(StrEnum):
    """What becomes of `x-amz-meta-*` that by their name are digests: rclone's `md5chksum`, say."""

    STRIP = "strip"
    KEEP = "keep"


class S3Options(ProfileOptions, frozen=True, kw_only=True):
    virtual_hosts: bool = True
    """Forward mode: hosts `<bucket>.<upstream host>` belong to the service, too."""
    hosts: tuple[Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9.-]{1,253}$")], ...] = ()
    """Reverse mode: names of this proxy, besides `reverse_names`. A bucket may stand before each."""
    unknown_keys: UnknownKeys = UnknownKeys.UNCHANGED
    anonymous: Anonymous = Anonymous.ALLOW
    region: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """To sign for; none: the client's."""
    metadata_digests: MetadataDigests = MetadataDigests.STRIP
    folder_markers: bool = True
    """Names that end in a slash: 0 bytes that are not sealed are read as an empty object."""
    trailing_checksums: bool = False
    """Send a checksum of the ciphertext behind every PutObject: for buckets whose settings lock objects."""
    min_part_bytes: Annotated[int, msgspec.Meta(ge=1, le=5 << 30)] = 5 << 20
    """What the service wants of every part but the last."""
    max_parts: Annotated[int, msgspec.Meta(ge=2, le=10_000)] = 10_000

    @property
    @override
    def has_subdomains(self) -> bool:
        return self.virtual_hosts

    @property
    @override
    def reverse_hosts(self) -> tuple[str, ...]:
        return self.hosts


def options_of(request: Request) -> S3Options:
    """Of the service that *request* goes to."""
    options = request.options
    return options if isinstance(options, S3Options) else S3Options()

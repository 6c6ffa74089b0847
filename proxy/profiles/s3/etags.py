"""ETags that clients may take for the MD5 of what they sent, told apart from those they may not.

1. S3's ETag of an object that was put at once is 32 hexadecimal digits, the MD5 of what is stored: of
   ciphertext here. Clients compare it with the MD5 of what they sent. With `-N` behind the digits, S3's sign
   of an object in parts, none does. So `hex` is shown as `hex-1`.
2. The map is reversible: `hex-1` of the service is `hex-01` for the client, `hex-01` is `hex-001`. Any other
   tag is itself. A tag of a client's that is no image of the map stays as it is, for the service to judge.
3. The same for what is sealed and for what was there before: a tag alone does not tell which it is.
"""

import re
from typing import Final

_TAG: Final = re.compile(r"(?<![0-9A-Za-z])([0-9a-fA-F]{32})(-[0-9]{1,6})?(?![0-9A-Za-z-])")
_PARTS: Final = re.compile(r'"?[0-9a-fA-F]{32}-[0-9]{1,6}"?')


def to_client(text: str) -> str:
    """Every tag in *text* (a tag, quoted or not, or a list of them), as the client is shown it."""
    return _TAG.sub(_shown, text)


def to_service(text: str) -> str:
    """The inverse of `to_client`."""
    return _TAG.sub(_stored, text)


def is_of_parts(etag: str) -> bool:
    """Whether the service's tag *etag* says that the object was put together from parts."""
    return _PARTS.fullmatch(etag) is not None


def _shown(match: re.Match[str]) -> str:
    digits, suffix = match[1], match[2]
    if suffix is None:
        return f"{digits}-1"
    return f"{digits}-0{suffix[1:]}" if _is_one(suffix) else match[0]


def _stored(match: re.Match[str]) -> str:
    digits, suffix = match[1], match[2]
    if suffix is None or not _is_one(suffix):
        return match[0]
    return digits if suffix == "-1" else f"{digits}-{suffix[2:]}"


def _is_one(suffix: str) -> bool:
    return suffix[1:].lstrip("0") == "1"

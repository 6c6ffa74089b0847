"""The wrap methods by name."""

from collections.abc import Callable, Mapping
from typing import Final

from key_agent.errors import UnsupportedError
from key_agent.sources.hsm.gcm import GcmAppendedWrapping, GcmInPlaceWrapping, GcmWrapping
from key_agent.sources.hsm.hybrid_wrapping import EcdhWrapping, RsaWrapping
from key_agent.sources.hsm.key_wrapping import CbcHmacWrapping, KeyWrapping
from key_agent.sources.hsm.wrapping import Wrapping
from key_agent.sources.source import WrapMethod

WRAPPINGS: Final[Mapping[WrapMethod, Callable[[Mapping[str, int]], Wrapping]]] = {
    WrapMethod.GCM: GcmWrapping,
    WrapMethod.GCM_IN_PLACE: GcmInPlaceWrapping,
    WrapMethod.GCM_APPENDED: GcmAppendedWrapping,
    WrapMethod.KW: KeyWrapping,
    WrapMethod.CBC_HMAC: CbcHmacWrapping,
    WrapMethod.RSA_OAEP_256: lambda mechanisms: RsaWrapping(WrapMethod.RSA_OAEP_256, mechanisms),
    WrapMethod.RSA_OAEP_1: lambda mechanisms: RsaWrapping(WrapMethod.RSA_OAEP_1, mechanisms),
    WrapMethod.ECDH_ES: EcdhWrapping,
}


def wrapping_of(method: WrapMethod, mechanisms: Mapping[str, int]) -> Wrapping:
    """*mechanisms*: numbers of vendors' own mechanisms, by the standard name that they stand for."""
    try:
        return WRAPPINGS[method](mechanisms)
    except KeyError:
        raise UnsupportedError(f"wrap method {method} is not a method of PKCS#11") from None

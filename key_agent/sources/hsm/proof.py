"""The proof that a token does a wrap method correctly with this very KEK.

1. Listing mechanisms proves nothing. The KEK has to show the round trip, and refuse a wrong binding, every
   kind of tampering and a cut, each on a session of its own: one with a failed operation is not trusted.
2. Templates may be changed silently: attributes are looked at in the token, not in what was asked for.
3. No key both decrypts and unwraps, signs or derives beside: what one operation hides another would tell.
"""

from typing import Any, Final

from pkcs11 import Attribute, KeyType, MechanismFlag, PKCS11Error

from envelope.keys import KEY_MATERIAL_SIZE
from key_agent.errors import UnsupportedError
from key_agent.sources.hsm.key_objects import KekName, find_kek
from key_agent.sources.hsm.session import Token, attribute
from key_agent.sources.hsm.wrapping import KekObjects, Wrapping, WrongBindingError, random_bytes

P256_PARAMETERS: Final = bytes.fromhex("06082a8648ce3d030107")
"""CKA_EC_PARAMS: the curve's object identifier in DER."""
_PROTECTION: Final = {
    Attribute.TOKEN: True,
    Attribute.PRIVATE: True,
    Attribute.SENSITIVE: True,
    Attribute.EXTRACTABLE: False,
}
# Not every token has these; one that has them must not deny them. (CKA_LOCAL is not among them: NSS says
# false of keys that it has just generated.)
_WELCOME: Final = {Attribute.ALWAYS_SENSITIVE: True, Attribute.NEVER_EXTRACTABLE: True}
_FLAGS: Final = {
    Attribute.ENCRYPT: MechanismFlag.ENCRYPT,
    Attribute.DECRYPT: MechanismFlag.DECRYPT,
    Attribute.WRAP: MechanismFlag.WRAP,
    Attribute.UNWRAP: MechanismFlag.UNWRAP,
    Attribute.SIGN: MechanismFlag.SIGN,
    Attribute.DERIVE: MechanismFlag.DERIVE,
}
_BINDING: Final = b"sealgate proof"
_OTHER_BINDING: Final = b"sealgate prooF"


def check_attributes(kek: KekObjects, wrapping: Wrapping) -> None:
    """UnsupportedError if the token has weakened the KEK or its HMAC key, or somebody made them too weak."""
    wrong = _weaknesses(kek.key, wrapping.capabilities)
    wrong += _kind(kek.key, wrapping)
    if kek.mac is not None:
        wrong += [f"{name} of its HMAC key" for name in _weaknesses(kek.mac, MechanismFlag.SIGN)]
    if wrong:
        raise UnsupportedError(f"the token weakened the KEK: {', '.join(wrong)} not as demanded")


def _weaknesses(key: Any, capabilities: MechanismFlag) -> list[str]:
    wrong = [name.name for name, value in _PROTECTION.items() if attribute(key, name) is not value]
    wrong += [name.name for name, value in _WELCOME.items() if attribute(key, name) not in (None, value)]
    for name, flag in _FLAGS.items():
        value = attribute(key, name)
        # An attribute that the class of key does not have permits nothing.
        if bool(value) is not bool(flag & capabilities):
            wrong.append(name.name)
    return wrong


def _kind(key: Any, wrapping: Wrapping) -> list[str]:
    if attribute(key, Attribute.KEY_TYPE) != wrapping.key_type:
        return ["KEY_TYPE"]
    match wrapping.key_type:
        case KeyType.AES:
            return [] if attribute(key, Attribute.VALUE_LEN) == 32 else ["VALUE_LEN"]
        case KeyType.RSA:
            modulus = attribute(key, Attribute.MODULUS) or b""
            return [] if int.from_bytes(modulus).bit_length() == 3072 else ["MODULUS"]
        case _:
            return [] if attribute(key, Attribute.EC_PARAMS) == P256_PARAMETERS else ["EC_PARAMS"]


def prove(token: Token, name: KekName, wrapping: Wrapping) -> None:
    """Have the KEK of that name show that *wrapping* works. UnsupportedError, PKCS11Error: it does not."""
    session, kek = _fresh(token, name, wrapping)
    material = random_bytes(session, KEY_MATERIAL_SIZE)
    sealed = wrapping.seal(session, kek, material, _BINDING)
    iv = wrapping.iv_of(sealed)
    if iv is not None and iv == bytes(len(iv)):
        raise UnsupportedError("the IV is zero")
    again = wrapping.seal(session, kek, material, _BINDING)
    if len(sealed) not in wrapping.sealed_sizes(len(material)):
        raise UnsupportedError(f"{len(sealed)} bytes sealed, not {wrapping.sealed_sizes(len(material))}")
    if iv is not None and iv == wrapping.iv_of(again):
        raise UnsupportedError("two seals are equal: the IV repeats")
    if material in sealed:
        raise UnsupportedError("the sealed bytes hold the plaintext")
    if wrapping.open(session, kek, sealed, _BINDING) != material:
        raise UnsupportedError("opened bytes differ from the sealed ones")
    tampered = {
        "a wrong binding": (sealed, _OTHER_BINDING),
        "a flipped first bit": (_flip(sealed, 0), _BINDING),
        "a flipped middle bit": (_flip(sealed, len(sealed) // 2), _BINDING),
        "a flipped last bit": (_flip(sealed, len(sealed) - 1), _BINDING),
        "a cut": (sealed[:-8], _BINDING),
    }
    for what, (bad, its_binding) in tampered.items():
        session, kek = _fresh(token, name, wrapping)
        try:
            wrapping.open(session, kek, bad, its_binding)
        except (PKCS11Error, WrongBindingError):
            continue
        raise UnsupportedError(f"the token accepts {what}")
    session, kek = _fresh(token, name, wrapping)
    if wrapping.open(session, kek, sealed, _BINDING) != material:
        raise UnsupportedError("the KEK stopped working during its proof")


def _fresh(token: Token, name: KekName, wrapping: Wrapping) -> tuple[Any, KekObjects]:
    session = token.renew(serial=name.serial)
    return session, find_kek(session, name, wrapping)


def _flip(data: bytes, index: int) -> bytes:
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]

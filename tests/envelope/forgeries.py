"""What AES-GCM accepts under two keys: why no key is ever tried by its tag (docs/format.md 6.4)."""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def _multiply(one: int, other: int) -> int:
    """In GF(2^128) as GCM writes it: bit 0 is the most significant (NIST SP 800-38D, 6.3)."""
    product, term = 0, other
    for bit in range(127, -1, -1):
        if one >> bit & 1:
            product ^= term
        term = (term >> 1) ^ (0xE1 << 120 if term & 1 else 0)
    return product


def _inverse(value: int) -> int:
    result, power = 1 << 127, value
    for bit in range(128):
        if (2**128 - 2) >> bit & 1:
            result = _multiply(result, power)
        power = _multiply(power, power)
    return result


def _block(key: bytes, block: bytes) -> int:
    # ECB on one block is AES itself, which GCM is made of.
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    return int.from_bytes(encryptor.update(block) + encryptor.finalize())


def two_key_record(keys: list[tuple[bytes, bytes]]) -> tuple[bytes, list[bytes]]:
    """Two ciphertext blocks and a tag that AES-GCM accepts under both (key, nonce) pairs; both plaintexts."""
    (h1, s1), (h2, s2) = ((_block(key, bytes(16)), _block(key, nonce + b"\0\0\0\1")) for key, nonce in keys)
    lengths, first = 256, int.from_bytes(b"any first block ")
    squares = [_multiply(h, h) for h in (h1, h2)]
    cubes = [_multiply(square, h) for square, h in zip(squares, (h1, h2), strict=True)]
    rest = _multiply(first, cubes[0] ^ cubes[1]) ^ _multiply(lengths, h1 ^ h2) ^ s1 ^ s2
    second = _multiply(rest, _inverse(squares[0] ^ squares[1]))
    tag = _multiply(first, cubes[0]) ^ _multiply(second, squares[0]) ^ _multiply(lengths, h1) ^ s1
    record = b"".join(value.to_bytes(16) for value in (first, second, tag))
    return record, [AESGCM(key).decrypt(nonce, record, None) for key, nonce in keys]

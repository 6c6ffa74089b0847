"""The checksums that clients of object stores send beside a body: CRC-32, CRC-32C, CRC-64/NVME and hashes.

1. They find faults, not attackers: what was sent is compared with what was said before the last byte goes on.
2. `zlib` has CRC-32. The two others are computed by folding: the message is a polynomial over GF(2), and its
   head times x^n may be replaced by its head times (x^n mod P), which is as short as P. One fold is a handful
   of `bytes.translate` and exclusive-ors of whole blocks, so the work per byte is done in C (measured: 97
   and 65 MB/s; a loop over a table makes 8).
3. Values are big-endian, as they are sent in base64.
4. A CRC of two pieces is made of theirs: that of the first times x^(8 * length of the second) mod P, and that
   of the second (zlib's `crc32_combine`; that the register begins with ones and is inverted cancels out).
"""

import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping
from typing import Final, Protocol

_WHOLE: Final = 512  # shorter pieces are looped over
_STEPS: Final = 12


class Checksum(Protocol):
    """What `hashlib` objects have, too."""

    def update(self, data: bytes, /) -> None: ...

    def digest(self) -> bytes: ...


class Crc32:
    """CRC-32 (ISO-HDLC), 4 bytes."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4)


class _ReflectedCrc:
    """A CRC whose register shifts right, begins with all ones and is inverted at the end."""

    def __init__(self, polynomial: int, size: int, before: bytes | None = None) -> None:
        """*polynomial*: bit-reversed, without its highest term. *size*: bytes of the value. *before*: the
        value of what stands before what will come."""
        self._polynomial = polynomial
        self._size = size
        self._ones = (1 << 8 * size) - 1
        self._value = self._ones if before is None else int.from_bytes(before) ^ self._ones

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        view = memoryview(data)
        largest = _lengths(self._size)[-1]
        for at in range(0, len(view), largest):
            self._update(bytes(view[at : at + largest]))

    def digest(self) -> bytes:
        return (self._value ^ self._ones).to_bytes(self._size)

    def _update(self, data: bytes) -> None:
        size, value = self._size, self._value
        if len(data) >= _WHOLE:
            number = int.from_bytes(data, "little") ^ value  # the register goes into the first bytes
            value, length = 0, len(data)
            for kept in reversed(_lengths(size)):
                if length <= kept:
                    continue
                # The head is what stands before the last `kept` bytes; bytes in order are bits rising.
                head = length - kept
                octets = (number & ((1 << 8 * head) - 1)).to_bytes(head, "little")
                product = 0
                for place, table in enumerate(_tables(self._polynomial, size, kept)):
                    product ^= int.from_bytes(octets.translate(table), "little") << 8 * place
                number = (number >> 8 * head) ^ (product << 8 * (kept - head - size))
                length = kept
            data = number.to_bytes(length, "little")
        table8 = _table(self._polynomial)
        for byte in data:
            value = (value >> 8) ^ table8[(value ^ byte) & 0xFF]
        self._value = value


class Crc32C(_ReflectedCrc):
    """CRC-32C (Castagnoli, RFC 3720 12.1), 4 bytes. *before*: its value of what stands before the rest."""

    def __init__(self, before: bytes | None = None) -> None:
        super().__init__(0x82F63B78, 4, before)


class Crc64Nvme(_ReflectedCrc):
    """CRC-64/NVME (NVM Express NVM command set 5.2.1.3.4), 8 bytes."""

    def __init__(self) -> None:
        super().__init__(0x9A6C9329AC4BC9B5, 8)


COMBINED: Final[Mapping[str, tuple[int, int]]] = {
    "crc32": (0xEDB88320, 4),
    "crc32c": (0x82F63B78, 4),
    "crc64nvme": (0x9A6C9329AC4BC9B5, 8),
}
"""Of the CRCs: the polynomial, bit-reversed and without its highest term, and the bytes of the value."""


class CombinedCrc:
    """The CRC of pieces one behind the other, of each of which the CRC and the length are known (rule 4)."""

    def __init__(self, algorithm: str) -> None:
        """KeyError for a name that is not in COMBINED."""
        self._polynomial, self._size = COMBINED[algorithm]
        self._value = 0

    def add(self, value: bytes, length_bytes: int) -> None:
        """The next piece. ValueError for what is no CRC of one."""
        if length_bytes < 0 or len(value) != self._size:
            raise ValueError("no checksum of a piece")
        power = _power(self._polynomial, self._size, length_bytes)
        self._value = _product(self._polynomial, self._size, self._value, power) ^ int.from_bytes(value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._size)


def _product(polynomial: int, size: int, left: int, right: int) -> int:
    """Reflected: the highest bit is x^0, a step of multiplication by x is a shift to the right."""
    product, bit = 0, 1 << (8 * size - 1)
    while left:
        if left & bit:
            product ^= right
            left ^= bit
        bit >>= 1
        right = (right >> 1) ^ (polynomial if right & 1 else 0)
    return product


@functools.lru_cache(maxsize=1024)
def _power(polynomial: int, size: int, length_bytes: int) -> int:
    """x^(8 * length) mod P."""
    power = 1 << (8 * size - 1)  # x^0
    for place in range(length_bytes.bit_length()):
        if length_bytes >> place & 1:
            power = _product(polynomial, size, power, _square(polynomial, size, place))
    return power


@functools.cache
def _square(polynomial: int, size: int, place: int) -> int:
    """x^(8 * 2^place) mod P."""
    if not place:
        return 1 << (8 * size - 1 - 8)  # x^8
    half = _square(polynomial, size, place - 1)
    return _product(polynomial, size, half, half)


def _hash(name: str) -> Callable[[], Checksum]:
    return functools.partial(hashlib.new, name, usedforsecurity=False)


CHECKSUMS: Final[Mapping[str, tuple[Callable[[], Checksum], int]]] = {
    "crc32": (Crc32, 4),
    "crc32c": (Crc32C, 4),
    "crc64nvme": (Crc64Nvme, 8),
    "md5": (_hash("md5"), 16),
    "sha1": (_hash("sha1"), 20),
    "sha256": (_hash("sha256"), 32),
    "sha512": (_hash("sha512"), 64),
}
"""By name: how to begin one, and the bytes of its value."""


def new_checksum(algorithm: str) -> Checksum:
    """One that has seen nothing yet. KeyError for a name that is not in CHECKSUMS."""
    return CHECKSUMS[algorithm][0]()


@functools.cache
def _table(polynomial: int) -> tuple[int, ...]:
    """What the register becomes when a byte is shifted out of it."""

    def shifted(value: int) -> int:
        for _ in range(8):
            value = (value >> 1) ^ (polynomial if value & 1 else 0)
        return value

    return tuple(shifted(byte) for byte in range(256))


@functools.cache
def _lengths(size: int) -> tuple[int, ...]:
    """Lengths in bytes to fold to, rising: what is up to twice as long, less *size*, folds in one step."""
    lengths = [4 * size]
    while len(lengths) < _STEPS:
        lengths.append(2 * lengths[-1] - size)
    return tuple(lengths)


@functools.cache
def _tables(polynomial: int, size: int, kept: int) -> tuple[bytes, ...]:
    """Byte times (x^(8*kept) mod P), as one table for each byte of the product, in order."""
    # Reflected: the highest power is bit 0, so a step of multiplication by x is a shift to the right.
    factor = 1 << (8 * size - 1)  # x^0
    for _ in range(8 * kept):
        factor = (factor >> 1) ^ (polynomial if factor & 1 else 0)
    # In a byte, bit 0 is x^7. The product has 8 * (size + 1) bits, its bit 0 the highest power.
    products = [0] * 256
    for bit in range(8):
        products[1 << bit] = factor << (bit + 1)
    for byte in range(1, 256):
        lowest = byte & -byte
        products[byte] = products[lowest] ^ products[byte ^ lowest] if byte != lowest else products[byte]
    columns = [product.to_bytes(size + 2, "little") for product in products]
    return tuple(bytes(column[place] for column in columns) for place in range(size + 1))

"""A real video of any length without an encoder of our own: VP8 key frames in WebM, with an index (Cues).

A browser's canvas gives each frame as a lossy WebP picture, and that is a VP8 key frame in a RIFF file
(RFC 9649, 2.5). Every frame can be sought to. Matroska: RFC 9559; EBML: RFC 8794.
"""

import struct
from collections.abc import Sequence
from typing import Final

_SEGMENT: Final = 0x18538067
_SIZE_BYTES: Final = 8
"""Of every size: how long an index is must not depend on what it says."""


def frame_of_webp(picture: bytes) -> bytes:
    """The VP8 key frame in a lossy WebP picture. ValueError for another."""
    if picture[:4] != b"RIFF" or picture[8:12] != b"WEBP":
        raise ValueError("no WebP picture")
    at = 12
    while at + 8 <= len(picture):
        size = int.from_bytes(picture[at + 4 : at + 8], "little")
        if picture[at : at + 4] == b"VP8 ":
            return picture[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    raise ValueError("no lossy WebP picture")


def video(frames: Sequence[bytes], *, width: int, height: int, frame_ms: int) -> bytes:
    """*frames* one after the other, each for *frame_ms*, one cluster each."""
    header = _element(
        0x1A45DFA3,
        _number(0x4286, 1), _number(0x42F7, 1), _number(0x42F2, 4), _number(0x42F3, 8),
        _element(0x4282, b"webm"), _number(0x4287, 4), _number(0x4285, 2),
    )  # fmt: skip
    info = _element(
        0x1549A966,
        _number(0x2AD7B1, 1_000_000),  # one tick is a millisecond
        _element(0x4489, _float(len(frames) * frame_ms)),
        _element(0x4D80, b"tests"),
        _element(0x5741, b"tests"),
    )
    size = _element(0xE0, _number(0xB0, width), _number(0xBA, height))
    track = _element(
        0xAE,
        _number(0xD7, 1), _number(0x73C5, 1), _number(0x83, 1), _element(0x86, b"V_VP8"), size,
    )  # fmt: skip
    tracks = _element(0x1654AE6B, track)
    clusters = [
        _element(0x1F43B675, _number(0xE7, number * frame_ms), _element(0xA3, b"\x81\x00\x00\x80" + frame))
        for number, frame in enumerate(frames)
    ]
    places, at = [], len(info) + len(tracks) + len(_cues([(0, 0)] * len(frames)))
    for number, cluster in enumerate(clusters):
        places.append((number * frame_ms, at))
        at += len(cluster)
    # The index stands in front: a player need not look for it at the end.
    return header + _element(_SEGMENT, info, tracks, _cues(places), *clusters)


def _cues(places: Sequence[tuple[int, int]]) -> bytes:
    points = [
        _element(
            0xBB,
            _element(0xB3, time_ms.to_bytes(8)),
            _element(0xB7, _number(0xF7, 1), _element(0xF1, place.to_bytes(8))),
        )
        for time_ms, place in places
    ]
    return _element(0x1C53BB6B, *points)


def _element(identity: int, *content: bytes) -> bytes:
    body = b"".join(content)
    size = (len(body) | 1 << 7 * _SIZE_BYTES).to_bytes(_SIZE_BYTES)
    return identity.to_bytes((identity.bit_length() + 7) // 8) + size + body


def _number(identity: int, value: int) -> bytes:
    return _element(identity, value.to_bytes(max(1, (value.bit_length() + 7) // 8)))


def _float(value: float) -> bytes:
    return struct.pack(">d", value)

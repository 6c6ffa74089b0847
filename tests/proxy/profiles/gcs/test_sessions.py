"""The state of a resumable upload: what is not it, or does not follow on it, is not gone on with."""

import os
from collections.abc import Callable

import msgspec
import pytest

from envelope.keys import KeyId, KeyMaterial, KeyState
from envelope.multipart import Part
from proxy import refusals
from proxy.keys.cache import KeyCache
from proxy.keys.data_key import DataKey
from proxy.profiles.gcs.sessions import Claim, Known, State, key_header
from proxy.refusals import Refusal, RefusedError
from tests.fakes.clock import ManualClock
from tests.proxy.profiles.gcs.upload_world import OWNER

REF = os.urandom(16)
MARK = bytes(range(32))


def refused(step: Callable[[], object]) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        step()
    return caught.value.refusal


@pytest.fixture
def key() -> DataKey:
    keys = KeyCache(ManualClock())
    secret = bytearray(os.urandom(32))
    active = KeyMaterial(owner=OWNER, key_id=KeyId.random(), state=KeyState.ACTIVE, version=1, secret=secret)
    keys.install(OWNER, [active], deadline_boot_s=1e9)
    return keys.sealing_key(OWNER)


def state(*, commitment: bytes | None = None, is_last: bool = False) -> State:
    claim = None
    if commitment is not None:
        claim = Claim(commitment=commitment, stop=7, is_last=is_last, secrets=b"new")
    return State(ref=REF, secrets=b"old", claim=claim)


def test_what_is_known_of_the_plaintext_is_this_uploads_and_whole(key: DataKey) -> None:
    known = Known(crc32c=b"abcd", said_md5=bytes(16))
    sealed = known.sealed(key, REF)
    assert Known.opened(sealed, key, REF) == known
    damaged = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for data, ref in ((damaged, REF), (sealed[:-1], REF), (b"", REF), (sealed, bytes(16))):
        assert refused(lambda data=data, ref=ref: Known.opened(data, key, ref)) is refusals.UPLOAD_LOST  # type: ignore[misc]


def test_what_another_version_has_sealed_is_lost(key: DataKey, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other_version:
        other_version.setattr(msgspec.msgpack, "encode", lambda _known: b"\x00")
        sealed = Known().sealed(key, REF)
    assert refused(lambda: Known.opened(sealed, key, REF)) is refusals.UPLOAD_LOST


@pytest.mark.parametrize("sealed", [b"", b"not sealed", bytes(200)])
def test_what_is_not_sealed_names_no_key(sealed: bytes) -> None:
    assert refused(lambda: key_header(sealed)) is refusals.UPLOAD_LOST


def test_a_state_that_another_version_has_written_is_lost() -> None:
    good = state(commitment=MARK)
    assert State.decode(good.encode()) == good
    more = msgspec.msgpack.encode([*msgspec.msgpack.decode(good.encode()), "what is this"])
    for data in (b"", b"{}", good.encode()[:-1], more):
        assert refused(lambda data=data: State.decode(data)) is refusals.UPLOAD_LOST  # type: ignore[misc]


def test_only_the_part_that_is_claimed_follows() -> None:
    part = Part(1, 104, MARK)
    followed = state(commitment=MARK).advanced(part, carry=b"c", sent_bytes=5)
    assert (followed.parts, followed.plain_bytes, followed.secrets) == (((104, MARK),), 7, b"new")
    for before in (state(), state(commitment=bytes(32))):
        step = lambda before=before: before.advanced(part, carry=b"", sent_bytes=0)  # noqa: E731
        assert refused(step) is refusals.INTERNAL


def test_only_a_claimed_end_is_the_end() -> None:
    done = state(commitment=MARK, is_last=True).finished()
    assert (done.is_done, done.total_bytes, done.secrets) == (True, 7, b"new")
    for before in (state(), state(commitment=MARK)):
        assert refused(before.finished) is refusals.INTERNAL

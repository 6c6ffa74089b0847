"""Which upload a path lies in, and the order in which a server joins its chunks."""

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope.multipart import LISTED, RISING, Part, block_number, upload_ref
from envelope.objects import sealed_length
from proxy import refusals
from proxy.profiles.webdav.chunk_names import (
    MIN_CHUNK_BYTES,
    UploadPath,
    in_order,
    manifest_of,
    name_behind,
    upload_path,
)
from proxy.refusals import Refusal, RefusedError
from proxy.uploads import KeptPart
from tests.referees.nextcloud_emulator import natural

FOLDER = "/remote.php/dav/uploads/alice/web-1"


def kept(*names: str) -> list[KeptPart]:
    return [
        KeptPart(part=Part(UploadPath(FOLDER, name).number, sealed_length(7), os.urandom(32)), tag=name)
        for name in names
    ]


def refusal_of(*names: str, ending_bytes: int = 200) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        name_behind(in_order(kept(*names)), ending_bytes)
    return caught.value.refusal


@pytest.mark.parametrize(
    ("target", "collection", "name"),
    [
        (FOLDER, FOLDER, ""),
        (FOLDER + "/", FOLDER, ""),
        (FOLDER + "/1", FOLDER, "1"),
        (FOLDER + "/.file?x=/y", FOLDER, ".file"),
        ("/cloud" + FOLDER + "/00001", "/cloud" + FOLDER, "00001"),
        ("/remote.php/dav/uploads/a%40b.example/x%20y/1", "/remote.php/dav/uploads/a%40b.example/x%20y", "1"),
    ],
)
def test_paths_in_uploads(target: str, collection: str, name: str) -> None:
    path = upload_path(target)
    assert path == UploadPath(collection, name)
    assert path.sibling("7") == collection + "/7"


@pytest.mark.parametrize(
    "target",
    [
        "/",
        "/remote.php/dav/uploads",
        "/remote.php/dav/uploads/alice/",
        "/remote.php/dav/files/alice/uploads/x/1",
        "/f?" + FOLDER,
        "/remote.php/dav/uploadsx/alice/1/2",
    ],
)
def test_paths_elsewhere(target: str) -> None:
    assert upload_path(target) is None


@pytest.mark.parametrize(
    "target",
    [
        "/remote.php/dav/%75ploads/alice/web-1/1",
        "/remote.php/dav/files/../uploads/alice/web-1/1",
        "/remote.php/dav//uploads/alice/web-1/1",
        "/remote.php/dav/uploads/alice/./web-1/1",
        "/remote.php/dav/uploads/alice%2Fweb-1/1/2",
        "/remote.php/dav/uploads/alice/web-1/a/1",
        "/remote.php/dav/uploads/alice/x/../web-1/1",
        "/remote.php/dav/files/%2e%2e/uploads/alice/web-1/1",
    ],
)
def test_other_spellings_are_refused(target: str) -> None:
    with pytest.raises(RefusedError) as caught:
        upload_path(target)
    assert caught.value.refusal is refusals.BAD_MESSAGE


def test_an_upload_is_the_same_however_its_path_is_spelt() -> None:
    spelt, plain = (
        upload_path("/remote.php/dav/uploads/a%40b/x"),
        upload_path("/remote.php/dav/uploads/a@b/x/"),
    )
    assert spelt is not None
    assert plain is not None
    assert spelt.ref == plain.ref == upload_ref("/remote.php/dav/uploads/a@b/x")
    assert spelt.ref != UploadPath("/remote.php/dav/uploads/a@b/y", "").ref


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("1", 1),
        ("00042", 42),
        ("4294967294", 2**32 - 2),
        ("000000000000000-000000001048575", block_number(b"000000000000000-000000001048575")),
    ],
)
def test_numbers_of_chunks(name: str, number: int) -> None:
    assert UploadPath(FOLDER, name).number == number


@pytest.mark.parametrize(
    "name", ["", "a", "1a", "-1", "1.0", "4294967295", "1" * 17, "1-2", "٣", "00000000-000000001"]
)
def test_names_that_say_nothing_are_refused(name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        assert UploadPath(FOLDER, name).number
    assert caught.value.refusal is refusals.CHUNK_NAME


def test_small_numbered_chunks_may_be_the_last_one() -> None:
    assert UploadPath(FOLDER, "1").may_be_held(MIN_CHUNK_BYTES - 1)
    assert not UploadPath(FOLDER, "1").may_be_held(MIN_CHUNK_BYTES)
    assert not UploadPath(FOLDER, "1").may_be_held(None)
    assert not UploadPath(FOLDER, "000000000000000-000000001048575").may_be_held(1)


@given(numbers=st.sets(st.integers(1, 10_000), min_size=1, max_size=20), width=st.integers(0, 7))
def test_chunks_are_in_the_servers_order_and_the_manifest_behind_them(numbers: set[int], width: int) -> None:
    width = width if width >= len(str(max(numbers) + 1)) else 0
    names = [f"{number:0{width}}" for number in numbers]
    random.shuffle(names)
    if max(numbers) == 10_000 and not any(name.startswith("0") for name in names):
        assert refusal_of(*names) is refusals.TOO_MANY_CHUNKS
        return
    ordered = in_order(kept(*names))
    behind = name_behind(ordered, 200)
    assert [each.tag for each in ordered] == sorted(names, key=natural)
    assert max([*names, behind], key=natural) == behind
    manifest = manifest_of(bytes(16), ordered)
    assert manifest.version == RISING
    assert [part.number for part in manifest.parts] == sorted(numbers)


def test_chunks_named_by_their_bytes() -> None:
    names = ["000000001048576-000000002097151", "000000000000000-000000001048575"]
    ordered = in_order(kept(*names))
    assert [each.tag for each in ordered] == sorted(names)
    assert manifest_of(bytes(16), ordered).version == LISTED
    assert name_behind(ordered, 229) == "000000002097152-000000002097380"


@pytest.mark.parametrize(
    "names",
    [
        ["1", "02"],
        ["01", "1"],
        ["1", "00000000-00000009"],
        ["00000000-00000009", "000000010-000000019"],
    ],
)
def test_names_of_two_kinds_are_refused(names: list[str]) -> None:
    assert refusal_of(*names) is refusals.CHUNK_NAME


@pytest.mark.parametrize("names", [["9999", "10000"], ["099", "999"], ["00000000-99999999"]])
def test_without_a_place_for_the_manifest_it_is_refused(names: list[str]) -> None:
    assert refusal_of(*names) is refusals.TOO_MANY_CHUNKS


def test_no_chunk_is_no_upload() -> None:
    with pytest.raises(RefusedError) as caught:
        in_order([])
    assert caught.value.refusal is refusals.CHUNKS_UNKNOWN

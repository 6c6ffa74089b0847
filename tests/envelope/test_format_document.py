"""docs/format.md says what the code does: names, numbers and codes that stand in both are the same."""

import re
from pathlib import Path
from typing import Final

import pytest

from envelope import cobblestone, derive, material, multipart, objects, strict_json
from envelope.keys import KeyState

ROOT: Final = Path(__file__).parents[2]
DOCUMENT: Final = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


def _source(name: str) -> str:
    return (ROOT / "envelope" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cobblestone.py", "derive.py", "objects.py", "fields.py"])
def test_labels(name: str) -> None:
    labels = set(re.findall(r'b"(sealgate/v1[^"]*)"', _source(name)))
    assert labels
    assert {label for label in labels if label not in DOCUMENT} == set()


def test_labels_of_the_document_are_in_the_code() -> None:
    sources = ("cobblestone.py", "derive.py", "objects.py", "fields.py", "broker.py")
    code = "".join(map(_source, sources))
    assert {
        label for label in re.findall(r"[`\"](sealgate/v1 [^`\"]+)[`\"]", DOCUMENT) if label not in code
    } == set()


def test_constants() -> None:
    for magic in (objects.MAGIC, multipart.TRAILER_MAGIC):
        assert f"`{magic.hex(' ').upper()}`" in DOCUMENT
    for number in (objects.RECORD_SIZE, objects.CHUNK_SIZE, multipart.MAX_PARTS):
        assert f"{number:,}".replace(",", " ") in DOCUMENT
    assert objects.CHUNK_SIZE * cobblestone.CHUNK_LIMIT == 2**52
    assert "at most 2^52 - 1 bytes" in DOCUMENT
    assert f"at most {objects.MAX_CANDIDATES}" in DOCUMENT
    assert f"At most {strict_json.MAX_ENVELOPE_BYTES // 1024} KiB" in DOCUMENT
    assert f"at most {material.MAX_AHEAD_S} s ahead" in DOCUMENT
    assert derive.lp(b"x" * 65535)


def test_refusal_codes() -> None:
    source = _source("material.py")
    codes = set(re.findall(r'EnvelopeError\(\s*"([a-z-]+)"', source)) | {"malformed", "header"}
    assert codes == set(re.findall(r"\[`([a-z-]+)`\]", DOCUMENT))
    docstring = material.open_envelope.__doc__
    assert docstring is not None
    assert codes == set(re.findall(r'"([a-z-]+)"', docstring))


def test_claims_and_types() -> None:
    for claim in (*material._CLAIMS, "nonce"):
        assert f"`{claim}`" in DOCUMENT
    for kind in (material._INNER_TYPE, material._OUTER_TYPE):
        assert f'"{kind}"' in DOCUMENT


def test_states() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (yes|no) \| (?:yes|no)", DOCUMENT, re.MULTILINE))
    assert rows == {state.value: "yes" if state.may_seal else "no" for state in KeyState}
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (?:yes|no) \| (yes|no)", DOCUMENT, re.MULTILINE))
    assert rows == {state.value: "yes" if state.may_open else "no" for state in KeyState}

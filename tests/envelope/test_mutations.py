"""The checks that carry the security of the formats are themselves checked: without one, tests turn red.

Each mutation is made in a copy of the sources; the tests that claim to cover it run there, in a process of
their own, and must fail. The unmutated copy passes the same tests, so that the failure is the mutation's.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
COPIED: Final = ("envelope", "certs", "tests/envelope", "tests/vectors")
FILES: Final = ("pyproject.toml", "tests/__init__.py", "tests/pki.py")

TAMPERING: Final = "tests/envelope/test_tampering.py"
MATERIAL: Final = "tests/envelope/test_material.py"


@dataclass(frozen=True, kw_only=True)
class _Mutation:
    """In *file* every match of a pattern becomes its replacement; then each of *tests* must fail."""

    name: str
    file: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


MUTATIONS: Final = (
    _Mutation(
        name="no commitment compare",
        file="envelope/cobblestone.py",
        edits=((r"if hmac\.compare_digest\(candidate\.commitment, commitment\):", "if True:"),),
        tests=(
            f"{TAMPERING}::test_every_single_bit",
            f"{TAMPERING}::test_a_ciphertext_valid_under_two_keys_opens_under_one_only",
        ),
    ),
    _Mutation(
        name="no last-chunk rule",
        file="envelope/cobblestone.py",
        edits=(
            (
                r"            raise truncated\(\)\n        keys, number = self\._take\(1\)",
                "            return b''\n        keys, number = self._take(1)",
            ),
        ),
        tests=(
            f"{TAMPERING}::test_a_cut_on_a_chunk_boundary",
            f"{TAMPERING}::test_every_truncation_of_a_three_chunk_object",
        ),
    ),
    _Mutation(
        name="no tenant in the context",
        file="envelope/derive.py",
        edits=(
            (
                r"return lp\(owner\.tenant\.encode\(\)\) \+ lp\(owner\.service\.encode\(\)\)",
                "return lp(owner.service.encode())",
            ),
        ),
        tests=(
            f"{TAMPERING}::test_the_owner_stands_in_the_context_too",
            f"{TAMPERING}::test_the_same_material_under_another_owner",
        ),
    ),
    _Mutation(
        name="no tenant in the context of objects only",
        file="envelope/objects.py",
        edits=((r"\+ header \+ scope\(owner\) \+", "+ header +"),),
        tests=(f"{TAMPERING}::test_the_owner_stands_in_the_context_too",),
    ),
    _Mutation(
        name="no index in the nonce",
        file="envelope/cobblestone.py",
        edits=(
            (r"\((?:keys\.base_nonce|base) \^ number\)\.to_bytes\(12\)", "(keys.base_nonce).to_bytes(12)"),
        ),
        tests=(
            f"{TAMPERING}::test_records_in_any_other_order",
            "tests/envelope/test_cobblestone.py::test_the_nonce_is_base_xor_number",
        ),
    ),
    _Mutation(
        name="open algorithm list",
        file="envelope/material.py",
        edits=((r'header\.get\("alg"\) != ours\.algorithm or header\.get\("enc"\) != _ENCRYPTION', "False"),),
        tests=(
            f"{MATERIAL}::test_rsa_algorithms_other_than_the_certificates",
            f"{MATERIAL}::test_content_encryption_other_than_a256gcm",
        ),
    ),
    _Mutation(
        name="open signature algorithms",
        file="envelope/material.py",
        edits=((r'header\.get\("alg"\) != _SIGNATURE', "False"),),
        tests=(f"{MATERIAL}::test_unsigned_and_wrongly_signed",),
    ),
    _Mutation(
        name="no exp check",
        file="envelope/material.py",
        edits=((r"if now_s >= expires_at_s:", "if False:"),),
        tests=(f"{MATERIAL}::test_the_window",),
    ),
    _Mutation(
        name="no wiping of a failed buffer",
        file="envelope/cobblestone.py",
        edits=((r"target\[:\] = bytes\(len\(target\)\)", "pass"),),
        tests=("tests/envelope/test_cobblestone.py::test_a_failed_buffer_keeps_nothing",),
    ),
    _Mutation(
        name="a broken stream goes on",
        file="envelope/cobblestone.py",
        edits=((r"self\._fail\(error\)", "pass"),),
        tests=(
            "tests/envelope/test_cobblestone.py::test_a_stream_that_broke_stays_broken",
            "tests/envelope/test_vectors.py::test_wycheproof",
        ),
    ),
    _Mutation(
        name="the header relaxes the policy",
        file="envelope/objects.py",
        edits=((r"if header\.bind is not bind:", "if False:"),),
        tests=(
            "tests/envelope/test_multipart.py::test_a_manifest_sealed_as_something_else",
            "tests/envelope/test_objects.py::test_bound_names",
        ),
    ),
    _Mutation(
        name="header members are not checked",
        file="envelope/material.py",
        edits=((r"if header\.keys\(\) != .*:", "if False:"),),
        tests=(f"{MATERIAL}::test_header_members_that_are_not_listed",),
    ),
    _Mutation(
        name="the signed recipient is not compared",
        file="envelope/material.py",
        edits=((r'if claims\["x5t#S256"\] != ours\.thumbprint:', "if False:"),),
        tests=(f"{MATERIAL}::test_encrypted_again_to_another_by_an_honest_recipient",),
    ),
    _Mutation(
        name="check values are not compared",
        file="envelope/material.py",
        edits=((r"correct = hmac\.compare_digest\(key_check\(key\), stated\)", "correct = True"),),
        tests=(f"{MATERIAL}::test_keys_that_are_not_what_their_check_value_says",),
    ),
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the tests below need, to be mutated and mended again."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in COPIED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, copy / file)
    return copy


def _pytest(sources: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": str(sources / ".h"),
    }
    environment.pop("PYTHONPATH", None)
    environment.pop("CI", None)  # with it pytest prints whole differences: minutes, for 64 KiB
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *tests],
        cwd=sources,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_unmutated_copy_passes(sources: Path) -> None:
    tests = sorted({test for mutation in MUTATIONS for test in mutation.tests})
    done = _pytest(sources, tuple(tests))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_turns_tests_red(mutation: _Mutation, sources: Path) -> None:
    file = sources / mutation.file
    original = file.read_text(encoding="utf-8")
    mutated = original
    for pattern, replacement in mutation.edits:
        mutated, count = re.subn(pattern, replacement, mutated)
        assert count, f"{mutation.file} has changed: {pattern!r} matches nothing"
    try:
        file.write_text(mutated, encoding="utf-8")
        done = _pytest(sources, mutation.tests)
    finally:
        file.write_text(original, encoding="utf-8")
    # 1 is "tests failed"; anything else, such as a syntax error, proves nothing.
    assert done.returncode == 1, f"nothing notices\n{done.stdout}{done.stderr}"
    for test in mutation.tests:
        assert f"FAILED {test}" in done.stdout, f"{test} does not notice\n{done.stdout}"
    assert "ERROR" not in done.stdout

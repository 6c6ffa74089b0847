"""Options of profiles: what is taken, what is refused, and which rule a path falls under."""

import pytest

from envelope.errors import FormatError
from proxy.plans.profile_options import ProfileOptions, SealedUpload, StoredPolicy, edited

RULES = ProfileOptions.of(
    {"legacy": {"/old": "migrate", "/old/secret": "strict", "/raw/": "passthrough", "/": "strict"}}
)


def test_the_defaults() -> None:
    options = ProfileOptions.of({})
    assert options.sealed_upload is SealedUpload.WRAP
    assert options.policy_for("/a/../b") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"unknown": 1},
        {"sealed_upload": "PASS"},
        {"sealed_upload": None},
        {"legacy": "migrate"},
        {"legacy": {"/a": "none"}},
        {"legacy": {"a": "strict"}},
        {"legacy": {"": "strict"}},
        {"legacy": {"/" + "x" * 1024: "strict"}},
    ],
)
def test_what_no_profile_knows(wrong: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="profile options"):
        ProfileOptions.of(wrong)


@pytest.mark.parametrize(
    ("target", "policy"),
    [
        ("/old", StoredPolicy.MIGRATE),
        ("/old/x?y=/raw/", StoredPolicy.MIGRATE),
        ("/older", StoredPolicy.STRICT),
        ("/old/secret/x", StoredPolicy.STRICT),
        ("/old/secrets", StoredPolicy.MIGRATE),
        ("/raw/a", StoredPolicy.PASSTHROUGH),
        ("/raw", StoredPolicy.STRICT),
        ("/raw/caf%C3%A9%20x", StoredPolicy.PASSTHROUGH),
    ],
)
def test_the_longest_prefix_of_whole_segments_wins(target: str, policy: StoredPolicy) -> None:
    assert RULES.policy_for(target) is policy


@pytest.mark.parametrize(
    "spelling",
    [
        "/raw/../secret", "/raw/./x", "/raw/..", "/raw//x", "/raw/%2e%2E/x", "/raw/a%2Fb", "/raw/a%5cb",
        "/raw/a\\b", "/raw/%73ecret", "/raw/;x", "/raw/%7e", "/raw/%5F",
    ],
)  # fmt: skip
def test_what_can_be_spelled_otherwise_is_strict(spelling: str) -> None:
    assert RULES.policy_for(spelling) is StoredPolicy.STRICT


def test_changes_by_words() -> None:
    present = {"sealed_upload": "pass", "legacy": {"/a": "migrate"}}
    made = edited(present, ["legacy:/b=strict", "flag=true", "n=3", "text=a=b", 'quoted="3"'])
    assert made["legacy"] == {"/a": "migrate", "/b": "strict"}
    assert (made["flag"], made["n"], made["text"], made["quoted"]) == (True, 3, "a=b", "3")
    assert present == {"sealed_upload": "pass", "legacy": {"/a": "migrate"}}  # as it was
    assert edited(present, ["legacy:/a=", "sealed_upload=", "absent="]) == {}
    for wrong in ("", "=", "x", "X=1", "sealed_upload:x=1", "a b=1"):
        with pytest.raises(FormatError):
            edited(present, [wrong])

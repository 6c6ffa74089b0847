import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.profiles.s3.etags import is_of_parts, to_client, to_service

HEX = "0123456789abcdef0123456789ABCDEF"


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        (HEX, f"{HEX}-1"),
        (f'"{HEX}"', f'"{HEX}-1"'),
        (f'W/"{HEX}"', f'W/"{HEX}-1"'),
        (f'"{HEX}-1"', f'"{HEX}-01"'),
        (f'"{HEX}-01"', f'"{HEX}-001"'),
        (f'"{HEX}-2"', f'"{HEX}-2"'),
        (f'"{HEX}-10"', f'"{HEX}-10"'),
        (f'"{HEX}-11"', f'"{HEX}-11"'),
        ("*", "*"),
        ('"opaque"', '"opaque"'),
        (f'"{HEX}0"', f'"{HEX}0"'),
        (f'"x{HEX}"', f'"x{HEX}"'),
        (f'"{HEX}-a"', f'"{HEX}-a"'),
        (f'"{HEX}", "{HEX[::-1]}-1",*', f'"{HEX}-1", "{HEX[::-1]}-01",*'),
        ("", ""),
    ],
)
def test_the_map(stored: str, shown: str) -> None:
    assert to_client(stored) == shown
    assert to_service(shown) == stored


TAGS = st.builds(
    lambda digits, suffix: f"{digits:032x}{suffix}",
    st.integers(0, 2**128 - 1),
    st.one_of(st.just(""), st.from_regex(r"-[0-9]{1,5}", fullmatch=True)),
)


@given(st.lists(TAGS, max_size=4))
def test_every_tag_comes_back(tags: list[str]) -> None:
    text = ", ".join(f'"{tag}"' for tag in tags)
    assert to_service(to_client(text)) == text


@given(TAGS, TAGS)
def test_no_two_tags_are_shown_alike(one: str, two: str) -> None:
    assert (to_client(one) == to_client(two)) == (one == two)


@given(TAGS)
def test_nothing_that_is_shown_is_an_md5(tag: str) -> None:
    assert len(to_client(tag)) > 32


def test_a_tag_that_was_never_shown_is_left_to_the_service() -> None:
    assert to_service(f'"{HEX}"') == f'"{HEX}"'


@pytest.mark.parametrize(
    ("tag", "expected"), [(f'"{HEX}-3"', True), (f"{HEX}-10000", True), (HEX, False), ('"x-3"', False)]
)
def test_parts(tag: str, expected: bool) -> None:
    assert is_of_parts(tag) is expected

"""The page a person sees in place of what was refused."""

from html.parser import HTMLParser
from typing import override

import pytest

from proxy import refusals
from proxy.messages.message import Fields
from proxy.profiles.web.pages import refusal_page, wants_page
from proxy.refusals import Refusal

EVERY = [value for value in vars(refusals).values() if isinstance(value, Refusal)]


class Reader(HTMLParser):
    """What a page says and what it would load or run."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page.decode())

    @override
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)

    @override
    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("refusal", EVERY, ids=lambda refusal: refusal.code)
def test_it_says_what_and_why_and_loads_nothing(refusal: Refusal) -> None:
    page = Reader(refusal_page(refusal))
    for said in (refusal.code, refusal.cause, refusal.next_step, str(refusal.status)):
        assert said in page.text
    assert page.tags.isdisjoint({"script", "img", "link", "iframe", "a", "form"})
    assert page.attributes.isdisjoint({"src", "href", "onload", "action"})


def test_what_it_says_cannot_be_markup() -> None:
    hostile = Refusal(code="<b>", status=400, cause="<script>alert(1)</script>", next_step="a & b")
    page = Reader(refusal_page(hostile))
    assert page.tags.isdisjoint({"script", "b"})
    assert "<script>alert(1)</script>" in page.text


@pytest.mark.parametrize(
    ("given", "wants"),
    [
        ({"Sec-Fetch-Dest": "document", "Accept": "text/html,*/*"}, True),
        ({"Sec-Fetch-Dest": "iframe"}, True),
        ({"Sec-Fetch-Dest": "empty", "Accept": "text/html"}, False),
        ({"Sec-Fetch-Dest": "video", "Accept": "*/*"}, False),
        ({"Accept": "text/html;level=1, application/xml;q=0.9"}, True),
        ({"Accept": "*/*"}, False),
        ({"Accept": "application/json, text/html"}, False),
        ({}, False),
    ],
)
def test_scripts_and_programs_get_json(given: dict[str, str], *, wants: bool) -> None:
    fields = Fields([(name.encode(), value.encode()) for name, value in given.items()])
    assert wants_page(fields) is wants

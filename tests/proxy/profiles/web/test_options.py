"""Which rule of a web application's a request falls under."""

import pytest

from envelope.errors import FormatError
from proxy.plans.profile_options import StoredPolicy, edited
from proxy.profiles.web.options import FieldRule, FormLength, RouteRule, WebOptions

RULES = WebOptions.of(
    {
        "routes": {
            "PUT /": "seal",
            "PUT /notes": "clear",
            "POST /?delete": "clear",
            "POST /box": "seal",
            "* /box": "refuse",
            "GET /?zip": "refuse",
        }
    }
)


def test_the_defaults_let_no_body_through() -> None:
    options = WebOptions.of({})
    assert options.rule_for("POST", "/") is None
    assert (options.form_length, options.fields, options.has_pages) == (FormLength.HELD, {}, True)


@pytest.mark.parametrize(
    ("method", "target", "rule"),
    [
        ("PUT", "/a/b", RouteRule.SEAL),
        ("PUT", "/notes", RouteRule.CLEAR),
        ("PUT", "/notes/1?x=y", RouteRule.CLEAR),
        ("PUT", "/notesbook", RouteRule.SEAL),
        ("POST", "/a", None),
        ("POST", "/a?delete", RouteRule.CLEAR),
        ("POST", "/a?x&delete=1", RouteRule.CLEAR),
        ("POST", "/a?deleted", None),
        ("POST", "/a?x=delete", None),
        ("POST", "/box/x", RouteRule.SEAL),  # a method of its own
        ("PUT", "/box/x", RouteRule.REFUSE),  # the longer path
        ("PATCH", "/box", RouteRule.REFUSE),
        ("POST", "/box?delete", RouteRule.SEAL),  # the longer path, before the parameter
        ("GET", "/x?zip", RouteRule.REFUSE),
        ("GET", "/x", None),
    ],
)
def test_the_longest_path_wins(method: str, target: str, rule: RouteRule | None) -> None:
    assert RULES.rule_for(method, target) is rule


@pytest.mark.parametrize("target", ["/a?%64elete", "/a?delete%00", "/a?Delete"])
def test_a_parameter_lets_something_pass_only_as_it_stands(target: str) -> None:
    assert RULES.rule_for("POST", target) is None


@pytest.mark.parametrize("target", ["/a?%7aip", "/a?x;zip=1", "/a?x&%7Ai%70=", "/b//a?zip", "/a/%2e%2e/?zip"])
def test_a_parameter_refuses_however_it_is_spelled(target: str) -> None:
    assert RULES.rule_for("GET", target) is RouteRule.REFUSE


@pytest.mark.parametrize("path", ["/notes/../a", "/notes//", "/notes/%2e%2e/a", "/notes/;x", "/%6eotes"])
def test_where_a_path_is_ambiguous_nothing_is_clear(path: str) -> None:
    only = WebOptions.of({"routes": {"PUT /notes": "clear"}})
    assert only.rule_for("PUT", path) is None
    sealing = WebOptions.of({"routes": {"PUT /notes": "clear", "PUT /files": "seal"}})
    assert sealing.rule_for("PUT", path) is RouteRule.SEAL
    assert RULES.rule_for("PUT", path) is RouteRule.REFUSE, "the rule for all methods holds wherever it lies"


@pytest.mark.parametrize("refusing", ["POST /files?put", "* /files?put"])
@pytest.mark.parametrize("stricter", ["refuse", "seal"])
def test_of_several_parameters_the_strictest_rule_holds(refusing: str, stricter: str) -> None:
    for routes in (
        {"POST /files?share": "clear", refusing: stricter},
        {refusing: stricter, "POST /files?share": "clear"},
    ):
        options = WebOptions.of({"routes": routes})
        assert options.rule_for("POST", "/files?share") is RouteRule.CLEAR
        assert options.rule_for("POST", "/files?share&put") == stricter
        assert options.rule_for("POST", "/files?put&share") == stricter


@pytest.mark.parametrize(
    ("stricter", "target"),
    [
        ("* /api/files:upload", "/api/files%3Aupload"),
        ("* /api/@me", "/api/%40me"),
        ("* /api/a+b", "/api/a%2Bb"),
        ("* /api/a(b)", "/api/a%28b%29"),
        ("* /api/größe", "/api/gr%C3%B6%C3%9Fe"),
        ("* /api/u%C3%A4", "/api/u%c3%a4"),
        ("* /api/upload", "/api/upload%00"),
        ("* /api/upload", "/api/%2575pload"),
        ("* /api/upload", "/api/x%3bupload"),
        ("* /api/?up", "/api/x?a%3Bup"),
        ("* /api/?up", "/api/x?a%26up=1"),
        ("* /api/?up", "/api/x?up[]=1"),
        ("* /api/?up", "/api/x?up%00"),
    ],
)
@pytest.mark.parametrize("rule", ["refuse", "seal"])
@pytest.mark.parametrize("clear", ["POST /", "POST /api"])
def test_no_spelling_leads_around_a_stricter_rule(stricter: str, target: str, rule: str, clear: str) -> None:
    options = WebOptions.of({"routes": {clear: "clear", stricter: rule}})
    assert options.rule_for("POST", target) == rule
    assert options.rule_for("POST", "/api/other%20one") is RouteRule.CLEAR


def test_what_only_one_reading_lets_pass_is_not_clear() -> None:
    options = WebOptions.of({"routes": {"POST /a@b": "clear"}})
    assert options.rule_for("POST", "/a@b") is RouteRule.CLEAR
    assert options.rule_for("POST", "/a%40b") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"routes": {"/x": "seal"}},
        {"routes": {"PUT x": "seal"}},
        {"routes": {"put /": "seal"}},
        {"routes": {"PUT /?a=b": "seal"}},
        {"routes": {"PUT /?": "seal"}},
        {"routes": {"PUT /?%61": "seal"}},
        {"routes": {"PUT /": "open"}},
        {"fields": {"": "clear"}},
        {"fields": {"a": "seal"}},
        {"form_length": "guessed"},
        {"field_bytes": 0},
        {"clear_bytes": 1 << 30},
        {"archives": True},
        {"unknown": 1},
    ],
)
def test_what_is_no_rule(wrong: dict[str, object]) -> None:
    with pytest.raises(FormatError, match="profile options"):
        WebOptions.of(wrong)


def test_rules_as_they_are_given_to_the_command() -> None:
    given = edited({}, ["routes:POST /?delete=clear", "routes:* /admin=refuse", "fields:body=refuse"])
    options = WebOptions.of(given)
    assert options.routes == {"POST /?delete": RouteRule.CLEAR, "* /admin": RouteRule.REFUSE}
    assert options.fields == {"body": FieldRule.REFUSE}


def test_strict_paths_are_still_told() -> None:
    assert WebOptions.of({"legacy": {"/files": "strict"}}).policy_for("/files/a") is StoredPolicy.STRICT
    assert WebOptions.of({}).policy_for("/") is None

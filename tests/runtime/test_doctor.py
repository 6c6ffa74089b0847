"""What `doctor` finds is said the same way by both commands."""

from datetime import UTC, datetime, timedelta

import pytest

from runtime.doctor import as_json, as_text, failed, has_failed, ok, validity, warning

BEGIN, END = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 12, 31, tzinfo=UTC)
SECOND = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("now", "outcome", "detail"),
    [
        (BEGIN - SECOND, "failed", "valid from 2026-01-01T00:00:00+00:00 on"),
        (BEGIN, "ok", "valid until 2026-12-31"),
        (END - timedelta(days=30), "ok", "valid until 2026-12-31"),
        (END - timedelta(days=30) + SECOND, "warning", "expires on 2026-12-31, in 29 days"),
        (END, "warning", "expires on 2026-12-31, in 0 days"),
        (END + SECOND, "failed", "expired on 2026-12-31"),
    ],
)
def test_a_certificate_is_warned_of_before_it_ends(now: datetime, outcome: str, detail: str) -> None:
    check = validity("tls", BEGIN, END, now=now, mend="renew it")
    assert (check.name, check.outcome, check.detail) == ("tls", outcome, detail)
    assert (check.mend is None) == (outcome == "ok")


def test_a_beginning_that_was_checked_is_not_checked_again() -> None:
    assert validity("tls", None, END, now=BEGIN - SECOND, mend="renew it").outcome == "ok"


def test_the_report() -> None:
    good = [ok("clock", "synchronised"), warning("disk", "nearly full", "free space")]
    bad = [*good, failed("hsm", "unreachable", "switch it on")]
    assert not has_failed(good)
    assert has_failed(bad)
    assert as_json(good)["ok"] is True
    assert as_json(bad) == {
        "ok": False,
        "checks": [
            {"name": "clock", "outcome": "ok", "detail": "synchronised", "mend": None},
            {"name": "disk", "outcome": "warning", "detail": "nearly full", "mend": "free space"},
            {"name": "hsm", "outcome": "failed", "detail": "unreachable", "mend": "switch it on"},
        ],
    }
    assert as_text(bad).splitlines() == [
        "ok      clock: synchronised",
        "warning disk: nearly full",
        "        mend: free space",
        "failed  hsm: unreachable",
        "        mend: switch it on",
    ]

"""Every refusal in the shape that Google's clients read."""

import json

import pytest

from proxy import refusals
from proxy.profiles.gcs.errors import CONTENT_TYPE, error_document
from proxy.refusals import Refusal

ALL = sorted({one.code: one for one in vars(refusals).values() if isinstance(one, Refusal)}.items())


@pytest.mark.parametrize("refusal", [one for _, one in ALL], ids=[code for code, _ in ALL])
def test_a_refusal_is_an_error_of_googles(refusal: Refusal) -> None:
    error = json.loads(error_document(refusal))["error"]
    assert (error["code"], error["sealgateError"]) == (refusal.status, refusal.code)
    assert error["message"] == error["errors"][0]["message"] == f"{refusal.cause} {refusal.next_step}"
    assert error["errors"][0]["domain"] == "global"
    assert error["errors"][0]["reason"]


def test_reasons_by_which_clients_decide() -> None:
    def reason(refusal: Refusal) -> str:
        return str(json.loads(error_document(refusal))["error"]["errors"][0]["reason"])

    assert CONTENT_TYPE.startswith("application/json")
    assert reason(refusals.KEY_EXPIRED) == reason(refusals.UPSTREAM) == "backendError"
    assert reason(refusals.RANGE_NOT_SATISFIABLE) == "requestedRangeNotSatisfiable"
    assert reason(refusals.PRECONDITION) == "conditionNotMet"
    assert reason(refusals.BAD_DIGEST) == "invalid"
    assert reason(refusals.UNKNOWN_ROUTE) == "notImplemented"

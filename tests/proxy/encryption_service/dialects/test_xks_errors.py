import json

import pytest

from proxy.encryption_service.dialects.dialect import Trouble
from proxy.encryption_service.dialects.xks_errors import (
    ANSWER_TO,
    ERROR_OF,
    ERROR_OF_REFUSAL,
    REFUSALS,
    STATUS,
    CipherFailedError,
    ErrorName,
    code_of,
    error_answer,
    error_name,
)
from proxy.encryption_service.dialects.xks_messages import CiphertextError, SizeError, ValidationError
from proxy.encryption_service.errors import KeyRefused, Refusal, ServiceError


def test_the_tables_are_complete() -> None:
    assert set(ANSWER_TO) == set(Trouble)
    assert set(ERROR_OF_REFUSAL) == set(Refusal)
    assert set(STATUS) == set(ErrorName)

    def leaves(root: type[ServiceError]) -> set[type[ServiceError]]:
        return {root}.union(*(leaves(child) for child in root.__subclasses__()))

    mapped = leaves(ServiceError) - {ServiceError} - set(ERROR_OF)
    assert {error.__name__ for error in mapped} == {"KeyRefused"}
    assert error_name(ServiceError("new")) is ErrorName.INTERNAL


def test_an_outage_may_be_retried_and_a_decision_is_final() -> None:
    retried = {name for name, status in STATUS.items() if status in (429, 500, 503)}
    assert retried == {ErrorName.THROTTLING, ErrorName.INTERNAL, ErrorName.DEPENDENCY_TIMEOUT}
    for refusal in Refusal:
        assert STATUS[error_name(KeyRefused(refusal, "x"))] in (400, 404)


def test_every_refusal_has_a_code_for_its_record() -> None:
    for kind in (ValidationError, CiphertextError, SizeError, CipherFailedError):
        assert issubclass(kind, REFUSALS)
        assert code_of(kind("x"))
    assert code_of(KeyRefused(Refusal.BLOCKED, "x")) == "key-refused:blocked"


@pytest.mark.parametrize("message", ["", "é\n\x00\x7f\u2028", "~ ", "x" * 600])
def test_a_message_is_short_and_printable(message: str) -> None:
    answer = error_answer(ErrorName.VALIDATION, message)
    text = json.loads(answer.body)["errorMessage"]
    assert len(text) == min(len(message), 511)
    assert all(0x20 <= ord(character) <= 0x7E for character in text)
    assert b"\n" not in answer.body

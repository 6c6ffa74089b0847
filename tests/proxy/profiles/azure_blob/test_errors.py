"""Refusals in Azure's words."""

from xml.etree import ElementTree as ET

import pytest

from proxy import refusals
from proxy.profiles.azure_blob.errors import CODES, azure_code, error_document, shaped
from proxy.refusals import Refusal

ALL = [value for value in vars(refusals).values() if isinstance(value, Refusal)]


@pytest.mark.parametrize("refusal", ALL, ids=lambda refusal: refusal.code)
def test_every_refusal_has_a_document(refusal: Refusal) -> None:
    document = ET.fromstring(error_document(refusal))
    assert document.tag == "Error"
    assert document.findtext("Code") == azure_code(refusal)
    assert document.findtext("SealgateError") == refusal.code
    assert refusal.cause in (document.findtext("Message") or "")


def test_codes_are_of_refusals_that_there_are() -> None:
    assert CODES.keys() <= {refusal.code for refusal in ALL}
    assert azure_code(refusals.BLOCK_UNKNOWN) == "InvalidBlockList"
    assert azure_code(refusals.BAD_DIGEST) == "Md5Mismatch"
    assert azure_code(refusals.KEY_EXPIRED) == "ServerBusy"


RETRIED = {"InternalError", "OperationTimedOut", "ServerBusy"}
"""https://learn.microsoft.com/rest/api/storageservices/status-and-error-codes2: what SDKs ask again for."""


@pytest.mark.parametrize("refusal", ALL, ids=lambda refusal: refusal.code)
def test_a_code_says_what_its_status_says_of_trying_again(refusal: Refusal) -> None:
    is_retried = refusal.status == 429 or (refusal.status >= 500 and refusal.status != 501)
    assert (azure_code(refusal) in RETRIED) is is_retried


def test_the_head_says_the_code_too() -> None:
    made = shaped(refusals.NOT_SEALED)
    assert made.fields == (("x-ms-error-code", "InvalidOperation"),)
    assert made.body == error_document(refusals.NOT_SEALED)


def test_nobody_is_told_to_look_for_his_blob_elsewhere() -> None:
    """A refused blob is there: no code may say that it is not, but for a key that was destroyed."""
    missing = {refusal.code for refusal in ALL if azure_code(refusal) == "ResourceNotFound"}
    assert missing == {refusal.code for refusal in ALL if refusal.status in (404, 410)}

from xml.etree import ElementTree as ET

import pytest

from proxy import refusals
from proxy.profiles.s3.errors import CODES, error_document, s3_code
from proxy.refusals import Refusal
from tests.proxy.profiles.s3.s3_signer import head

ALL = [value for value in vars(refusals).values() if isinstance(value, Refusal)]


@pytest.mark.parametrize("refusal", ALL, ids=lambda refusal: refusal.code)
def test_every_refusal_is_a_document_with_a_code(refusal: Refusal) -> None:
    document = ET.fromstring(error_document(refusal, head("GET", "/b/<k>&\u00e9\udcff?secret=1", {})))
    assert document.tag == "Error"
    assert document.findtext("Code") == s3_code(refusal)
    assert document.findtext("SealgateError") == refusal.code
    assert document.findtext("Resource", "").startswith("/b/<k>&\u00e9")
    assert "secret" not in ET.tostring(document, encoding="unicode").partition("Resource")[2]


def test_what_may_be_retried_is_told_so() -> None:
    for refusal in ALL:
        if refusal.status == 503:
            is_full = refusal is refusals.UPLOADS_FULL
            assert s3_code(refusal) == ("SlowDown" if is_full else "ServiceUnavailable")
        if refusal.status == 501:
            assert s3_code(refusal) == "NotImplemented"


def test_codes_name_refusals_there_are() -> None:
    assert set(CODES) <= {refusal.code for refusal in ALL}


def test_a_long_path_is_cut() -> None:
    assert len(error_document(refusals.BAD_DIGEST, head("GET", "/" + "a" * 100_000, {}))) < 3000

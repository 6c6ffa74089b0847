"""Uploads with a checksum of the ciphertext behind them: decoded again by the other half of this profile."""

import base64
import os

import pytest

from envelope.derive import object_key
from envelope.keys import KeyId, NetworkService
from envelope.objects import Opener, Sealer, sealed_length
from proxy import refusals
from proxy.messages.checksums import new_checksum
from proxy.plans.conversing import PartOf
from proxy.plans.plan import Reshaper
from proxy.profiles.s3.aws_chunked import AwsChunked
from proxy.profiles.s3.trailed import is_wanted, plan_trailed, trailed_length
from proxy.refusals import RefusedError
from tests.proxy.profiles.s3.s3_signer import head
from tests.proxy.profiles.s3.test_bodies import incoming

OWNER = NetworkService("acme", "s3")
KEY_ID = KeyId.random()
KEY = object_key(os.urandom(32), OWNER, KEY_ID)


def new_sealer(part: PartOf | None = None) -> Sealer:
    assert part is None
    return Sealer(KEY, OWNER, KEY_ID)


def reshaper(size: int, **fields: str) -> Reshaper:
    named = {"content-length": str(size), **{name.replace("_", "-"): value for name, value in fields.items()}}
    request = head("PUT", "/b/k", named)
    upload = incoming(fields=named)
    plan = plan_trailed(upload, request.fields, upload.edits)
    assert ("x-amz-decoded-content-length", str(sealed_length(size))) in plan.edits.put
    return plan.make(new_sealer)


@pytest.mark.parametrize("size", [0, 1, 16_383, 16_384, 100_000])
@pytest.mark.parametrize("step", [1000, 1 << 20])
def test_what_goes_up_is_the_object_and_its_checksum(size: int, step: int) -> None:
    plain = os.urandom(size)
    made = reshaper(size)
    sent = b"".join(made.feed(plain[at : at + step]) for at in range(0, size, step)) + made.finish()
    assert len(sent) == trailed_length(size) == made.out_bytes
    decoder = AwsChunked(
        decoded_bytes=sealed_length(size), announced=frozenset({"x-amz-checksum-crc32"}), key=None
    )
    stored = decoder.feed(sent) + decoder.finish()
    checksum = new_checksum("crc32")
    checksum.update(stored)
    assert base64.b64decode(decoder.trailers["x-amz-checksum-crc32"]) == checksum.digest()
    opener = Opener(OWNER, lambda _header: KEY)
    assert bytes(opener.update(stored)) + opener.finalize() == plain


@pytest.mark.parametrize("sent", [0, 9, 11])
def test_another_length_than_was_said_has_no_end(sent: int) -> None:
    made = reshaper(10)

    def send() -> None:
        made.feed(bytes(sent))
        made.finish()

    with pytest.raises(RefusedError) as caught:
        send()
    assert caught.value.refusal == refusals.BAD_LENGTH


def test_what_the_client_said_of_the_body_is_checked_first() -> None:
    made = reshaper(10, content_md5="A" * 22 + "==")
    made.feed(bytes(10))
    with pytest.raises(RefusedError) as caught:
        made.finish()
    assert caught.value.refusal == refusals.BAD_DIGEST


def test_when_it_is_wanted() -> None:
    locked = head("PUT", "/b/k", {"x-amz-object-lock-mode": "GOVERNANCE"}).fields
    plain = head("PUT", "/b/k", {}).fields
    assert is_wanted(locked, always=False)
    assert is_wanted(plain, always=True)
    assert not is_wanted(plain, always=False)


def test_codings_of_the_object_stay_behind_ours() -> None:
    fields = head(
        "PUT", "/b/k", {"content-encoding": "gzip, aws-chunked", "x-amz-decoded-content-length": "1"}
    )
    upload = incoming(fields={name: fields.fields.first(name) or "" for name in fields.fields})
    plan = plan_trailed(upload, fields.fields, upload.edits)
    assert dict(plan.edits.put)["content-encoding"] == "aws-chunked,gzip"

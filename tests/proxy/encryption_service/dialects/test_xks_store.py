import json
import time

import pytest

from envelope.errors import FormatError
from proxy.encryption_service.credentials import new_access_key
from proxy.encryption_service.dialects.xks_messages import Metadata
from proxy.encryption_service.dialects.xks_store import (
    MAX_PREFIX_LENGTH,
    admitting_rule,
    check_key_id,
    check_prefix,
    check_store,
    console_file,
    new_prefix,
    uri_path,
)
from proxy.encryption_service.model import XksRule, XksStore

ALICE = Metadata(
    aws_principal_arn="arn:aws:iam::123456789012:user/Alice",
    kms_operation="Encrypt",
    kms_request_id="1",
    kms_key_arn="arn:aws:kms:us-east-2:123456789012:key/1234",
    kms_via_service="s3.us-east-2.amazonaws.com",
    aws_source_vpc="vpc-1",
    aws_source_vpce="vpce-2",
)
NOBODY = Metadata(aws_principal_arn="", kms_operation="", kms_request_id="")


def test_a_new_prefix_cannot_be_guessed_and_fits() -> None:
    prefixes = {new_prefix() for _ in range(50)} | {new_prefix("acme") for _ in range(50)}
    assert len(prefixes) == 100
    for prefix in prefixes:
        check_prefix(prefix)
        assert len(prefix.rpartition("/")[2]) >= 24  # 144 bits
        assert len(uri_path(prefix)) <= 128
    assert new_prefix("tenants/acme").startswith("tenants/acme/")


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "a/../b",
        "a.b",
        "a b",
        "a%20b",
        "é",
        "a\n",
        "x" * (MAX_PREFIX_LENGTH + 1),
    ],
)
def test_a_prefix_is_what_aws_takes(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        check_prefix(prefix)


@pytest.mark.parametrize("key_id", ["", ".", "..", "a/b", "a b", "é", "a\n", "a%41", "x" * 129])
def test_a_key_id_is_what_aws_takes(key_id: str) -> None:
    with pytest.raises(ValueError, match="external key id"):
        check_key_id(key_id)


def test_the_longest_are_taken() -> None:
    check_prefix("x" * MAX_PREFIX_LENGTH)
    assert len(uri_path("x" * MAX_PREFIX_LENGTH)) == 128
    for key_id in ("x" * 128, "...", "a.b_c-D9", "-"):
        check_key_id(key_id)


def test_a_store_is_checked_as_a_whole() -> None:
    check_store(XksStore(prefix="p", keys={"k1": "orders", "k2": "salaries"}))
    for store in (
        XksStore(prefix="p/"),
        XksStore(prefix="p", keys={"..": "orders"}),
        XksStore(prefix="p", keys={"k1": "orders", "k2": "orders"}),  # AWS: each KMS key its own external key
        XksStore(prefix="p", rules=(XksRule(name="everybody"),)),
    ):
        with pytest.raises(ValueError, match=r"external key|prefix|rule"):
            check_store(store)


def test_the_console_file_is_what_the_console_reads() -> None:
    made = new_access_key()
    content = json.loads(console_file("tenants/9pXq", made.id, made.secret))
    assert content == {
        "XksProxyUriPath": "/tenants/9pXq/kms/xks/v1",
        "XksProxyAuthenticationCredential": {"AccessKeyId": made.id, "RawSecretAccessKey": made.secret},
    }
    with pytest.raises(FormatError) as caught:
        console_file("p", made.id, made.secret + "!")
    assert made.secret not in str(caught.value)
    with pytest.raises(ValueError, match="prefix"):
        console_file("p/..", made.id, made.secret)


# Secondary authorization.


@pytest.mark.parametrize(
    "rule",
    [
        XksRule(name="r", principal="arn:aws:iam::123456789012:user/Alice"),
        XksRule(name="r", principal="arn:aws:iam::*:user/Al?ce"),
        XksRule(name="r", kms_key="arn:aws:kms:us-east-2:*"),
        XksRule(name="r", via_service="s3.*"),
        XksRule(name="r", source_vpc="vpc-1"),
        XksRule(name="r", source_vpc="vpce-2"),
        XksRule(name="r", operation="*crypt"),
        XksRule(
            name="r", principal="*Alice", kms_key="*/1234", via_service="s3.*", source_vpc="*", operation="*"
        ),
    ],
)
def test_a_rule_admits_whom_it_names(rule: XksRule) -> None:
    assert admitting_rule((XksRule(name="other", principal="nobody"), rule), ALICE) is rule


@pytest.mark.parametrize(
    "rule",
    [
        XksRule(name="r", principal="arn:aws:iam::123456789012:user/alice"),  # case counts
        XksRule(name="r", principal="user/Alice"),  # the whole value, not a part of it
        XksRule(name="r", principal="arn:aws:iam::[0-9]*:user/Alice"),  # no character classes
        XksRule(name="r", principal="*", kms_key="arn:aws:kms:eu-west-1:*"),  # every pattern
        XksRule(name="r", operation="Decrypt"),
        XksRule(name="r", source_vpc="vpc-"),
    ],
)
def test_a_rule_admits_nobody_else(rule: XksRule) -> None:
    assert admitting_rule((rule,), ALICE) is None


@pytest.mark.parametrize("field", ["kms_key", "via_service", "source_vpc"])
def test_a_field_that_is_not_there_matches_nothing(field: str) -> None:
    rule = XksRule(name="r", **{field: "*"})
    assert admitting_rule((rule,), ALICE) is rule
    assert admitting_rule((rule,), NOBODY) is None


def test_a_hostile_principal_costs_no_time() -> None:
    rule = XksRule(name="r", principal="*a*a*a*a*a*a*a*a*b")
    hostile = Metadata(aws_principal_arn="a" * 2048, kms_operation="", kms_request_id="")
    began_s = time.process_time()
    assert admitting_rule((rule,), hostile) is None
    assert time.process_time() - began_s < 1  # backtracking would take longer than the universe has

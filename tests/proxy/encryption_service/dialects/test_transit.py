"""The transit dialect alone: who is served, what states make of a call, what is recorded."""

import base64
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from envelope.keys import KeyState, SigningAlgorithm
from proxy.encryption_service.call import Answer, Call, Peer
from proxy.encryption_service.dialects.dialect import Trouble
from proxy.encryption_service.dialects.transit import TransitDialect
from proxy.encryption_service.limits import Limits, Quota
from proxy.encryption_service.model import DialectName, Op, TransitMount, TransitSettings
from tests.proxy.encryption_service.echo import Client
from tests.proxy.encryption_service.service_rig import PEER, ServiceRig
from tests.proxy.encryption_service.serving import serving

HELLO = base64.b64encode(b"hello").decode()


class TransitRig:
    def __init__(self, directory: Path, *, limits: Limits | None = None, max_items: int = 1000) -> None:
        self.rig = ServiceRig(directory, limits=limits)
        self.rig.add_dialect(DialectName.TRANSIT)
        self.key = self.rig.add_key("orders")
        self.rig.push(self.key)
        self.token = self.rig.add_bearer(DialectName.TRANSIT)
        self.dialect = TransitDialect(
            core=self.rig.core,
            access=self.rig.access,
            limiter=self.rig.limiter,
            directory=lambda: self.rig.directory,
            clock=self.rig.clock,
            max_items=max_items,
        )

    def call(
        self,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        token: str | None = "",
        headers: tuple[tuple[str, str], ...] = (),
        query: str = "",
        peer: Peer = PEER,
    ) -> tuple[int, Any]:
        if token is not None:
            headers = (("x-vault-token", token or self.token), *headers)
        answer = self.dialect.handle(
            Call(
                method=method,
                path=path if path.startswith("/") else f"/v1/transit/{path}",
                query=query,
                headers=headers,
                body=b"" if body is None else json.dumps(body).encode(),
                peer=peer,
            )
        )
        assert isinstance(answer, Answer)
        assert answer.content_type == "application/json"
        assert answer.body.count(b"\n") <= 1, "an answer is one line"
        assert answer.body.endswith(b"\n") or not answer.body
        return answer.status, json.loads(answer.body) if answer.body else None

    def encrypt(self, **more: Any) -> str:
        status, answer = self.call("encrypt/orders", {"plaintext": HELLO, **more})
        assert status == 200, answer
        text = answer["data"]["ciphertext"]
        assert isinstance(text, str)
        return text

    def decrypt(self, ciphertext: str, key: str = "orders", **more: Any) -> tuple[int, Any]:
        status, answer = self.call(f"decrypt/{key}", {"ciphertext": ciphertext, **more})
        return status, answer["errors"] if status != 200 else answer["data"]["plaintext"]


@pytest.fixture
def transit(tmp_path: Path) -> Iterator[TransitRig]:
    rig = TransitRig(tmp_path)
    yield rig
    rig.rig.close()


DENIED = (403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]})
NOBODY = (403, {"errors": ["permission denied"]})
FAILED = (400, ["cipher: message authentication failed"])


# Ciphertexts.


def test_every_bit_and_every_cut_of_a_ciphertext_counts(transit: TransitRig) -> None:
    ciphertext = transit.encrypt()
    prefix, _, packed = ciphertext.rpartition(":")
    raw = base64.b64decode(packed)
    assert transit.decrypt(ciphertext) == (200, HELLO)
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        text = f"{prefix}:{base64.b64encode(changed).decode()}"
        assert transit.decrypt(text) == FAILED, bit
    for size in range(len(raw)):
        status, _ = transit.decrypt(f"{prefix}:{base64.b64encode(raw[:size]).decode()}")
        assert status == 400


def test_a_ciphertext_opens_under_its_key_version_context_and_data_alone(transit: TransitRig) -> None:
    context, other = base64.b64encode(b"a").decode(), base64.b64encode(b"b").decode()
    plain, bound = transit.encrypt(), transit.encrypt(associated_data=context)
    derived = transit.encrypt(context=context)
    assert transit.decrypt(derived, context=context) == (200, HELLO)
    assert transit.decrypt(bound, associated_data=context) == (200, HELLO)
    for text, more in (
        (plain, {"context": context}),
        (plain, {"associated_data": context}),
        (derived, {}),
        (derived, {"context": other}),
        (bound, {}),
        (bound, {"associated_data": other}),
        (bound, {"context": context}),
    ):
        assert transit.decrypt(text, **more) == FAILED
    second = transit.rig.add_key("second")
    transit.rig.push(second)
    assert transit.decrypt(plain, key="second") == FAILED
    transit.rig.push(transit.key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    assert transit.decrypt(plain.replace("v1", "v2")) == FAILED
    assert transit.decrypt(plain) == (200, HELLO)


def test_another_tenant_opens_nothing(transit: TransitRig) -> None:
    ciphertext = transit.encrypt()
    transit.rig.add_dialect(DialectName.TRANSIT, tenant="globex")
    transit.rig.push(transit.rig.add_key("orders", tenant="globex"))
    foreign = transit.rig.add_bearer(DialectName.TRANSIT, tenant="globex")
    status, answer = transit.call("decrypt/orders", {"ciphertext": ciphertext}, token=foreign)
    assert (status, answer["errors"]) == FAILED


def test_no_two_ciphertexts_are_the_same_and_a_data_key_is_what_its_ciphertext_holds(
    transit: TransitRig,
) -> None:
    assert transit.encrypt() != transit.encrypt()
    for bits in (128, 256, 512):
        _, answer = transit.call("datakey/plaintext/orders", {"bits": bits})
        assert len(base64.b64decode(answer["data"]["plaintext"])) * 8 == bits
        assert transit.decrypt(answer["data"]["ciphertext"]) == (200, answer["data"]["plaintext"])
        _, wrapped = transit.call("datakey/wrapped/orders", {"bits": bits})
        assert "plaintext" not in wrapped["data"]


def test_rewrap_brings_old_ciphertexts_to_the_newest_version(transit: TransitRig) -> None:
    data = base64.b64encode(b"bound").decode()
    old, bound = transit.encrypt(), transit.encrypt(associated_data=data)
    transit.rig.push(transit.key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    _, answer = transit.call("rewrap/orders", {"ciphertext": old})
    assert answer["data"]["key_version"] == 2
    assert answer["data"]["ciphertext"].startswith("vault:v2:")
    assert transit.decrypt(answer["data"]["ciphertext"]) == (200, HELLO)
    status, answer = transit.call("rewrap/orders", {"ciphertext": old, "key_version": 1})
    assert (status, answer["errors"]) == (
        400,
        ["requested version for encryption is less than the minimum encryption key version"],
    )
    status, answer = transit.call(
        "rewrap/orders",
        {"batch_input": [{"ciphertext": bound, "associated_data": data}, {"ciphertext": bound}]},
    )
    first, second = answer["data"]["batch_results"]
    assert status == 200
    assert transit.decrypt(first["ciphertext"], associated_data=data) == (200, HELLO)
    assert second["error"] == FAILED[1][0]


def test_32_mib_go_through_and_more_is_refused(transit: TransitRig) -> None:
    plaintext = base64.b64encode(os.urandom(23 << 20)).decode()
    _, answer = transit.call("encrypt/orders", {"plaintext": plaintext})
    assert transit.decrypt(answer["data"]["ciphertext"]) == (200, plaintext)
    assert transit.dialect.max_body_bytes == 32 << 20
    refusal = transit.dialect.refuse(Trouble.TOO_LARGE, None)
    assert (refusal.status, refusal.body) == (413, b'{"errors":["http: request body too large"]}\n')


@pytest.mark.parametrize("trouble", Trouble)
def test_what_the_http_layer_refuses_has_the_dialects_shape(transit: TransitRig, trouble: Trouble) -> None:
    answer = transit.dialect.refuse(trouble, None)
    assert answer.status >= 400
    assert list(json.loads(answer.body)) == ["errors"]
    assert answer.content_type == "application/json"


# Who.


def test_a_token_is_for_its_keys_operations_mount_and_network(transit: TransitRig) -> None:
    transit.rig.push(transit.rig.add_key("second"))
    transit.rig.add_dialect(
        DialectName.TRANSIT, TransitSettings(mounts=(TransitMount(), TransitMount(mount="acme/kms")))
    )
    narrow = transit.rig.add_bearer(
        DialectName.TRANSIT,
        keys=frozenset({"orders"}),
        operations=frozenset({Op.ENCRYPT}),
        endpoint="acme/kms",
        networks=("10.0.0.0/8",),
    )
    near = Peer(address="10.1.2.3")
    body = {"plaintext": HELLO}
    own = "/v1/acme/kms/encrypt/orders"
    assert transit.call(own, body, token=narrow, peer=near)[0] == 200
    assert transit.call(own, body, token=narrow) == NOBODY
    assert transit.call("encrypt/orders", body, token=narrow, peer=near) == DENIED
    assert transit.call("/v1/acme/kms/encrypt/second", body, token=narrow, peer=near) == DENIED
    assert transit.call("/v1/acme/kms/encrypt/none", body, token=narrow, peer=near) == DENIED
    assert transit.call("/v1/acme/kms/decrypt/orders", {"ciphertext": "x"}, token=narrow, peer=near) == DENIED
    assert transit.call("/v1/acme/kms/keys/second", method="GET", token=narrow, peer=near) == DENIED
    assert transit.call("/v1/acme/kms/keys/none", method="GET", token=narrow, peer=near) == DENIED
    _, listed = transit.call("/v1/acme/kms/keys", method="LIST", token=narrow, peer=near)
    assert listed["data"]["keys"] == ["orders"]
    _, every = transit.call("keys", method="LIST")
    assert every["data"]["keys"] == ["orders", "second"]


def test_a_token_ends_with_its_revocation_its_time_and_the_dialect(transit: TransitRig) -> None:
    now_s = transit.rig.clock.wall_s()
    short = transit.rig.add_bearer(DialectName.TRANSIT, not_after_s=now_s)
    other_dialect = transit.rig.add_bearer(DialectName.NATIVE)
    body = {"plaintext": HELLO}
    for token in (short, other_dialect, "sgt.x.y", "x" * 10_000, "\udc80", transit.token[:-1]):
        assert transit.call("encrypt/orders", body, token=token) == NOBODY
    for headers in ((), (("authorization", "Bearer"),), (("authorization", f"Basic {transit.token}"),)):
        assert transit.call("encrypt/orders", body, token=None, headers=headers) == NOBODY
    bearer = (("authorization", f"bearer {transit.token}"),)
    assert transit.call("encrypt/orders", body, token=None, headers=bearer)[0] == 200
    transit.rig.revoke(transit.token.split(".")[1])
    assert transit.call("encrypt/orders", body) == NOBODY


def test_a_header_that_stands_twice_is_refused(transit: TransitRig) -> None:
    twice = (("x-vault-token", transit.token),)
    status, answer = transit.call("encrypt/orders", {"plaintext": HELLO}, headers=twice)
    assert (status, answer) == (400, {"errors": ["the header x-vault-token stands twice"]})


def test_namespace_and_mount_agree_with_the_token(transit: TransitRig) -> None:
    body = {"plaintext": HELLO}

    def status(path: str, namespace: str | None = None) -> int:
        headers = () if namespace is None else (("x-vault-namespace", namespace),)
        return transit.call(path, body, headers=headers)[0]

    assert status("encrypt/orders", "acme") == status("encrypt/orders", "acme/") == 200
    assert status("encrypt/orders", "globex") == 404
    mounts = (TransitMount(mount="kms", namespace="emea"),)
    transit.rig.add_dialect(DialectName.TRANSIT, TransitSettings(mounts=mounts))
    assert status("encrypt/orders") == 404
    assert status("/v1/kms/encrypt/orders") == 200
    assert status("/v1/kms/encrypt/orders", "emea") == 200
    assert status("/v1/emea/kms/encrypt/orders") == 200
    assert status("/v1/kms/encrypt/orders", "acme") == 404
    assert status("/v1/acme/kms/encrypt/orders") == 404
    two = (*mounts, TransitMount(mount="kms", namespace="apac"))
    transit.rig.add_dialect(DialectName.TRANSIT, TransitSettings(mounts=two))
    assert status("/v1/kms/encrypt/orders", "emea") == status("/v1/kms/encrypt/orders", "apac") == 200
    assert status("/v1/kms/encrypt/orders", "acme") == 404


async def test_strangers_learn_nothing_and_do_not_fill_the_log(transit: TransitRig) -> None:
    for path in (
        "encrypt/orders",
        "keys/orders",
        "nosuch/x",
        "/v1/nomount/encrypt/x",
        "/v1/auth/token/create",
    ):
        assert transit.call(path, {"plaintext": 5}, token="wrong") == NOBODY
    for _ in range(1000):
        transit.call("encrypt/orders", token="wrong")
    records = transit.rig.records()
    assert len(records) == 100
    assert {record["error"] for record in records} == {"not-authenticated"}
    await transit.rig.clock.advance(1)
    transit.call("encrypt/orders", token="wrong")
    assert transit.rig.records()[-1]["items"] == 1 + 1005 - 100


def test_quota_is_answered_in_the_dialects_way(tmp_path: Path) -> None:
    quota = Quota(requests_per_s=10, burst=10)
    transit = TransitRig(tmp_path, limits=Limits(tenant=quota, credential=quota))
    batch = {"batch_input": [{"plaintext": HELLO}] * 10}
    assert transit.call("encrypt/orders", {"plaintext": HELLO})[0] == 200
    answer = transit.dialect.handle(
        Call(
            method="POST",
            path="/v1/transit/encrypt/orders",
            headers=(("x-vault-token", transit.token),),
            body=json.dumps(batch).encode(),
            peer=PEER,
        )
    )
    assert answer.status == 429
    assert int(dict(answer.headers)["retry-after"]) >= 1
    assert "rate limit" in json.loads(answer.body)["errors"][0]
    transit.rig.close()


# States.

SEALED = (503, {"errors": ["Vault is sealed"]})
SOFT = (400, ["refusing to use soft-deleted key"])
TOO_OLD = (400, ["ciphertext or signature version is disallowed by policy (too old)"])
TOO_LOW = (400, ["requested version for encryption is less than the minimum encryption key version"])
NO_KEY = (400, ["encryption key not found"])


@pytest.mark.parametrize(
    ("states", "encrypts", "decrypts"),
    [
        ((KeyState.ACTIVE,), (200, None), (200, HELLO)),
        ((KeyState.DEACTIVATED,), TOO_LOW, (200, HELLO)),
        ((KeyState.SUSPENDED,), SOFT, SOFT),
        ((KeyState.COMPROMISED,), SOFT, SOFT),
        ((KeyState.DEACTIVATED, KeyState.ACTIVE), (200, None), (200, HELLO)),
        ((KeyState.SUSPENDED, KeyState.ACTIVE), (200, None), SOFT),
        ((KeyState.COMPROMISED, KeyState.ACTIVE), (200, None), SOFT),
        ((KeyState.DESTROYED, KeyState.ACTIVE), (200, None), TOO_OLD),
        ((KeyState.DESTROYED,), NO_KEY, NO_KEY),
    ],
    ids=str,
)
def test_the_state_of_a_key_decides(
    transit: TransitRig, states: tuple[KeyState, ...], encrypts: Any, decrypts: Any
) -> None:
    ciphertext = transit.encrypt()
    transit.rig.push(transit.key, *states)
    status, answer = transit.call("encrypt/orders", {"plaintext": HELLO})
    assert (status, answer.get("errors")) == encrypts
    assert transit.decrypt(ciphertext) == decrypts
    status, answer = transit.call("decrypt/orders", {"batch_input": [{"ciphertext": ciphertext}]})
    if decrypts[0] == 200:
        assert answer["data"]["batch_results"] == [{"plaintext": HELLO, "reference": ""}]
    elif "data" in answer:
        assert answer["data"]["batch_results"][0]["error"] == decrypts[1][0]
    assert transit.decrypt(ciphertext.replace("v1", "v9"))[0] == 400


def test_a_blocked_key_is_soft_deleted_and_the_tenant_stays_well(transit: TransitRig) -> None:
    ciphertext = transit.encrypt()
    transit.rig.add_key("orders", blocked=True)
    assert transit.decrypt(ciphertext) == SOFT
    _, described = transit.call("keys/orders", method="GET")
    assert described["data"]["soft_deleted"] is True
    assert transit.call("/v1/sys/health", method="GET")[0] == 200


def test_a_tenant_that_withdrew_its_keys_is_a_sealed_vault(transit: TransitRig) -> None:
    ciphertext = transit.encrypt()
    transit.rig.withdraw(transit.key)
    assert transit.call("encrypt/orders", {"plaintext": HELLO}) == SEALED
    assert transit.call("decrypt/orders", {"ciphertext": ciphertext}) == SEALED
    assert transit.call("decrypt/orders", {"batch_input": [{"ciphertext": ciphertext}]}) == SEALED
    assert transit.call("rewrap/orders", {"ciphertext": ciphertext}) == SEALED
    assert transit.call("datakey/plaintext/orders", {}) == SEALED
    assert transit.call("keys/orders", method="GET") == SEALED
    for token in (transit.token, None):
        status, health = transit.call("/v1/sys/health", method="GET", token=token)
        assert (status, health["sealed"]) == (503, True)
        status, health = transit.call("/v1/sys/health", method="GET", token=token, query="sealedcode=299")
        assert (status, health["sealed"]) == (299, True)
        assert transit.call("/v1/sys/seal-status", method="GET", token=token)[1]["sealed"] is True
    assert transit.call("/v1/sys/health", method="HEAD") == (503, None)
    transit.rig.push(transit.key)
    assert transit.decrypt(ciphertext) == (200, HELLO)
    assert transit.call("/v1/sys/health", method="GET")[0] == 200


async def test_a_silent_agent_is_503_until_it_speaks_again(transit: TransitRig) -> None:
    ciphertext = transit.encrypt()
    await transit.rig.clock.advance(331)
    for path, body in (("encrypt", {"plaintext": HELLO}), ("decrypt", {"ciphertext": ciphertext})):
        status, answer = transit.call(f"{path}/orders", body)
        assert status == 503
        assert "retry" in answer["errors"][0]
    assert transit.call("keys/orders", method="GET")[0] == 503
    assert transit.call("/v1/sys/health", method="GET")[0] == 503
    transit.rig.push(transit.key)
    assert transit.decrypt(ciphertext) == (200, HELLO)


def test_health_without_token_speaks_of_the_process_where_there_are_several_tenants(
    transit: TransitRig,
) -> None:
    transit.rig.add_dialect(DialectName.TRANSIT, tenant="globex")
    transit.rig.withdraw(transit.key)
    assert transit.call("/v1/sys/health", method="GET", token=None)[0] == 200
    assert transit.call("/v1/sys/health", method="GET", token="wrong")[0] == 200
    assert transit.call("/v1/sys/health", method="GET")[0] == 503


def test_a_key_is_for_what_its_tenant_allows(transit: TransitRig) -> None:
    ciphertext = transit.encrypt()
    transit.rig.add_key("orders", operations=frozenset({Op.ENCRYPT}))
    status, answer = transit.call("decrypt/orders", {"ciphertext": ciphertext})
    assert (status, answer["errors"][0]) == (403, DENIED[1]["errors"][0])
    assert transit.call("encrypt/orders", {"plaintext": HELLO})[0] == 200
    _, described = transit.call("keys/orders", method="GET")
    assert described["data"]["supports_decryption"] is False


# Records.


def test_each_call_leaves_one_record_without_secrets(transit: TransitRig) -> None:
    transit.rig.push(transit.rig.add_key("ec", algorithm=SigningAlgorithm.ES256))
    ciphertext = transit.encrypt(context=base64.b64encode(b"context").decode())
    transit.decrypt(ciphertext)
    transit.call("encrypt/orders", {"batch_input": [{"plaintext": HELLO}, {"plaintext": "!"}]})
    transit.call("sign/ec", {"input": HELLO})
    transit.call("encrypt/none", {"plaintext": HELLO})
    transit.call("encrypt/orders", {"plaintext": "!"})
    transit.call("keys", method="LIST")
    transit.call("keys/orders/rotate", {})
    records = transit.rig.records()
    seen = [(record["operation"], record["outcome"], record.get("error", "")) for record in records]
    assert seen == [
        ("encrypt", "ok", ""),
        ("decrypt", "refused", "does-not-verify"),
        ("encrypt", "ok", ""),
        ("sign", "ok", ""),
        ("encrypt", "refused", "key-not-found"),
        ("encrypt", "refused", "malformed"),
        ("list-keys", "ok", ""),
        ("rotate-key", "refused", "http-403"),
    ]
    first, batch = records[0], records[2]
    assert first["tenant"] == "acme"
    assert first["key"] == "orders"
    assert first["version"] == 1
    assert first["key_id"] == str(transit.rig.key_id(transit.key))
    assert first["credential"] == transit.token.split(".")[1]
    assert re.fullmatch(r"[0-9a-f-]{36}", str(first["request_id"]))
    assert batch["items"] == 2
    log = transit.rig.audit_file.read_text()
    for secret in (HELLO, "hello", transit.token, ciphertext, 'context"'):
        assert secret not in log


def test_the_answer_names_the_request_of_the_record(transit: TransitRig) -> None:
    _, answer = transit.call("encrypt/orders", {"plaintext": HELLO})
    assert transit.rig.records()[-1]["request_id"] == answer["request_id"]


def test_without_a_record_there_is_no_answer(transit: TransitRig) -> None:
    ciphertext = transit.encrypt()
    transit.rig.audit_file.rename(transit.rig.audit_file.with_suffix(".moved"))
    for path, body in (
        ("encrypt/orders", {"plaintext": HELLO}),
        ("decrypt/orders", {"ciphertext": ciphertext}),
        ("encrypt/orders", {"plaintext": "!"}),
        ("encrypt/none", {"plaintext": HELLO}),
        ("decrypt/orders", {"batch_input": [{"ciphertext": ciphertext}]}),
        ("datakey/plaintext/orders", {}),
    ):
        status, answer = transit.call(path, body)
        assert (status, list(answer)) == (500, ["errors"])
        assert HELLO not in json.dumps(answer)


def test_what_ends_while_a_batch_runs_is_not_answered(
    transit: TransitRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    ciphertext = transit.encrypt()
    decrypt = transit.rig.core.decrypt

    def withdrawn_meanwhile(*args: Any, **kwargs: Any) -> bytes:
        plaintext = decrypt(*args, **kwargs)
        transit.rig.withdraw(transit.key)
        return plaintext

    monkeypatch.setattr(transit.rig.core, "decrypt", withdrawn_meanwhile)
    assert transit.call("decrypt/orders", {"ciphertext": ciphertext}) == SEALED
    assert transit.rig.records()[-1]["error"] == "revoked"


def test_hostile_names_are_recorded_cut_and_refused(transit: TransitRig) -> None:
    for path in (
        "encrypt/%0a%1b[31m",
        "encrypt/" + "x" * 5000,
        "encrypt/%ff%fe",
        "encrypt/..",
        "encrypt/%2e%2e",
    ):
        status, answer = transit.call(path, {"plaintext": HELLO})
        assert status in {400, 404}
        assert len(json.dumps(answer)) < 2000
    assert all(len(line) < 20_000 for line in transit.rig.audit_file.read_text().splitlines())


WORDS = [
    *("transit", "encrypt", "keys", "orders", "sys", "health", "auth", "token", "lookup-self", "datakey"),
    *("plaintext", "sign", "verify", "ed", "acme", "..", "%2e", "%2F", "%ff", "%u", "x%20y"),
]
PATHS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from([*WORDS, "", "\udcff"]), max_size=6).map("/".join),
)
CALLS = st.builds(
    Call,
    method=st.sampled_from(["GET", "LIST", "POST", "PUT", "DELETE", "HEAD", "PATCH", "x", "\udc80"]),
    path=PATHS.map("/v1/{}".format),
    query=st.text(max_size=30),
    headers=st.lists(
        st.tuples(
            st.sampled_from(["x-vault-token", "authorization", "x-vault-namespace", "x-vault-wrap-ttl", "x"]),
            st.one_of(st.text(max_size=20), st.just("TOKEN"), st.just("Bearer TOKEN")),
        ),
        max_size=4,
    ).map(tuple),
    body=st.binary(max_size=40),
    peer=st.just(PEER),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=CALLS, is_known=st.booleans())
def test_whatever_comes_is_answered_in_shape(transit: TransitRig, call: Call, is_known: bool) -> None:
    sent = tuple((name, value.replace("TOKEN", transit.token)) for name, value in call.headers)
    if is_known and "x-vault-token" not in dict(sent):
        sent = (("x-vault-token", transit.token), *sent)
    answer = transit.dialect.handle(replace(call, headers=sent))
    assert answer.body.count(b"\n") <= 1
    if answer.body:
        assert isinstance(json.loads(answer.body), dict)
    assert answer.status != 500


async def test_nothing_of_a_strangers_body_is_read(transit: TransitRig) -> None:
    """Of 32 MiB a part has come: who is not known is told so by then, who is known is waited for."""

    def part(path: str, token: str, headers: str = "Expect: 100-continue\r\n") -> bytes:
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nX-Vault-Token: {token}\r\n{headers}"
        return f"{head}Content-Length: {32 << 20}\r\n\r\n".encode()

    async with serving([transit.dialect]) as url:
        port = int(url.rpartition(":")[2])
        try:
            for begun, status in (
                (part("transit/encrypt/orders", "wrong"), 403),
                (part("transit/encrypt/orders", "wrong", "") + bytes(1000), 403),
                (part("transit/encrypt/orders", "a\r\nX-Vault-Token: b"), 400),
                (part("transit/encrypt/orders", transit.token), 100),
            ):
                client = await Client.connect(port)
                await client.send(begun)
                assert (await client.reply()).status == status
        finally:
            Client.close_all()

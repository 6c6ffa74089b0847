"""Whose signature goes up: gateway keys, buckets in host names, and keys that the vault does not have."""

import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

from envelope.keys import NetworkService
from envelope.objects import MAGIC
from proxy.messages.message import RequestHead
from proxy.tenants.credential_store import rotate_file_key
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Upstream
from proxy.tenants.network_service_store import add_service
from proxy.tenants.tenant_store import add_tenant
from proxy.tenants.vault_store import add_credential
from proxy.vault.model import Secrets
from runtime.clock import SystemClock
from tests import pki
from tests.integration.proxy_rig import Answer, curl
from tests.integration.s3_rig import VIAS, Site, body, content, s3_site
from tests.proxy.profiles.s3 import s3_signer
from tests.referees.moto import moto
from tests.referees.swift import swift

BUCKET = {"Bucket": "bucket-1"}
PLAIN = body(40_000, 3)


async def test_gateway_keys_and_buckets_in_host_names(tmp_path: Path) -> None:
    """Clients have a key that is good here alone; the service's own never leaves the vault."""

    # The vault as it is in use: in the directory's database, sealed by a file key.
    state = tmp_path / "state"
    store = DirectoryStore.open(f"sqlite:///{state / 'directory.db'}", state, clock=SystemClock())
    owner = NetworkService("acme", "s3")

    def vault(referee: Any) -> Any:
        add_tenant(store, "acme", pki.make_tenant("acme").root.certificate, actor="test")
        add_service(store, owner, Upstream.parse(referee.url), profile="s3", actor="test")
        secrets = Secrets(client_secret=s3_signer.SECRET, upstream_secret=referee.secret_key)
        add_credential(store, owner, "GATEWAY", secrets, actor="test", upstream_access_key=referee.access_key)
        return store.snapshot().services[owner].credentials

    calls = [
        ["put_object", {**BUCKET, "Key": "a/b c", "Body": {"bytes": 40_000, "seed": 3}}],
        ["get_object", {**BUCKET, "Key": "a/b c", "Range": "bytes=10000-29999"}],
        ["list_objects_v2", BUCKET],
        ["delete_objects", {**BUCKET, "Delete": {"Objects": [{"Key": "none"}]}}],
    ]
    start = partial(swift, storage_domain="localhost")
    options = {"hosts": ["s3.test"]}
    async with s3_site(tmp_path, start, credentials=vault, options=options) as site:
        ask = partial(site.calls, access_key="GATEWAY", secret_key=s3_signer.SECRET)
        (made,) = await ask([["create_bucket", BUCKET]], via="forward")
        assert made["status"] == 200
        for via, style in (("forward", "path"), ("reverse", "path"), ("forward", "virtual")):
            answers = await ask(calls, via=via, style=style)
            statuses = [answer["status"] for answer in answers]
            assert statuses == [200, 206, 200, 200], (via, style, answers)
            span = hashlib.sha256(PLAIN[10_000:30_000]).hexdigest()
            assert answers[1]["answer"]["Body"] == {"bytes": 20_000, "sha256": span}
            assert [item["Size"] for item in answers[2]["answer"]["Contents"]] == [40_000]
        # What the running proxy has read stays good until it reads the directory again.
        assert rotate_file_key(store, actor="test") == 1
        (again,) = await ask([["head_bucket", BUCKET]], via="forward")
        assert again["status"] == 200
        store.close()
        direct = await ask([["list_buckets", {}]])
        assert direct[0]["status"] == 403, "the gateway's key is nothing to the service"
        ((_, stored),) = await site.stored()
        assert site.open(stored) == PLAIN

        # Reverse, with the bucket before a name of this proxy.
        assert site.service.reverse_listen is not None
        port = site.service.reverse_listen.port
        host = f"bucket-1.s3.test:{port}"
        request = s3_signer.sign("GET", "/a/b%20c", now_s=time.time(), host=host, access_key="GATEWAY")
        ca = str(site.rig.tenants["acme"].interception_ca.certificate_file)
        own = [f"{name}: {request.fields.first(name)}" for name in request.fields if name != "host"]
        arguments = [part for field in own for part in ("-H", field)]
        for version in ("--http1.1", "--http2"):
            answer = await curl(
                version, "--cacert", ca, "--connect-to", f"{host}:127.0.0.1:{port}", *arguments,
                f"https://{host}/a/b%20c",
            )  # fmt: skip
            assert (answer.status, answer.body) == (200, PLAIN), answer


async def send(
    site: Site, request: RequestHead, *fields: str, mode: str, sent: bytes | None = None
) -> Answer:
    own = [f"{name}: {request.fields.first(name)}" for name in request.fields if name != "host"]
    arguments = ["--http1.1", "-X", request.method]
    for field in (*own, *fields, "Expect:", "Content-Type: application/octet-stream"):
        arguments += ["-H", field]
    if sent is not None:
        arguments += ["--data-binary", "@-"]
    return await site.rig.ask(site.service, request.target, *arguments, mode=mode, body=sent)


async def test_access_keys_that_the_vault_does_not_have(tmp_path: Path) -> None:
    """What stays as it was signed passes, for the service to judge; the rest is refused, never sent."""
    async with s3_site(tmp_path, swift, credentials=lambda _referee: {}) as site:
        key = {**BUCKET, "Key": "k"}

        def sign(method: str, target: str, **more: Any) -> RequestHead:
            host = f"localhost:{site.referee.port}"
            keys = {"access_key": site.referee.access_key, "secret": site.referee.secret_key}
            return s3_signer.sign(method, target, now_s=time.time(), host=host, **{**keys, **more})

        def presign(method: str, target: str) -> RequestHead:
            host = f"localhost:{site.referee.port}"
            return s3_signer.presign(
                method, target, now_s=time.time(), host=host, secret=site.referee.secret_key
            )

        made = await site.calls([["create_bucket", BUCKET]], via="forward")
        assert made[0]["status"] == 200
        # boto3 signs the length of what it sends, chunk by chunk: that cannot be changed.
        (put,) = await site.calls([["put_object", {**key, "Body": "x"}]], via="forward")
        assert (put["status"], put["headers"]["sealgate-error"]) == (403, "cannot-sign-anew")
        hashed = sign("PUT", "/bucket-1/k", body_hash=hashlib.sha256(PLAIN).hexdigest())
        answer = await send(site, hashed, mode="forward", sent=PLAIN)
        assert (answer.status, answer.code) == (403, "cannot-sign-anew")
        assert await site.stored() == []
        # Nothing of the body is signed: it can be sealed.
        for request in (
            sign("PUT", "/bucket-1/k", body_hash="UNSIGNED-PAYLOAD"),
            presign("PUT", "/bucket-1/p"),
        ):
            answer = await send(site, request, mode="forward", sent=PLAIN)
            assert answer.status == 200, answer
        assert {site.open(stored) for _, stored in await site.stored()} == {PLAIN}
        assert all(stored.startswith(MAGIC) for _, stored in await site.stored())
        reads = await site.calls(
            [
                ["get_object", key],
                ["head_object", key],
                ["list_objects_v2", BUCKET],
                ["get_object", {**key, "Range": "bytes=0-9"}],
                ["delete_objects", {**BUCKET, "Delete": {"Objects": [{"Key": "p"}]}}],
                ["list_objects_v2", BUCKET],
            ],
            via="forward",
        )
        assert [read["status"] for read in reads] == [200, 200, 200, 403, 200, 200]
        assert reads[0]["answer"]["Body"] == content(40_000, 3)
        assert reads[1]["answer"]["ContentLength"] == 40_000
        assert [item["Size"] for item in reads[2]["answer"]["Contents"]] == [40_000, 40_000]
        assert reads[3]["headers"]["sealgate-error"] == "cannot-sign-anew"
        assert [item["Key"] for item in reads[5]["answer"]["Contents"]] == ["k"]
        # A presigned URL signs no range.
        part = await send(site, presign("GET", "/bucket-1/k"), "Range: bytes=100-199", mode="forward")
        assert (part.status, part.body) == (206, PLAIN[100:200])
        # Who signs wrongly is the service's to refuse; who signs for another host is ours.
        wrong = sign("GET", "/bucket-1/k", secret="wrong-secret-altogether")
        assert (await send(site, wrong, mode="forward")).status == 403
        answer = await send(site, sign("GET", "/bucket-1/k"), mode="reverse")
        assert (answer.status, answer.code) == (403, "cannot-sign-anew")


async def test_nobody_in_particular(tmp_path: Path) -> None:
    """Requests without a signature are the service's to judge, or are refused by option."""
    for option, code in (("allow", None), ("refuse", "request-not-signed")):
        directory = tmp_path / option
        directory.mkdir()
        async with s3_site(directory, moto, options={"anonymous": option}) as site:
            for via in VIAS:
                answer = await site.rig.ask(site.service, "/bucket-1/k", "--http1.1", mode=via)
                assert 400 <= answer.status < 405
                assert answer.code == code

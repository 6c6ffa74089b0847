"""Azure Blob through the proxy: what is refused, who is let in, and states of stored blobs."""

import base64
import hmac
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from envelope.keys import KeyState
from tests.integration.azure_site import Site, Way, program, site
from tests.integration.proxy_rig import Answer
from tests.referees.comparison import Plaintexts

BLOCK_BLOB = {"x-ms-blob-type": "BlockBlob"}
PLAIN = os.urandom(40_000)


def account_token(way: Way) -> str:
    """An account SAS (Azure Storage REST reference, "Create an account SAS"), version 2020-12-06."""
    ends = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    parts = [way.account, "rwdlac", "b", "sco", "", ends, "", "https", "2020-12-06", "", ""]
    made = hmac.digest(base64.b64decode(way.token_key), "\n".join(parts).encode(), "sha256")
    query = {
        "sv": parts[8], "ss": parts[2], "srt": parts[3], "sp": parts[1], "se": ends, "spr": "https",
        "sig": base64.b64encode(made).decode(),
    }  # fmt: skip
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())


def is_azures(answer: Answer, code: str) -> bool:
    """Whether a refusal has Azure's shape and our code."""
    named = answer.headers["x-ms-error-code"].encode()
    return (
        answer.code == code
        and answer.headers["content-type"] == "application/xml"
        and answer.body.startswith(
            b'<?xml version="1.0" encoding="utf-8"?><Error><Code>' + named + b"</Code>"
        )
    )


async def test_what_is_refused_reaches_nobody(tmp_path: Path) -> None:
    async with site(tmp_path) as place:
        way, direct = place.ways["forward"], place.ways["direct"]
        await way.ask("PUT", "/box?restype=container")
        elsewhere = {"x-ms-copy-source": "https://other.blob.core.windows.net/box/a"}
        here = {"x-ms-copy-source": f"{way.url}/box/a"}
        batch = {"content-type": "multipart/mixed; boundary=x"}
        for method, path, fields, code in (
            ("PUT", "/box/p", {"x-ms-blob-type": "PageBlob"}, "unknown-route"),
            ("PUT", "/box/p?comp=page", {"x-ms-page-write": "update"}, "unknown-route"),
            ("PUT", "/box/p?comp=appendblock", {}, "unknown-route"),
            ("PUT", "/box/p", {}, "unknown-route"),
            ("PUT", "/box/p", {**BLOCK_BLOB, "x-ms-structured-body": "XSM/1.0"}, "unknown-route"),
            ("PUT", "/box/p?comp=block&blockid=QQ", {}, "block-id"),
            ("PUT", "/box/p?comp=anything", {}, "unknown-route"),
            ("PUT", "/box/p?comp=tags", {}, "malformed-document"),
            ("PUT", "/box?restype=container&comp=acl", {}, "malformed-document"),
            ("POST", "/box/p?comp=query", {}, "unknown-route"),
            ("POST", "/?comp=batch", batch, "unknown-route"),
            ("POST", "/box?restype=container&comp=batch", batch, "unknown-route"),
            ("PATCH", "/box/p", {}, "unknown-route"),
            ("PUT", "/box/p?comp=metadata", {}, "unknown-route"),
            (
                "PUT",
                "/box/p",
                {**BLOCK_BLOB, "x-ms-date": "Thu, 01 Jan 2026 00:00:00 GMT"},
                "request-time-skewed",
            ),
        ):
            answer = await way.ask(method, path, fields, PLAIN)
            assert is_azures(answer, code), (method, path, answer)
        for path, fields, code in (
            ("/box/p", elsewhere, "copy-source"),
            ("/box/p", {**BLOCK_BLOB, **here}, "unknown-route"),
            ("/box/p?comp=block&blockid=QQ%3D%3D", here, "unknown-route"),
        ):
            assert is_azures(await way.ask("PUT", path, fields), code)
        for scheme in ("SharedKeyLite", "SharedKey"):
            wrong = {"authorization": f"{scheme} {way.account}:{base64.b64encode(bytes(32)).decode()}"}
            answer = await way.ask(
                "PUT", "/box/p", {**BLOCK_BLOB, **wrong, "x-ms-date": _now()}, PLAIN, token=True
            )
            assert is_azures(answer, "shared-key-lite" if scheme == "SharedKeyLite" else "signature-mismatch")
        stored = b"".join(content for _, content in place.server.stored())
        assert not Plaintexts([PLAIN]).leak_into(stored)
        listed = await direct.ask("GET", "/box?restype=container&comp=list&include=uncommittedblobs")
        assert b"<Blob>" not in listed.body


def _now() -> str:
    return datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")


async def test_who_is_let_in_without_a_key_in_the_vault(tmp_path: Path) -> None:
    """Tokens do all; a key nobody has told us of what need not be changed."""
    async with site(tmp_path, in_vault=False) as place:
        way = place.ways["reverse"]
        token = account_token(way)

        async def by_token(method: str, path: str, body: bytes | None = None, **fields: str) -> Answer:
            named = {name.replace("_", "-"): value for name, value in fields.items()}
            mark = "&" if "?" in path else "?"
            return await way.ask(method, f"{path}{mark}{token}", named, body, token=True)

        assert (await by_token("PUT", "/box?restype=container")).status == 201
        assert (await by_token("PUT", "/box/b", PLAIN, x_ms_blob_type="BlockBlob")).status == 201
        assert (await by_token("PUT", "/box/l?comp=block&blockid=QQ%3D%3D", PLAIN)).status == 201
        listed = b"<BlockList><Latest>QQ==</Latest></BlockList>"
        assert (await by_token("PUT", "/box/l?comp=blocklist", listed)).status == 201
        for name in ("b", "l"):
            assert (await by_token("GET", f"/box/{name}")).body == PLAIN
            part = await by_token("GET", f"/box/{name}", range="bytes=17000-39999")
            assert (part.status, part.body) == (206, PLAIN[17_000:])
        assert (await by_token("GET", "/box?restype=container&comp=list")).body.count(b">40000<") == 2
        # Signed with the account's key, which Azurite knows and the vault does not.
        assert (await way.ask("GET", "/box/b")).body == PLAIN
        assert (await way.ask("GET", "/box?restype=container")).status == 200
        assert (await way.ask("DELETE", "/box/missing")).status == 404
        for method, path, fields, body in (
            ("PUT", "/box/x", BLOCK_BLOB, PLAIN),
            ("GET", "/box/b", {"x-ms-range": "bytes=0-5"}, None),
            ("PUT", "/box/x?comp=blocklist", {}, listed),
        ):
            answer = await way.ask(method, path, fields, body)
            assert is_azures(answer, "cannot-sign-anew"), path


async def test_nobody_without_a_key(tmp_path: Path) -> None:
    options = {"unknown_keys": "refuse", "anonymous": "refuse"}
    async with site(tmp_path, in_vault=False, options=options) as place:
        way = place.ways["forward"]
        assert is_azures(await way.ask("GET", "/box/b"), "access-key-unknown")
        assert is_azures(await way.ask("GET", "/box/b", token=True), "request-not-signed")


async def test_states_of_stored_blobs(tmp_path: Path) -> None:
    account = "refereeaccount"
    legacy = {f"/{account}/old": "migrate", f"/{account}/asis": "passthrough"}
    async with site(tmp_path, options={"legacy": legacy}) as place:
        way, direct = place.ways["forward"], place.ways["direct"]
        for box in ("box", "old", "asis"):
            await way.ask("PUT", f"/{box}?restype=container")
            for name, body in (("plain", PLAIN), ("empty", b""), ("short", b"short")):
                await direct.ask("PUT", f"/{box}/{name}", BLOCK_BLOB, body)
            await direct.ask("PUT", f"/{box}/blocks?comp=block&blockid=QQ%3D%3D", {}, PLAIN)
            listed = b"<BlockList><Latest>QQ==</Latest></BlockList>"
            await direct.ask("PUT", f"/{box}/blocks?comp=blocklist", {}, listed)
            assert (await way.ask("PUT", f"/{box}/sealed", BLOCK_BLOB, PLAIN)).status == 201
        for name in ("plain", "short", "blocks"):
            assert is_azures(await way.ask("GET", f"/box/{name}"), "not-sealed")
            assert (await way.ask("GET", f"/old/{name}")).body == (b"short" if name == "short" else PLAIN)
            part = await way.ask("GET", f"/old/{name}", {"x-ms-range": "bytes=1-3"})
            assert (part.status, part.body) == (206, (b"short" if name == "short" else PLAIN)[1:4])
        assert is_azures(await way.ask("GET", "/box/empty"), "object-invalid")
        assert (await way.ask("GET", "/old/empty")).status == 200
        for box in ("box", "old"):
            assert (await way.ask("GET", f"/{box}/sealed")).body == PLAIN
            assert (await way.ask("HEAD", f"/{box}/sealed")).headers["content-length"] == "40000"
        for name in ("plain", "blocks"):
            assert (await way.ask("HEAD", f"/old/{name}")).headers["content-length"] == "40000"
        sizes = (await way.ask("GET", "/old?restype=container&comp=list")).body
        assert [size in sizes for size in (b">40000<", b">5<", b">0<")] == [True, True, True]
        assert sizes.count(b">40000<") == 3
        stored = await way.ask("GET", "/asis/sealed")
        assert stored.body.startswith(b"\x89SGT")
        # A block list of what is not ours.
        names = await way.ask("GET", "/old/blocks?comp=blocklist")
        assert b"<Name>QQ==</Name><Size>40000</Size>" in names.body
        await of_keys_and_damage(place, stored.body)


async def of_keys_and_damage(place: Site, sealed: bytes) -> None:
    way, direct, owner = place.ways["forward"], place.ways["direct"], place.service.owner
    broken = bytearray(sealed)
    broken[20_000] ^= 1
    for name, body, code in (
        ("cut", sealed[:-16_400], "object-invalid"),
        ("begun", sealed[:60], "object-invalid"),
        ("foreign", sealed[:12] + os.urandom(16) + sealed[28:], "key-unknown"),
    ):
        await direct.ask("PUT", f"/box/{name}", BLOCK_BLOB, body)
        answer = await way.ask("GET", f"/box/{name}", {"x-ms-range": "bytes=0-99"})
        assert is_azures(answer, code), name
    await direct.ask("PUT", "/box/broken", BLOCK_BLOB, bytes(broken))
    cut = await way.ask("GET", "/box/broken")
    assert cut.exit_code or cut.code == "object-invalid"  # by how much came at once
    assert PLAIN[20_000:20_016] not in cut.body
    key_id = next(iter(place.rig.materials[owner]))
    place.rig.push(owner, key_id=key_id, state=KeyState.SUSPENDED)
    assert is_azures(await way.ask("GET", "/box/sealed"), "key-suspended")
    assert is_azures(await way.ask("PUT", "/box/new", BLOCK_BLOB, PLAIN), "key-suspended")
    assert is_azures(await way.ask("PUT", "/box/new?comp=block&blockid=QQ%3D%3D", {}, PLAIN), "key-suspended")


async def test_the_sdk_raises_what_is_meant_and_asks_again_where_that_helps(tmp_path: Path) -> None:
    """Directly and through the proxy where both can fail alike; then what the proxy alone refuses."""
    alike = ("put-once", "put-wrong-md5", "get-if", "get-missing", "get-beyond", "head-missing")
    async with site(tmp_path) as place:
        way, direct, owner = place.ways["forward"], place.ways["direct"], place.service.owner
        await way.ask("PUT", "/box?restype=container")
        await way.ask("PUT", "/box/sealed", BLOCK_BLOB, PLAIN)
        for name, body in (("plain", PLAIN), ("short", b"short")):
            await direct.ask("PUT", f"/box/{name}", BLOCK_BLOB, body)

        async def seen(by: Way, *steps: str) -> dict[str, list[object]]:
            found: dict[str, list[object]] = await program(
                "azure_errors.py", by.spec(container="box", steps=steps)
            )
            return found

        assert await seen(way, *alike) == (told := await seen(direct, *alike))
        assert told["put-once"] == ["ResourceExistsError", "BlobAlreadyExists", 409, 1]
        assert told["put-wrong-md5"] == ["HttpResponseError", "Md5Mismatch", 400, 1]
        assert await seen(way, "get-plain", "head-short", "append") == {
            "get-plain": ["ResourceExistsError", "InvalidOperation", 409, 1],
            "head-short": ["HttpResponseError", "InternalError", 502, 3],
            "append": ["HttpResponseError", "FeatureNotSupportedByProxy", 501, 1],
        }
        key_id = next(iter(place.rig.materials[owner]))
        place.rig.push(owner, key_id=key_id, state=KeyState.SUSPENDED)
        assert await seen(way, "get", "put") == {
            name: ["HttpResponseError", "AuthorizationFailure", 423, 1] for name in ("get", "put")
        }

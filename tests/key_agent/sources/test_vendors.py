"""The vendors' files: complete, true to what the code can do, and acted upon."""

import re
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from pkcs11 import Attribute, Mechanism

from key_agent.errors import KeySourceError
from key_agent.sources.hsm.methods import WRAPPINGS
from key_agent.sources.hsm.wrapping import mechanism_of
from key_agent.sources.pkcs11 import MethodSetting, Pkcs11Settings, Pkcs11Source
from key_agent.sources.source import KekType, Verdict, WrapMethod
from key_agent.sources.vendors import Quirks, load_vendor, read_vendor_file, vendor_names
from tests.key_agent.sources.conftest import REFERENCE, FakeModule, MakeSource
from tests.nss import Nss
from tests.softhsm import SoftHsm

ROOT = Path(__file__).parents[3]
ASKED_FOR = {"softhsm2", "nss", "cloudhsm", "luna", "nshield", "yubihsm2", "google", "azure"}


def settings(tmp_path: Path, **changes: object) -> Pkcs11Settings:
    fields = {"module_path": Path("/usr/lib/module.so"), "token_label": "t", "pin_file": tmp_path / "pin"}
    return Pkcs11Settings(**(fields | changes))  # type: ignore[arg-type]


def test_the_named_vendors_are_there() -> None:
    assert set(vendor_names()) >= ASKED_FOR | {"generic"}


@pytest.mark.parametrize("name", vendor_names())
def test_a_file_says_only_what_the_worker_understands(name: str) -> None:
    vendor = load_vendor(name)
    assert vendor.title
    assert vendor.sources
    # Nothing here was ever run on hardware; whoever did that changes this line too.
    assert vendor.ran_on == ("software" if name in ("softhsm2", "nss", "generic") else "nothing")
    if not vendor.pkcs11:
        assert vendor.instead
        return
    quirks = vendor.quirks
    assert set(quirks.methods) <= set(WRAPPINGS)
    assert len(set(quirks.methods)) == len(quirks.methods)
    for standard in quirks.mechanisms:
        made = mechanism_of(Mechanism[standard], quirks.mechanisms)
        assert (int(made), isinstance(made, Mechanism)) == (quirks.mechanisms[standard], True)
    assert all(hasattr(Attribute, attribute) for attribute in quirks.left_out_attributes)
    assert all(path.is_absolute() for path in vendor.module_paths)
    if not quirks.makes_keys:
        # Nothing could be tried on a throw-away key there.
        assert len(quirks.methods) == 1


def test_the_manual_lists_them_as_they_are() -> None:
    manual = (ROOT / "docs" / "hsm.md").read_text(encoding="utf-8")
    table = manual[manual.index("| `vendor` | HSM |") : manual.index('"Nothing yet" is meant')]
    rows = dict(re.findall(r"^\| `([a-z0-9]+)` \| [^|]* \| ([^|]*) \|", table, re.MULTILINE))
    del rows["vendor"]
    assert rows.keys() == set(vendor_names())
    for name in vendor_names():
        claims_nothing = load_vendor(name).ran_on == "nothing" and load_vendor(name).pkcs11
        assert ("nothing yet" in rows[name]) is claims_nothing
    for method in WRAPPINGS:
        assert f"`{method}`" in manual
    for verdict in Verdict:
        assert verdict in (Verdict.OK, Verdict.UNSUPPORTED) or f"`{verdict}`" in manual


def test_the_hsm_making_ivs_is_never_tried_where_it_would_repeat_one() -> None:
    assert not set(load_vendor("softhsm2").quirks.methods) & {
        WrapMethod.GCM_IN_PLACE,
        WrapMethod.GCM_APPENDED,
    }


def test_every_method_can_be_pinned() -> None:
    assert set(get_args(MethodSetting.__value__)) == {"auto", *map(str, WRAPPINGS)}


def test_settings_take_the_vendors_word(tmp_path: Path) -> None:
    assert settings(tmp_path, vendor="cloudhsm").methods() == load_vendor("cloudhsm").quirks.methods
    assert settings(tmp_path, vendor="luna", method="kw").methods() == (WrapMethod.KW,)
    assert settings(tmp_path, vendor="luna").methods(KekType.EC_P256) == (WrapMethod.ECDH_ES,)
    with pytest.raises(KeySourceError, match="no wrap method for a KEK of type ec-p256"):
        settings(tmp_path, vendor="cloudhsm").methods(KekType.EC_P256)
    for vendor, message in (
        ("azure", "no PKCS#11 module: it speaks REST only"),
        ("yubihsm2", "set token_serial"),
        ("nss", "module_arguments"),
        ("nobody", "no HSM vendor 'nobody'; known are"),
        ("../azure", "no HSM vendor"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(tmp_path, vendor=vendor)
    assert settings(tmp_path, vendor="yubihsm2", token_serial="1").vendor == "yubihsm2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title = 'x'\nran_on = 'hardware'\nspeed = 1\n", "speed"),
        ("title = 'x'\nran_on = 'maybe'\n", "maybe"),
        ("title = 'x'\nran_on = 'nothing'\npkcs11 = false\n", "what to use instead"),
        ("title = 'x'\nran_on = 'nothing'\npin_pattern = '('\n", "vendor file"),
        ("title = 'x'\nran_on = 'nothing'\n[quirks]\nmethods = []\n", "at least one"),
        ("title = 'x'\nran_on = 'nothing'\n[quirks]\nmethods = ['ecb']\n", "ecb"),
        ("title = 'x'\nran_on = 'nothing'\n[quirks.mechanisms]\nAES_GCM = -1\n", "32 bits"),
        ("title", "vendor file"),
    ],
)
def test_a_sites_own_file_is_read_as_strictly(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_vendor_file(path)
    with pytest.raises(ValueError, match="No such file"):
        settings(tmp_path, vendor_file=tmp_path / "absent.toml")


def vendor_file(directory: Path, quirks: Quirks, **more: object) -> Path:
    path = directory / "vendor.toml"
    lines = ["title = 'the vendor'", "ran_on = 'software'"]
    lines += [f"{name} = {msgspec.json.encode(value).decode()}" for name, value in more.items()]
    lines.append("[quirks]")
    tables = []
    for name, value in msgspec.to_builtins(quirks).items():
        if isinstance(value, dict):
            tables += [f"[quirks.{name}]", *(f"{key} = {number}" for key, number in value.items())]
        else:
            lines.append(f"{name} = {msgspec.json.encode(value).decode()}")
    path.write_text("\n".join(lines + tables))
    return path


async def test_a_pin_of_another_form_never_reaches_the_token(
    make_source: MakeSource, fake: FakeModule, tmp_path: Path
) -> None:
    path = vendor_file(tmp_path, Quirks(), pin_pattern="[^:]+:.+", pin_form="user:password")
    source = make_source(fake.settings(vendor_file=path))
    with pytest.raises(KeySourceError, match="wants user:password; not tried") as caught:
        await source.create_kek(REFERENCE)
    assert fake.hsm.pin not in str(caught.value)
    assert fake.logins == 0


async def test_a_kek_that_cannot_be_switched_is_not_touched(
    make_source: MakeSource, hsm: SoftHsm, tmp_path: Path
) -> None:
    path = vendor_file(tmp_path, Quirks(can_disable=False))
    source = make_source(vendor_file=path)
    kek = await source.create_kek(REFERENCE)
    with pytest.raises(KeySourceError, match="use the vendor's tools"):
        await source.set_kek_enabled(kek, enabled=False)
    assert hsm.run("attributes", REFERENCE)["DECRYPT"]


async def test_a_module_that_locks_by_itself_is_told_so(make_source: MakeSource, tmp_path: Path) -> None:
    source = make_source(vendor_file=vendor_file(tmp_path, Quirks(os_locking=True)))
    kek = await source.create_kek(REFERENCE)
    assert (await source.diagnose(kek)).verdict == "ok"


async def test_mechanisms_have_the_vendors_numbers(make_source: MakeSource, tmp_path: Path) -> None:
    quirks = Quirks(methods=(WrapMethod.GCM, WrapMethod.KW), mechanisms={"AES_GCM": 0x80001087})
    facts = await make_source(vendor_file=vendor_file(tmp_path, quirks)).describe()
    methods = facts["methods"]
    assert isinstance(methods, dict)
    assert methods["gcm"].startswith("gcm: MechanismInvalid")
    assert methods["kw"] == "ok"


async def test_attributes_that_a_strict_token_cannot_bear_are_left_out(
    make_source: MakeSource, hsm: SoftHsm, tmp_path: Path
) -> None:
    """SoftHSM2 takes its own default for CKA_SIGN then, which is true: and that is noticed."""
    path = vendor_file(tmp_path, Quirks(methods=(WrapMethod.GCM,), left_out_attributes=("SIGN",)))
    with pytest.raises(KeySourceError, match="weakened the KEK: SIGN"):
        await make_source(vendor_file=path).create_kek(REFERENCE)
    assert hsm.run("count", REFERENCE) == 0


def test_the_shipped_files_fit_the_installed_modules(hsm: SoftHsm, nss: Nss) -> None:
    assert hsm.module in load_vendor("softhsm2").module_paths
    assert nss.module in load_vendor("nss").module_paths


async def test_the_vendors_word_is_in_the_description(make_source: MakeSource) -> None:
    source: Pkcs11Source = make_source(vendor="softhsm2")
    facts = await source.describe()
    assert facts["methods"] == dict.fromkeys(load_vendor("softhsm2").quirks.methods, "ok")
    vendor = facts["vendor"]
    assert isinstance(vendor, dict)
    assert vendor["ran_on"] == "software"
    assert vendor["notes"]

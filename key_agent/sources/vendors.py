"""What is known of each HSM vendor's module, as data that the key source acts upon (docs/hsm.md).

1. One TOML file per vendor in `hsm_vendors/`; the operator names it: `vendor = "luna"`. Without one every
   method is tried and nothing is assumed.
2. A file says where its knowledge comes from. `ran_on = "hardware"` is claimed by nobody who did not see it.
3. What a site knows better it says in a file of its own (`vendor_file`), of the same form.
"""

import functools
import re
import tomllib
from pathlib import Path
from typing import Final, Literal

import msgspec

from key_agent.sources.source import WrapMethod

GENERIC: Final = "generic"
_DIRECTORY: Final = Path(__file__).with_name("hsm_vendors")
_NAME: Final = re.compile(r"[a-z0-9]+")


class Quirks(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the worker treats the module; what it cannot know by trying."""

    methods: tuple[WrapMethod, ...] = (
        WrapMethod.GCM,
        WrapMethod.GCM_IN_PLACE,
        WrapMethod.GCM_APPENDED,
        WrapMethod.KW,
        WrapMethod.CBC_HMAC,
        WrapMethod.RSA_OAEP_256,
        WrapMethod.RSA_OAEP_1,
        WrapMethod.ECDH_ES,
    )
    """Tried in this order. One that is left out cannot work there, or must not be tried."""
    read_write: bool = True
    """Sessions are opened read-write. False for modules that have only the others."""
    os_locking: bool = False
    """C_Initialize with CKF_OS_LOCKING_OK, for modules with threads of their own."""
    reinitialize_before_look: bool = False
    """The module keeps its list of keys from C_Initialize on: start it again before each diagnosis."""
    makes_keys: bool = True
    """False: keys are made with the vendor's tools and adopted (`adopt_kek`), the canary key too."""
    can_disable: bool = True
    """False: attributes cannot be changed; disable with the vendor's tools, or destroy."""
    mechanisms: dict[str, int] = {}
    """Numbers of the vendor's own mechanisms, by the standard name that they stand for."""
    left_out_attributes: tuple[str, ...] = ()
    """CKA_ names without prefix that C_GenerateKey must not be given, not even as false."""

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("methods must name at least one wrap method")
        for number in self.mechanisms.values():
            if not 0 <= number < 2**32:
                raise ValueError("a mechanism's number has 32 bits")


class Vendor(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    title: str
    """For people."""
    pkcs11: bool = True
    """False: there is no module; `instead` says what to use."""
    instead: str = ""
    ran_on: Literal["hardware", "software", "nothing"]
    """What this file was ever used with: the real HSM, a software token that is the product, nothing yet."""
    sources: tuple[str, ...] = ()
    """Where the knowledge is from."""
    module_paths: tuple[Path, ...] = ()
    """Where the vendor installs the module; `key-agent init` takes the first that exists."""
    needs_module_arguments: str = ""
    """If the module takes a configuration in C_Initialize: its form, to be given as `module_arguments`."""
    needs_serial: bool = False
    """All tokens have the same label: `token_serial` has to choose."""
    pin_form: str = ""
    """What the PIN consists of, for people."""
    pin_pattern: str = ""
    """Regular expression that a PIN fulfils; any other is not tried, for attempts are few."""
    variables: tuple[str, ...] = ()
    """Environment variables that the module reads; the worker is given those that are set."""
    quirks: Quirks = msgspec.field(default_factory=Quirks)
    notes: tuple[str, ...] = ()
    """What an operator has to know; `doctor` and `init` print it."""

    def __post_init__(self) -> None:
        if not self.pkcs11 and not self.instead:
            raise ValueError("a vendor without PKCS#11 says what to use instead")
        re.compile(self.pin_pattern)


def _decode_path(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise NotImplementedError


def vendor_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in _DIRECTORY.glob("*.toml")))


@functools.cache
def load_vendor(name: str) -> Vendor:
    """The vendor's file. ValueError if there is none of that name."""
    if not _NAME.fullmatch(name) or name not in vendor_names():
        raise ValueError(f"no HSM vendor {name!r}; known are {', '.join(vendor_names())}")
    return read_vendor_file(_DIRECTORY / f"{name}.toml")


def read_vendor_file(path: Path) -> Vendor:
    """ValueError if the file cannot be read or does not say what a vendor's file says."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return msgspec.convert(content, Vendor, dec_hook=_decode_path)
    except OSError as error:
        raise ValueError(f"vendor file {path}: {error.strerror}") from None
    except (ValueError, re.error) as error:  # TOML, msgspec's ValidationError and ours
        raise ValueError(f"vendor file {path}: {error}") from None

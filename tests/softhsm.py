"""A SoftHSM2 token for tests, and somebody else's hand on it: a second process that destroys and disables.

    hsm = SoftHsm.create(tmp_path / "hsm")
    source = Pkcs11Source(hsm.settings(), ...)
    hsm.run("destroy", kek.reference)        # another process

As a script it is that second process; only there is python-pkcs11 loaded.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MODULE_CANDIDATES = (
    Path("/usr/lib/softhsm/libsofthsm2.so"),
    Path(f"/usr/lib/{os.uname().machine}-linux-gnu/softhsm/libsofthsm2.so"),
    Path("/usr/lib64/pkcs11/libsofthsm2.so"),
)
SO_PIN = "12345678"
USER_PIN = "correct horse 4711"


def find_module() -> Path:
    """The installed libsofthsm2.so. Missing is a failure, never a skip: these tests are the point."""
    for candidate in MODULE_CANDIDATES:
        if candidate.exists():
            return candidate
    raise FileNotFoundError("libsofthsm2.so is not installed: apt-get install softhsm2")


@dataclass(kw_only=True)
class SoftHsm:
    """One token directory of its own, with its configuration and a PIN file of mode 0600."""

    directory: Path
    label: str = "sealgate"
    pin: str = field(default=USER_PIN, repr=False)

    @classmethod
    def create(cls, directory: Path, *, label: str = "sealgate") -> "SoftHsm":
        hsm = cls(directory=directory, label=label)
        hsm.tokens.mkdir(parents=True, mode=0o700)
        hsm.configuration.write_text(
            f"directories.tokendir = {hsm.tokens}\nobjectstore.backend = file\nlog.level = ERROR\n"
        )
        hsm.initialize()
        hsm.write_pin(hsm.pin)
        return hsm

    @property
    def module(self) -> Path:
        return find_module()

    @property
    def tokens(self) -> Path:
        return self.directory / "tokens"

    @property
    def configuration(self) -> Path:
        return self.directory / "softhsm2.conf"

    @property
    def pin_file(self) -> Path:
        return self.directory / "pin"

    @property
    def refused_pin_file(self) -> Path:
        return self.directory / "pin-refused.json"

    @property
    def environment(self) -> dict[str, str]:
        return {"SOFTHSM2_CONF": str(self.configuration)}

    def settings(self, **changes: Any) -> Any:
        """`Pkcs11Settings` for this token; *changes* replace fields."""
        from key_agent.sources.pkcs11 import Pkcs11Settings

        fields: dict[str, Any] = {
            "module_path": self.module,
            "token_label": self.label,
            "pin_file": self.pin_file,
            "refused_pin_file": self.refused_pin_file,
            "environment": self.environment,
            "request_timeout_s": 30.0,
            "start_timeout_s": 60.0,
        }
        return Pkcs11Settings(**(fields | changes))

    def write_pin(self, pin: str) -> None:
        """Replace the PIN file, as an operator would: a new inode each time."""
        new = self.pin_file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(pin + "\n")
        new.replace(self.pin_file)

    def initialize(self) -> None:
        """Make the token; if it exists, every object in it is gone afterwards."""
        where = ["--token", self.label] if any(self.tokens.iterdir()) else ["--free"]
        self._softhsm2_util(
            "--init-token", *where, "--label", self.label, "--so-pin", SO_PIN, "--pin", self.pin
        )

    def add_token(self) -> None:
        """One more token of the same label, beside the others: another serial."""
        self._softhsm2_util(
            "--init-token", "--free", "--label", self.label, "--so-pin", SO_PIN, "--pin", self.pin
        )

    def replace_token(self) -> None:
        """Another token under the same label: another serial."""
        shutil.rmtree(self.tokens)
        self.tokens.mkdir(mode=0o700)
        self.initialize()

    def unmount(self) -> None:
        self.tokens.rename(self.directory / "elsewhere")

    def mount(self) -> None:
        (self.directory / "elsewhere").rename(self.tokens)

    def recover(self) -> None:
        """Before whatever follows a kill: bring a token back that went with the program that was killed.

        SoftHSM empties `token.object` and writes it anew at each login. Who is killed in between leaves no
        token behind; no HSM lets its callers do that.
        """
        for token in self.tokens.glob("*/token.object"):
            intact = self.directory / f"{token.parent.name}.intact"
            if token.stat().st_size:
                intact.write_bytes(token.read_bytes())
            else:
                token.write_bytes(intact.read_bytes())

    def change_pin(self, pin: str) -> None:
        """In the token only; the PIN file still holds the old one."""
        self.run("set-pin", arguments={"new_pin": pin})
        self.pin = pin

    def run(self, action: str, reference: Any = None, *, arguments: dict[str, Any] | None = None) -> Any:
        """Do *action* (a function of this file, `_do_...`) in another process; its answer.

        *reference* is a KekReference where the action needs one.
        """
        name = {} if reference is None else {"label": reference.label, "id": reference.object_id.hex()}
        access = {"module": str(self.module), "token": self.label, "pin": self.pin}
        request = access | name | (arguments or {})
        return in_another_process(action, request, self.environment)

    def _softhsm2_util(self, *arguments: str) -> None:
        subprocess.run(
            ["softhsm2-util", *arguments],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )


def in_another_process(action: str, request: dict[str, Any], environment: dict[str, str]) -> Any:
    """The answer of `_do_<action>(request)`, run by a process of its own."""
    done = subprocess.run(
        [sys.executable, "-I", str(Path(__file__).resolve()), action],
        input=json.dumps(request),
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"{action} in another process failed: {done.stderr}")
    return json.loads(done.stdout)


# --- the other process ---


def _session(request: dict[str, Any]) -> Any:
    from key_agent.sources.hsm.module import load_module

    library = load_module(request["module"], request.get("module_arguments", ""))
    tokens = [slot.get_token() for slot in library.get_slots(token_present=True)]
    [token] = [token for token in tokens if token.label == request["token"]]
    return token.open(rw=True, user_pin=request["pin"])


def _keys(session: Any, request: dict[str, Any]) -> list[Any]:
    from pkcs11 import Attribute, ObjectClass

    return list(
        session.get_objects(
            {
                Attribute.CLASS: ObjectClass[request.get("class", "SECRET_KEY")],
                Attribute.LABEL: request["label"],
                Attribute.ID: bytes.fromhex(request["id"]),
            }
        )
    )


def _do_count(request: dict[str, Any]) -> int:
    return len(_keys(_session(request), request))


def _do_destroy(request: dict[str, Any]) -> int:
    found = _keys(_session(request), request)
    for key in found:
        key.destroy()
    return len(found)


def _do_set(request: dict[str, Any]) -> str:
    """Set attribute *name* of the key to *value* (a date as ISO text)."""
    from datetime import date

    from pkcs11 import Attribute

    [key] = _keys(_session(request), request)
    value = request["value"]
    key[Attribute[request["name"]]] = date.fromisoformat(value) if isinstance(value, str) else value
    return "done"


def _do_rename(request: dict[str, Any]) -> str:
    """Give the key the label *to*."""
    from pkcs11 import Attribute

    [key] = _keys(_session(request), request)
    key[Attribute.LABEL] = request["to"]
    return "done"


def _do_make(request: dict[str, Any]) -> str:
    """One more key, or key pair, of that name. `type`, `bits`, `capabilities`, `extractable` may be given."""
    from pkcs11 import Attribute, KeyType, MechanismFlag

    session, kind = _session(request), KeyType[request.get("type", "AES")]
    common = {
        "id": bytes.fromhex(request["id"]),
        "label": request["label"],
        "store": True,
        "capabilities": MechanismFlag(request["capabilities"])
        if "capabilities" in request
        else MechanismFlag.ENCRYPT | MechanismFlag.DECRYPT,
    }
    hidden = {
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: request.get("extractable", False),
        Attribute.PRIVATE: True,
    }
    if kind is KeyType.RSA:
        session.generate_keypair(kind, request.get("bits", 3072), private_template=hidden, **common)
    elif kind is KeyType.EC:
        curve = {Attribute.EC_PARAMS: bytes.fromhex("06082a8648ce3d030107")}
        parameters = session.create_domain_parameters(kind, curve, local=True)
        parameters.generate_keypair(private_template=hidden, **common)
    else:
        session.generate_key(kind, request.get("bits", 256), template=hidden, **common)
    return "done"


def _do_attributes(request: dict[str, Any]) -> dict[str, bool]:
    from pkcs11 import Attribute

    [key] = _keys(_session(request), request)
    names = [
        "SENSITIVE",
        "EXTRACTABLE",
        "TOKEN",
        "PRIVATE",
        "ENCRYPT",
        "DECRYPT",
        "WRAP",
        "UNWRAP",
        "SIGN",
        "DERIVE",
    ]
    found = key.get_attributes([Attribute[name] for name in names])
    return {name: bool(found.get(Attribute[name])) for name in names}


def _do_origin(request: dict[str, Any]) -> dict[str, bool]:
    """Whether it was made in the token, and was at no time otherwise than hidden."""
    from pkcs11 import Attribute

    [key] = _keys(_session(request), request)
    return {name: bool(key[Attribute[name]]) for name in ("LOCAL", "ALWAYS_SENSITIVE", "NEVER_EXTRACTABLE")}


def _do_export(request: dict[str, Any]) -> dict[str, str]:
    """Try to get the key's value out by each way that PKCS#11 has; which error refused it, or "got out"."""
    from collections.abc import Callable

    from pkcs11 import Attribute, KeyType, Mechanism, MechanismFlag, ObjectClass, PKCS11Error

    session = _session(request)
    [key] = _keys(session, request)
    wrapping = session.generate_key(
        KeyType.AES, 256, store=False, capabilities=MechanismFlag.WRAP | MechanismFlag.UNWRAP
    )
    value = Attribute.PRIVATE_EXPONENT if key.key_type is KeyType.RSA else Attribute.VALUE
    assert key.object_class in {ObjectClass.SECRET_KEY, ObjectClass.PRIVATE_KEY}

    def set_to(attribute: Any, wanted: bool) -> None:
        key[attribute] = wanted

    ways: dict[str, Callable[[], object]] = {
        "read": lambda: key[value],
        "wrap": lambda: wrapping.wrap_key(key, mechanism=Mechanism.AES_KEY_WRAP_PAD),
        "make extractable": lambda: set_to(Attribute.EXTRACTABLE, True),
        "make readable": lambda: set_to(Attribute.SENSITIVE, False),
        "copy extractable": lambda: key.copy({Attribute.EXTRACTABLE: True}),
        "copy readable": lambda: key.copy({Attribute.SENSITIVE: False}),
    }
    found = {}
    for name, way in ways.items():
        try:
            way()
            found[name] = "got out"
        except PKCS11Error as error:
            found[name] = type(error).__name__
    return found


def _do_serials(request: dict[str, Any]) -> list[str]:
    """Of the tokens with that label."""
    from key_agent.sources.hsm.module import load_module

    library = load_module(request["module"], request.get("module_arguments", ""))
    tokens = [slot.get_token() for slot in library.get_slots(token_present=True)]
    return sorted(token.serial.decode() for token in tokens if token.label == request["token"])


def _do_list(request: dict[str, Any]) -> list[str]:
    from pkcs11 import Attribute

    return sorted(item[Attribute.LABEL] for item in _session(request).get_objects())


def _do_unwrap_gcm(request: dict[str, Any]) -> str:
    """KM of a `gcm` wrapped key, in hex, by the token and the format's words alone, no code of Sealgate's."""
    from pkcs11 import GCMParams, Mechanism

    [key] = _keys(_session(request), request)
    wrapped, binding = bytes.fromhex(request["wrapped"]), bytes.fromhex(request["binding"])
    opened: bytes = key.decrypt(
        wrapped[12:], mechanism=Mechanism.AES_GCM, mechanism_param=GCMParams(wrapped[:12], binding, 128)
    )
    return opened.hex()


def _do_init_nss(request: dict[str, Any]) -> str:
    """Give a new NSS database its password; what certutil -N does."""
    from key_agent.sources.hsm.module import load_module

    library = load_module(request["module"], request["module_arguments"])
    [token] = [
        token
        for slot in library.get_slots(token_present=True)
        if (token := slot.get_token()).label == request["token"]
    ]
    session = token.open(rw=True, so_pin="")
    session.init_pin(request["pin"])
    session.close()
    return "done"


def _do_set_pin(request: dict[str, Any]) -> str:
    _session(request).set_pin(request["pin"], request["new_pin"])
    return "done"


def _main() -> None:
    action = globals()["_do_" + sys.argv[1].replace("-", "_")]
    answer = action(json.load(sys.stdin))
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()

"""Names and states of keys, and the promise that a key does not show itself."""

import pytest

from envelope.errors import FormatError
from envelope.keys import ANONYMOUS, TRANSITIONS, KeyId, KeyMaterial, KeyState, KeyUse, NetworkService
from tests.envelope.samples import KEY_ID, MATERIAL, OWNER


def _material(state: KeyState = KeyState.ACTIVE) -> KeyMaterial:
    return KeyMaterial(owner=OWNER, key_id=KEY_ID, state=state, secret=bytearray(MATERIAL))


def test_key_ids() -> None:
    assert KeyId.parse(str(KEY_ID)) == KEY_ID
    assert KeyId.random() != KeyId.random()
    assert ANONYMOUS.is_anonymous
    assert not KEY_ID.is_anonymous
    for wrong in ("", "a0", "zz" * 16, "a0" * 17):
        with pytest.raises(FormatError):
            KeyId.parse(wrong)
    for size in (0, 15, 17):
        with pytest.raises(FormatError):
            KeyId(bytes(size))


@pytest.mark.parametrize("name", ["a", "a-b", "0", "a" * 63, "x--y-"])
def test_names(name: str) -> None:
    assert str(NetworkService.parse(f"{name}/{name}")) == f"{name}/{name}"


@pytest.mark.parametrize("name", ["", "-a", "A", "a_b", "a" * 64, "a.b", "ä", "a\n", "a b"])
def test_names_that_are_none(name: str) -> None:
    for pair in ((name, "drive"), ("tenant-a", name)):
        with pytest.raises(FormatError):
            NetworkService(*pair)
    with pytest.raises(FormatError):
        NetworkService.parse(name)


def test_what_a_state_allows() -> None:
    assert [state for state in KeyState if state.may_seal] == [KeyState.ACTIVE]
    assert {state for state in KeyState if state.may_open} == {
        KeyState.PRE_ACTIVE,
        KeyState.ACTIVE,
        KeyState.DEACTIVATED,
    }


def test_no_way_back() -> None:
    """Compromised and destroyed are final, and nothing becomes pre-active again."""
    assert set(TRANSITIONS) == set(KeyState)
    assert TRANSITIONS[KeyState.DESTROYED] == frozenset()
    assert TRANSITIONS[KeyState.COMPROMISED] == {KeyState.DESTROYED}
    targets = set().union(*TRANSITIONS.values())
    assert KeyState.PRE_ACTIVE not in targets
    assert {state for state in KeyState if KeyState.ACTIVE in TRANSITIONS[state]} == {
        KeyState.PRE_ACTIVE,
        KeyState.SUSPENDED,
    }


def test_material_does_not_show_itself() -> None:
    material = _material()
    assert MATERIAL.hex() not in repr(material)
    assert repr(MATERIAL) not in repr(material)
    assert material != _material()
    assert material.use is KeyUse.DATA


def test_wiping() -> None:
    material = _material()
    material.wipe()
    assert material.secret == bytes(32)

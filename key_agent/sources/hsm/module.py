"""Loading the PKCS#11 module, with arguments for those that need some.

1. python-pkcs11 calls C_Initialize(NULL), which says "one thread", and that is what the worker is. A module
   that takes its configuration in `pReserved` (NSS), or that is to lock by itself because it has threads of
   its own (`os_locking`), is initialised here instead, with CKF_OS_LOCKING_OK. One that returns a new
   function list at each call cannot be.
2. Any other module is loaded as usual: not every vendor tolerates what is not asked for.
"""

import ctypes
import struct
from collections.abc import Callable
from typing import Any, Final, Self, override

import pkcs11
from pkcs11 import _pkcs11

CKF_OS_LOCKING_OK: Final = 2
CKR_OK: Final = 0
CKR_CRYPTOKI_ALREADY_INITIALIZED: Final = 0x191
_lib: Any = _pkcs11.lib  # typed as if its attributes could not be overridden, which is the point here
# CK_C_INITIALIZE_ARGS: four mutex functions, flags, pReserved.
_INITIALIZE_ARGUMENTS: Final = struct.Struct("@PPPPLP")


def load_module(path: str, arguments: str, *, os_locking: bool = False) -> Any:
    """The library, initialised. pkcs11.PKCS11Error if it cannot be loaded or does not start."""
    return _ConfiguredLibrary(path, arguments) if arguments or os_locking else pkcs11.lib(path)


class _ConfiguredLibrary(_lib):  # type: ignore[misc]
    """`pkcs11.lib` whose C_Initialize gets arguments. Without `initialized`, starting again does nothing."""

    _start: Callable[[bytes | None], int]
    _stop: Callable[[bytes | None], int]
    _arguments: ctypes.Array[ctypes.c_char]
    _running: bool

    def __new__(cls, path: str, arguments: str) -> Self:
        self: Self = super().__new__(cls, path)
        functions = ctypes.POINTER(ctypes.c_void_p)()  # CK_FUNCTION_LIST: the version, then the functions
        if ctypes.CDLL(path).C_GetFunctionList(ctypes.byref(functions)) != CKR_OK:
            raise pkcs11.PKCS11Error(f"{path}: C_GetFunctionList failed")
        function = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_char_p)
        start, stop = functions[1], functions[2]
        if start is None or stop is None:
            raise pkcs11.PKCS11Error(f"{path}: no C_Initialize or C_Finalize")
        self._start, self._stop = function(start), function(stop)
        self._arguments = ctypes.create_string_buffer(arguments.encode())
        self._running = False
        return self

    def __init__(self, path: str, arguments: str) -> None:
        del arguments
        super().__init__(path)  # calls `initialize`

    @property
    def initialized(self) -> bool:
        return self._running

    @override
    def initialize(self) -> None:
        if self._running:
            return
        address = ctypes.addressof(self._arguments) if self._arguments.value else 0
        code = self._start(_INITIALIZE_ARGUMENTS.pack(0, 0, 0, 0, CKF_OS_LOCKING_OK, address))
        if code not in (CKR_OK, CKR_CRYPTOKI_ALREADY_INITIALIZED):
            raise pkcs11.PKCS11Error(f"C_Initialize answered {code:#x}")
        self._running = True

    @override
    def finalize(self) -> None:
        self._running = False
        if (code := self._stop(None)) != CKR_OK:
            raise pkcs11.PKCS11Error(f"C_Finalize answered {code:#x}")

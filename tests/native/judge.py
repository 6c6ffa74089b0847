"""Runs in the second environment: cryptography's own Cobblestone-256 seals and opens what it is told to.

JSON on stdin, a list of jobs {"do": "seal" | "open", "key", "context", "data", "step"}; JSON on stdout, in
the same order {"data"} or {"refused": "<exception>"}. All bytes are hex. Imports nothing of ours.
"""

import json
import sys
from typing import Any

import cryptography
from cryptography.cobblestone import (  # type: ignore[import-not-found]  # from 50 on
    Cobblestone256Decryptor,
    Cobblestone256Encryptor,
)


def run(job: dict[str, Any]) -> dict[str, str]:
    key, context, data = (bytes.fromhex(job[name]) for name in ("key", "context", "data"))
    maker = Cobblestone256Encryptor if job["do"] == "seal" else Cobblestone256Decryptor
    try:
        stream = maker(key, context)
        out = b"".join(stream.update(data[at : at + job["step"]]) for at in range(0, len(data), job["step"]))
        return {"data": (out + stream.finalize()).hex()}
    except Exception as error:  # noqa: BLE001 - whatever it refuses with is the answer
        return {"refused": type(error).__name__}


if __name__ == "__main__":
    json.dump(
        {"version": cryptography.__version__, "results": [run(job) for job in json.load(sys.stdin)]},
        sys.stdout,
    )

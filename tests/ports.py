"""Ports for servers that a test starts in other processes.

Below the range from which the kernel serves outgoing connections, so that none of these takes a port between
here and there; and never the same one twice in a run.
"""

import random
import socket

_PORTS = range(15_000, 32_000)
_given: set[int] = set()


def free_port() -> int:
    """A port of 127.0.0.1 that is free now and was not given out before."""
    for port in random.sample(_PORTS, 1000):
        if port in _given:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _given.add(port)
        return port
    raise OSError("no free port between 15000 and 32000")

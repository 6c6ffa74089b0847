"""Where parts of an agent meet the agents of other environments: what they answer, what they do unasked.

`assembly.Environments` is one. The parts know this much of it, and it knows them; neither imports the other.
"""

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol

from key_agent.environments.keys.proofs import Proofs
from key_agent.environments.peers.peer_api import PeerRoute
from key_agent.environments.peers.peering import Peering


class Workplace(Protocol):
    peering: Peering
    proofs: Proofs
    state_dir: Path
    routes: list[PeerRoute]
    """What peers may ask; to be filled before it is open."""
    tasks: list[tuple[str, Callable[[], Coroutine[Any, Any, object]]]]
    """Loops: a name and a coroutine function; to be filled before it is open."""

"""One request and its answer, carried out by their plans: what the gate is told, and with which keys."""

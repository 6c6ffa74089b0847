"""Several processes that serve clients at the same ports (docs/adr/0011)."""

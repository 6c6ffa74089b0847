"""The network intermediary: an encrypting forward and reverse proxy for many tenants."""

"""HTTP APIs of the proxy process."""

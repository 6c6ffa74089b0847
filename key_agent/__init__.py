"""The key agent: on the enterprise's premises, beside its HSM. Never imports mitmproxy or the proxy."""

"""Process plumbing that both sides use: settings, TLS, serving, lifecycle, clock, audit, metrics."""

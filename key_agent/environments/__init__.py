"""Several environments, each with a KEK, an agent and proxies of its own; one of them may be breached."""

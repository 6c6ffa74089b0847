"""`key-agent`: what the administrator types, and how the answer is shown."""

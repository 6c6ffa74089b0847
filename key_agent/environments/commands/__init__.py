"""`key-agent env`, `incident`, `keys`, `admin`, `approval`: what is typed, and what it does."""

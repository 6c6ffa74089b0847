"""What providers' clients speak: each parses, authenticates, maps errors, and holds no cryptography."""

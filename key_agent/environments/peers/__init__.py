"""What agents of environments ask and tell each other, and who of them serves."""

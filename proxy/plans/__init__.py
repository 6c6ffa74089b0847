"""What is to happen to a message: whose it is, and the plan, before a byte of it moves."""

"""A breach, from its report to the way back, and what proves afterwards what was done."""

"""Keys for every environment: made once, brought to each, proven there, and only then used."""

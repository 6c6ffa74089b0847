"""Comparisons with peers, both sides in the same run: `make bench`, `python -m bench [ONLY]`."""

"""Comparisons with peers, as shared/performance.md defines them: `make bench`, `python -m bench [ONLY]`."""

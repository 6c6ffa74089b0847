"""The formats that the key agent and the proxy share: pure functions and small objects, no I/O, no clock.

Normative description: docs/format.md. Imports only the standard library and cryptography.
"""

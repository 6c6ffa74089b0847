"""Certificates for development, made at run time; none is committed. See README.md."""

"""The credentials by which this proxy signs requests anew that it had to change (docs/profiles-s3.md)."""

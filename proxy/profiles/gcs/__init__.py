"""The gcs profile: Google Cloud Storage's JSON API (docs/profiles-gcs.md)."""

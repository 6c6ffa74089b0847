"""The s3 profile: S3's REST API as its clients use it (docs/profiles-s3.md)."""

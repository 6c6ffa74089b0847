"""WebDAV (RFC 4918), and what Nextcloud adds to it."""

"""The profile `azure-blob`: block blobs of Azure Storage, whole or in blocks (docs/profiles-azure.md)."""

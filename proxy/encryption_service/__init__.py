"""The encryption service: providers encrypt and sign under keys that the enterprise can revoke."""

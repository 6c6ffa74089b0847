"""Key servers in place of an HSM: this package runs inside the worker process and imports no pkcs11."""

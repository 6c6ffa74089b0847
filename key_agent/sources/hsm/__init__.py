"""What runs inside the HSM worker: only this package imports pkcs11, only worker_main imports it."""

"""Provisioning: which tenants and network services this proxy hosts."""

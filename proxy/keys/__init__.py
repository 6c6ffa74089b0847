"""Key material of the network services: received, checked, kept in memory until its end."""

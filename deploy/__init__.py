"""What puts Sealgate onto a machine: bootstrap, the demo, systemd units."""

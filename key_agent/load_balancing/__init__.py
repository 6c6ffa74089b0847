"""HAProxy between several environments: its configuration, what it is answered, who watches over that."""

"""Which settings are tried next, and which trials stop early."""

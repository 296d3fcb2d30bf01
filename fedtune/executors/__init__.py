"""Who computes what the clients do: one process, a pool of them, or one tensor program."""

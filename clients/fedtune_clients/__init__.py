"""What runs on a device: models and local solvers."""

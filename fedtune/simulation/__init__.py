"""Virtual time, simulated devices, and one federation in training."""

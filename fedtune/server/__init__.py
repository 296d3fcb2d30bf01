"""The server of a federation, simulated or real: its Flower strategy, federated averaging, server optimisers."""

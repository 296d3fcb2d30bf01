"""The Flower server: federated averaging, server optimisers, FedEx."""

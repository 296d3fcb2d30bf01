"""Everybody's examples: federated data sets, how they are partitioned, where they come from."""

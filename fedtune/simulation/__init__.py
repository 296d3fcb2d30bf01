"""Federations in training, studies over them on a virtual clock, comparisons of studies."""

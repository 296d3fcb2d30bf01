"""LEAF's options that say how much of a data set is used. Several data sets have them."""

from fedtune.errors import InputError

MIN_SAMPLES = 3  # one example to train on, one to validate and one to test


def check_sampling(fraction: float, min_samples: int, max_samples: int | None) -> None:
    """Raises InputError if a client could be left without an example to train on, to validate or to test."""
    if not 0 < fraction <= 1:
        raise InputError(f"fraction must be > 0 and <= 1, got {fraction}")
    if min_samples < MIN_SAMPLES:
        raise InputError(f"min_samples must be >= {MIN_SAMPLES}, got {min_samples}")
    if max_samples is not None and max_samples < min_samples:
        raise InputError(f"max_samples must be >= min_samples, {min_samples}, got {max_samples}")

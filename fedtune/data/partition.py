"""Partitions: which client of a simulated federation holds which examples.

`iid` divides the shuffled examples into parts whose sizes differ by at most one.

`shards` is the non-IID split of McMahan et al. 2017 (arXiv 1602.05629), section 3. The examples are sorted by label and
cut into equal shards; each client gets `shards_per_client` random shards.

`dirichlet` is the *per-class* scheme of Yurochkin et al. 2019 (arXiv 1905.12022). For each label, one draw from
Dirichlet(alpha) gives the clients' shares of its examples, so the clients' sizes vary too. It is not the per-client
scheme of Hsu et al. 2019, which draws a label distribution for each client and gives all clients the same size. The
partition is drawn again, up to ten times, if a client has fewer than three examples.

They give the same partitions as IidPartitioner, ShardPartitioner and DirichletPartitioner (without `self_balancing`) of
flwr-datasets. Those are not used, since importing them loads Hugging Face datasets, which takes seconds at every start.
"""

import numpy as np
from jaxtyping import Int64, Integer

from fedtune import rng
from fedtune.errors import InputError, UnknownNameError

OPTIONS: dict[str, tuple[str, ...]] = {"iid": (), "shards": ("shards_per_client",), "dirichlet": ("alpha",)}
MIN_EXAMPLES = 3  # one example to train on, one to validate and one to test
MOST_DRAWS = 11


def make_partition(
    labels: Integer[np.ndarray, "example"],
    name: str,
    num_clients: int,
    *,
    seed: int,
    examples_per_client: int | None = None,
    shards_per_client: int | None = None,
    alpha: float | None = None,
) -> list[Int64[np.ndarray, "_"]]:
    """The indices of each client's examples, in increasing order; no example belongs to two clients.

    `name` is "iid", "shards" or "dirichlet". With examples_per_client, num_clients * examples_per_client random
    examples are used, else all examples. `shards_per_client` (None means 2) is only for "shards" and `alpha` (None
    means 0.5) only for "dirichlet"; another partition raises InputError if it gets one of them.

        make_partition(labels, "dirichlet", num_clients=100, seed=0, alpha=0.3)
    """
    if name not in OPTIONS:
        raise UnknownNameError("partition", name, OPTIONS)
    for option, value in {"shards_per_client": shards_per_client, "alpha": alpha}.items():
        if value is not None and option not in OPTIONS[name]:
            raise InputError(f"{option} must be left out with partition {name!r}, got {value}")
    used = _num_used(len(labels), num_clients, examples_per_client)
    chosen = rng.stream(seed, "partition").permutation(len(labels))[:used]
    draws = np.random.default_rng(rng.derived_seed(seed, "partitioner"))
    if name == "shards":
        parts = _shards(labels[chosen], num_clients, 2 if shards_per_client is None else shards_per_client, draws)
    elif name == "dirichlet":
        parts = _dirichlet(labels[chosen], num_clients, 0.5 if alpha is None else alpha, draws)
    else:
        parts = np.array_split(np.arange(used), num_clients)
    return [np.sort(chosen[positions]) for positions in parts]


def _num_used(num_examples: int, num_clients: int, examples_per_client: int | None) -> int:
    """How many examples are used. Raises InputError if the examples are too few for the clients."""
    if not 1 <= num_clients <= num_examples // MIN_EXAMPLES:
        raise InputError(
            f"num_clients must be 1 to {num_examples // MIN_EXAMPLES} ({num_examples} examples, at least "
            f"{MIN_EXAMPLES} a client), got {num_clients}"
        )
    if examples_per_client is None:
        return num_examples
    if not MIN_EXAMPLES <= examples_per_client <= num_examples // num_clients:
        raise InputError(
            f"examples_per_client must be {MIN_EXAMPLES} to {num_examples // num_clients} ({num_examples} examples, "
            f"{num_clients} clients), got {examples_per_client}"
        )
    return num_clients * examples_per_client


def _shards(
    labels: Integer[np.ndarray, "example"], num_clients: int, shards_per_client: int, draws: np.random.Generator
) -> list[Int64[np.ndarray, "_"]]:
    """The positions of each client's examples, which are some of the equal shards of the sorted examples."""
    if shards_per_client < 1:
        raise InputError(f"shards_per_client must be >= 1, got {shards_per_client}")
    num_shards = num_clients * shards_per_client
    if len(labels) % num_shards:
        raise InputError(
            f"num_clients * shards_per_client must divide the examples into equal shards, got {num_shards} for "
            f"{len(labels)} examples; set examples_per_client to a multiple of shards_per_client"
        )
    shards = np.argsort(labels, kind="stable").reshape(num_shards, -1)
    return list(shards[draws.permutation(num_shards)].reshape(num_clients, -1))


def _dirichlet(
    labels: Integer[np.ndarray, "example"], num_clients: int, alpha: float, draws: np.random.Generator
) -> list[Int64[np.ndarray, "_"]]:
    """The positions of each client's examples, with the shares of each label drawn from Dirichlet(alpha)."""
    if not 0 < alpha < np.inf:
        raise InputError(f"alpha must be a finite number > 0, got {alpha}")
    of_each_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    for _ in range(MOST_DRAWS):
        shares = [draws.dirichlet(np.full(num_clients, float(alpha))) for _ in of_each_label]
        cuts = [(np.cumsum(s)[:-1] * len(held)).astype(int) for s, held in zip(shares, of_each_label, strict=True)]
        dealt = [np.split(held, cut) for held, cut in zip(of_each_label, cuts, strict=True)]
        parts = [np.concatenate(part) for part in zip(*dealt, strict=True)]
        if min(map(len, parts)) >= MIN_EXAMPLES:
            return parts
    raise InputError(
        f"alpha must be large enough to give each of {num_clients} clients {MIN_EXAMPLES} of {len(labels)} examples, "
        f"got {alpha}, with which {MOST_DRAWS} draws failed"
    )

"""Who holds which example: partitions of a data set among clients, by flwr-datasets' partitioners.

`iid` deals the shuffled examples into parts whose sizes differ by at most one. `shards` is the non-IID split of McMahan
et al. 2017 (arXiv 1602.05629), section 3: the examples sorted by label are cut into equal shards, and each client gets
`shards_per_client` of them at random. `dirichlet` is the *per-class* scheme of Yurochkin et al. 2019 (arXiv
1905.12022): for each label, the clients' shares of its examples are one draw from Dirichlet(alpha), so the clients'
sizes vary too. It is not the per-client scheme (a label distribution drawn for each client, sizes equal) of Hsu et al.
2019. It runs without `self_balancing`, and is drawn again, up to ten times, while a client has fewer than three
examples.
"""

import warnings
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64, Integer

from fedtune import rng
from fedtune.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

OPTIONS: dict[str, tuple[str, ...]] = {"iid": (), "shards": ("shards_per_client",), "dirichlet": ("alpha",)}
MIN_EXAMPLES = 3  # one each to train on, to validate and to test


def partition(
    labels: Integer[np.ndarray, "example"],
    name: str,
    num_clients: int,
    *,
    seed: int,
    examples_per_client: int | None = None,
    shards_per_client: int | None = None,
    alpha: float | None = None,
) -> list[Int64[np.ndarray, "_"]]:
    """The indices of each client's examples, increasing: disjoint, and together all the examples used.

    Those are `num_clients * examples_per_client` examples drawn at random, or all of them where that is None.
    shards_per_client None means 2, alpha None means 0.5; giving one to a partition that does not take it is an error.
    """
    # flwr-datasets is imported where it is needed: it loads Hugging Face datasets, which takes seconds.
    if name not in OPTIONS:
        raise UnknownNameError("partition", name, OPTIONS)
    for option, value in {"shards_per_client": shards_per_client, "alpha": alpha}.items():
        if value is not None and option not in OPTIONS[name]:
            raise InputError(f"{option} must be left out with partition {name!r}, got {value}")
    used = _num_used(len(labels), num_clients, examples_per_client)
    chosen = rng.stream(seed, "partition").permutation(len(labels))[:used]
    draw_seed = rng.derived_seed(seed, "partitioner")
    alpha = 0.5 if alpha is None else alpha
    partitioner: Partitioner
    if name == "shards":
        partitioner = _shards(used, num_clients, 2 if shards_per_client is None else shards_per_client, draw_seed)
    elif name == "dirichlet":
        partitioner = _dirichlet(num_clients, alpha, draw_seed)
    else:
        from flwr_datasets.partitioner import IidPartitioner

        partitioner = IidPartitioner(num_clients)
    try:
        parts = assign(labels[chosen], partitioner)
    except ValueError as error:  # DirichletPartitioner gives up; what the others refuse is checked above
        raise InputError(
            f"alpha must be large enough to give each of {num_clients} clients {MIN_EXAMPLES} of {used} examples, "
            f"got {alpha}, with which eleven draws failed"
        ) from error
    return [np.sort(chosen[positions]) for positions in parts]


def assign(labels: Integer[np.ndarray, "example"], partitioner: "Partitioner") -> list[Int64[np.ndarray, "_"]]:
    """The positions that a new partitioner of flwr-datasets (with `partition_by="label"`) gives to each client.

    RuntimeError if it left an example out or gave one twice, as PathologicalPartitioner does in its random mode.
    """
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict({"label": labels, "position": np.arange(len(labels))})
    with warnings.catch_warnings():
        # Hugging Face datasets sorts with an argument that pyarrow 25 calls deprecated.
        warnings.filterwarnings("ignore", "Specifying null_placement", FutureWarning)
        # DirichletPartitioner warns at each new draw; when it gives up, it raises.
        warnings.filterwarnings("ignore", "The specified min_partition_size", UserWarning)
        clients = range(partitioner.num_partitions)
        parts = [np.asarray(partitioner.load_partition(client)["position"][:], np.int64) for client in clients]
    held = np.bincount(np.concatenate(parts), minlength=len(labels))
    if (held != 1).any():
        raise RuntimeError(
            f"a partition must hold each example once, but {type(partitioner).__name__} left out {(held == 0).sum()} "
            f"and repeated {(held > 1).sum()} of {len(labels)}"
        )
    return parts


def _num_used(num_examples: int, num_clients: int, examples_per_client: int | None) -> int:
    """How many examples are dealt out."""
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


def _shards(used: int, num_clients: int, shards_per_client: int, seed: int) -> "Partitioner":
    from flwr_datasets.partitioner import ShardPartitioner

    if shards_per_client < 1:
        raise InputError(f"shards_per_client must be >= 1, got {shards_per_client}")
    num_shards = num_clients * shards_per_client
    if used % num_shards:
        raise InputError(
            f"num_clients * shards_per_client must divide the examples into equal shards, got {num_shards} for {used} "
            "examples; set examples_per_client to a multiple of shards_per_client"
        )
    return ShardPartitioner(num_clients, "label", num_shards_per_partition=shards_per_client, seed=seed)


def _dirichlet(num_clients: int, alpha: float, seed: int) -> "Partitioner":
    from flwr_datasets.partitioner import DirichletPartitioner

    if not 0 < alpha < np.inf:
        raise InputError(f"alpha must be a finite number > 0, got {alpha}")
    return DirichletPartitioner(num_clients, "label", float(alpha), min_partition_size=MIN_EXAMPLES, seed=seed)

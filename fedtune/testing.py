"""Contract tests for plug-ins: call them in the tests of your own data set or client program.

Each raises AssertionError with one message that lists all that is broken.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.client.program import ClientProgram
from fedtune.data.checks import check
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.spec import DatasetSpec
from fedtune.tuning.space import Config, Hyperparameter, Number


def check_dataset(load: Callable[..., FederatedDataset], **options: Any) -> None:
    """Passes if `load(**options)` gives a data set without errors, and the same one each time."""
    first, second = load(**options), load(**options)
    broken = check(first)
    for name, array in first.shared().items():
        if not np.array_equal(array, second.shared()[name], equal_nan=array.dtype.kind == "f"):
            broken.append(f"{name} must be the same each time it is loaded")
    if (first.spec, list(first.client_ids)) != (second.spec, list(second.client_ids)):
        broken.append("spec and client_ids must be the same each time")
    if not first.name:
        broken.append("name must not be empty")
    _report(broken)


def check_client(program: ClientProgram) -> None:
    """Passes if a client program's training depends on its arguments alone, changes none of them, and uses its values.

    It trains a small network on a few examples, with each hyperparameter at its default and at the ends of its range.
    """
    broken = [
        f"HYPERPARAMETERS[{name!r}] must be a Hyperparameter, got {value!r}"
        for name, value in program.HYPERPARAMETERS.items()
        if not isinstance(value, Hyperparameter)
    ]
    _report(broken)
    _report(list(_faults_of(program)))


def _faults_of(program: ClientProgram) -> Iterator[str]:
    model = FlatModel(nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.0), nn.Linear(5, 3)))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(model.num_weights, generator=generator) / 3
    examples = Examples(torch.randn(20, 6, generator=generator), torch.arange(20) % 3)
    one = Examples(examples.x[:1], examples.y[:1])
    defaults = {name: each.default for name, each in program.HYPERPARAMETERS.items()}

    def trained(config: Config, on: Examples = examples) -> torch.Tensor:
        return program.train(model, weights.clone(), on, config, np.random.Generator(np.random.PCG64(1))).clone()

    sent, kept = weights.clone(), Examples(*(tensor.clone() for tensor in examples))
    result = program.train(model, sent, examples, defaults, np.random.Generator(np.random.PCG64(1))).clone()
    if not torch.equal(sent, weights):
        yield "train must not change the weights it is sent"
    if not all(map(torch.equal, examples, kept)):
        yield "train must not change the examples"
    if result.dtype != torch.float32 or result.shape != weights.shape:
        yield f"train must return float32 of shape {(*weights.shape,)}, got {result.dtype} {(*result.shape,)}"
        return
    trained(defaults, one)  # what the model remembers of other examples must not matter
    torch.manual_seed(12345)
    np.random.seed(12345)  # noqa: NPY002  what a plug-in must not draw from
    if not torch.equal(trained(defaults), result):
        yield "train must give the same weights for the same arguments, whatever ran before and however others seed"
    if torch.equal(result, weights):
        yield "train must change the weights at the default values"
    if not torch.isfinite(trained(defaults, one)).all():
        yield "train must give finite weights for a client with one example"
    for name, each in program.HYPERPARAMETERS.items():
        for end in _ends(each):
            try:
                trained({**defaults, name: end})
            except Exception as error:
                yield f"train must take {name} = {end}, which is in its range; it raised {error!r}"
    if hasattr(program, "train_together"):
        yield from _faults_together(program, model, weights, defaults)


def _faults_together(program: Any, model: FlatModel, weights: torch.Tensor, defaults: Config) -> Iterator[str]:
    if not hasattr(program, "num_together"):
        yield "a program with train_together must have num_together too"
    x, y = np.arange(120, dtype=np.uint8).reshape(20, 6) % 50, np.arange(20) % 3
    kept = x.copy(), y.copy()
    stored = [StoredExamples(x[-size:], y[-size:], DatasetSpec((6,), "real", 3, 1 / 16), "cpu") for size in (20, 1, 9)]
    configs = [defaults] * 3
    for name, each in program.HYPERPARAMETERS.items():  # the last other value that is known, for the first client
        for end in _ends(each):
            configs[0] = {**defaults, name: end} if end != each.default else configs[0]
    seeds = [np.random.PCG64(seed) for seed in range(3)]
    try:
        together = [
            row.clone()
            for row in program.train_together(
                model, weights.clone(), stored, configs, list(map(np.random.Generator, seeds))
            )
        ]
    except Exception as error:
        yield f"train_together must take several clients; it raised {error!r}"
        return
    alone = [
        program.train(
            model, weights.clone(), examples.all(), config, np.random.Generator(np.random.PCG64(seed))
        ).clone()
        for seed, (examples, config) in enumerate(zip(stored, configs, strict=True))
    ]
    if len(together) != 3 or not all(map(torch.equal, together, alone)):
        yield "train_together must give each client the bits that train gives it"
    if not (np.array_equal(x, kept[0]) and np.array_equal(y, kept[1])):
        yield "train_together must not change the examples"


def _ends(hyperparameter: Hyperparameter) -> list[Number]:
    """The ends of its range that are in it."""
    ends = (hyperparameter.low, hyperparameter.low_open), (hyperparameter.high, hyperparameter.high_open)
    return [end for end, is_open in ends if end is not None and np.isfinite(end) and not is_open]


def _report(broken: list[str]) -> None:
    if broken:
        raise AssertionError("; ".join(broken))

"""Contract tests for plug-ins: call them in the tests of your own data set or client program.

    from fedtune.testing import check_client, check_dataset

    def test_my_plug_ins():
        check_dataset(my_dataset.make, num_clients=5)
        check_client(my_client)

Both raise an AssertionError whose message lists everything that is broken.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.client.examples import Examples
from fedtune.client.flat_model import FlatModel
from fedtune.client.program import ClientProgram
from fedtune.data.checks import check
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.tuning.space import Config, Hyperparameter, Number

__all__ = ["check_client", "check_dataset"]


def check_dataset(load: Callable[..., FederatedDataset], **options: Any) -> None:
    """Passes if `load(**options)` gives a data set without errors, and the same data set each time."""
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
    """Passes if training depends on its arguments alone, does not change them, and takes all values in their ranges.

    `program` is a client program's module. It trains a small network on a few examples, with each hyperparameter at its
    default and at the bounds of its range.
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
    draws = torch.Generator().manual_seed(0)
    weights = torch.randn(model.num_weights, generator=draws) / 3
    examples = Examples(torch.randn(20, 6, generator=draws), torch.arange(20) % 3)
    one = Examples(examples.x[:1], examples.y[:1])
    defaults = {name: hyperparameter.default for name, hyperparameter in program.HYPERPARAMETERS.items()}

    def trained(config: Config, on: Examples = examples) -> torch.Tensor:
        return program.train(model, weights.clone(), on, config, _generator(1)).clone()

    # The arguments stay as they are, and the result has the form of the weights.
    sent, untouched = weights.clone(), Examples(*(tensor.clone() for tensor in examples))
    result = program.train(model, sent, examples, defaults, _generator(1)).clone()
    if not torch.equal(sent, weights):
        yield "train must not change the weights it is sent"
    if not all(map(torch.equal, examples, untouched)):
        yield "train must not change the examples"
    if result.dtype != torch.float32 or result.shape != weights.shape:
        yield f"train must return float32 of shape {(*weights.shape,)}, got {result.dtype} {(*result.shape,)}"
        return

    # Neither what the model remembers of other examples nor the global generators matter.
    trained(defaults, one)
    torch.manual_seed(12345)
    np.random.seed(12345)  # noqa: NPY002  what a plug-in must not draw from
    if not torch.equal(trained(defaults), result):
        yield "train must give the same weights for the same arguments, whatever ran before and however others seed"

    # It trains, with any number of examples and any value in the ranges.
    if torch.equal(result, weights):
        yield "train must change the weights at the default values"
    if not torch.isfinite(trained(defaults, one)).all():
        yield "train must give finite weights for a client with one example"
    for name, bound in _bounds(program):
        try:
            trained({**defaults, name: bound})
        except Exception as error:
            yield f"train must take {name} = {bound}, which is in its range; it raised {error!r}"


def _bounds(program: ClientProgram) -> list[tuple[str, Number]]:
    """The names of the hyperparameters with the bounds of their ranges that are allowed values."""
    bounds = []
    for name, hyperparameter in program.HYPERPARAMETERS.items():
        for bound, is_open in (
            (hyperparameter.low, hyperparameter.low_open),
            (hyperparameter.high, hyperparameter.high_open),
        ):
            if bound is not None and np.isfinite(bound) and not is_open:
                bounds.append((name, bound))
    return bounds


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _report(broken: list[str]) -> None:
    if broken:
        raise AssertionError("; ".join(broken))

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

from fedtune.client.compiled_model import CompiledModel
from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.client.program import ClientProgram
from fedtune.data.checks import check
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.spec import DatasetSpec
from fedtune.tuning.domains import parse_domain
from fedtune.tuning.space import Config, Hyperparameter, Number

__all__ = ["check_client", "check_dataset"]

TOLERANCE = 1e-4  # of a compiled model, relative to the distance that training goes


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
    default and at the bounds of its range. If it has `compile_model`, the compiled network must train and measure as in
    torch, except for rounding.
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
    if hasattr(program, "compile_model"):
        yield from _faults_compiled(program, model, weights, defaults)


def _faults_compiled(program: Any, model: FlatModel, weights: torch.Tensor, defaults: Config) -> Iterator[str]:
    x, y = np.arange(120, dtype=np.uint8).reshape(20, 6) % 50, np.arange(20) % 3
    spec = DatasetSpec((6,), "real", 3, 1 / 16)
    compiled = program.compile_model(model, spec)
    if isinstance(compiled, str):
        return  # there is no kernel here, or none for this network
    if not (isinstance(compiled, CompiledModel) and isinstance(compiled.digest, str) and compiled.digest):
        yield f"compile_model must return a CompiledModel with a digest, or a str, got {type(compiled).__name__}"
        return

    def trained(engine: CompiledModel | None, examples: StoredExamples, config: Config) -> torch.Tensor:
        model.compiled = engine
        given = examples.all() if engine is None else examples  # as in a run
        result: torch.Tensor = program.train(model, weights.clone(), given, config, _generator(1))
        return result.clone()

    # With the defaults, in the middle of what is searched, and at each bound, for clients of several sizes.
    space = getattr(program, "SPACE", {})
    middle = {name: parse_domain(name, table).from_unit(0.5) for name, table in space.items()}
    configs = [defaults, {**defaults, **middle}, *({**defaults, name: bound} for name, bound in _bounds(program))]
    for size in (20, 1, 9):
        examples = StoredExamples(x[-size:], y[-size:], spec, "cpu")
        for config in configs:
            in_torch, in_kernel, again = (trained(engine, examples, config) for engine in (None, compiled, compiled))
            if not _near(in_kernel, in_torch, TOLERANCE * float((in_torch - weights).norm())):
                yield f"compiled, train must give the weights of torch for {size} examples with {dict(config)}"
            if not torch.equal(in_kernel, again):
                yield "compiled, train must give the same weights for the same arguments"

        # The trained weights are measured as in torch.
        model.load(in_torch)
        model.module.eval()
        with torch.no_grad():
            expected = model.measure(model.module(examples.all().x), examples.all().y)
        measured = map(torch.from_numpy, compiled.measure(in_torch, examples))
        if not all(_near(*pair, TOLERANCE * float(pair[1].norm())) for pair in zip(measured, expected, strict=True)):
            yield f"compiled, measure must give the losses and errors of torch for {size} examples"


def _near(one: torch.Tensor, other: torch.Tensor, distance: float) -> bool:
    """Whether the two are at most so far apart, or neither is finite."""
    if not torch.isfinite(other).all():
        return not torch.isfinite(one).all()
    return one.shape == other.shape and float((one - other).norm()) <= distance


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

"""The batched executor's machine: many clients train in one tensor program, for devices that one client leaves idle."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.tasks import ClientTask, EvaluateTask, Failure, Result, Task, TrainTask, describe
from fedtune.client.work import (
    TrainBatched,
    generator,
    measure_alone,
    measure_batched,
    parts_of,
    result,
    train_batched,
)
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.executors.machine import Machine, MachineSettings, in_precision

LARGEST_CHUNK = 128  # clients
CHUNK_BYTES = 2**32  # for their weights and what goes with them; what the rest takes is found out
COPIES = 4  # of a client's weights: itself, the gradient, the velocity, and one in passing
TOLERANCE = 1e-2  # of the distance that training goes; a GPU's convolutions round to a thousandth


class BatchedMachine:
    """Does tasks as `Machine` does, the training of many clients at once; a result may differ by rounding.

    It goes through clients a chunk at a time, and halves the chunk when the device's memory does not suffice. What
    can't be batched is done one client at a time, and `say` is told why, once.
    """

    def __init__(self, settings: MachineSettings, dataset: FederatedDataset, say: Callable[[str], None]) -> None:
        self._machine = Machine(settings, dataset)
        self._machine.num_together = 1
        self._say = say
        self._has_said = False
        client_bytes = COPIES * self._machine.model.flat.nbytes
        self._chunk_size = max(1, min(LARGEST_CHUNK, CHUNK_BYTES // client_bytes))
        self._train: TrainBatched | None = getattr(self._machine.program, "train_batched", None)
        if self._train is None:
            self._say_once(f"the client program {settings.client!r} has no train_batched")
        elif obstacle := self._obstacle(self._train):
            self._say_once(obstacle)
            self._train = None
        else:
            self._train = in_precision(settings, self._train)

    def describe(self) -> str:
        """Where clients train."""
        return self._machine.describe() if self._train is None else f"in one tensor program on {self._machine.device}"

    def run_all(self, weights: Tensor, tasks: Sequence[Task]) -> list[Result]:
        """The results of the tasks, their weights in memory of their own."""
        if self._train is None:
            return self._machine.run_all(weights, tasks)
        batchable = [(index, task) for index, task in enumerate(tasks) if not isinstance(task, EvaluateTask)]
        results: dict[int, Result] = {}
        while batchable:
            chunk = batchable[: self._chunk_size]
            computed = self._run_chunk(self._train, weights, [task for _, task in chunk])
            results.update({index: result for (index, _), result in zip(chunk, computed, strict=False)})
            batchable = batchable[len(computed) :]
        rest = [index for index in range(len(tasks)) if index not in results]
        results.update(zip(rest, self._machine.run_all(weights, [tasks[index] for index in rest]), strict=True))
        return [results[index] for index in range(len(tasks))]

    def _run_chunk(self, train: TrainBatched, weights: Tensor, tasks: Sequence[ClientTask]) -> list[Result]:
        """The results; none where memory does not suffice, after which chunks are smaller."""
        try:
            return self._compute(train, weights, tasks)
        except torch.OutOfMemoryError as error:
            if len(tasks) == 1:
                reason = str(error).splitlines()[0]
                device = self._machine.device
                raise InputError(f"{describe(tasks[0])} must fit the memory of {device}: {reason}") from None
        except (Exception, SystemExit) as error:  # one by one, so that a client's fault is its own
            results = self._machine.run_all(weights, tasks)
            if not any(isinstance(result, Failure) for result in results):
                self._say_once(_first_sentence(error))
            return results
        # Only here, for the error holds on to the tensors of its frames.
        self._chunk_size = len(tasks) // 2
        return []

    def _compute(self, train: TrainBatched, weights: Tensor, tasks: Sequence[ClientTask]) -> list[Result]:
        model, dataset = self._machine.model, self._machine.dataset
        asking = [task for task in tasks if isinstance(task, TrainTask) and task.error_before]
        parts = [part for task in asking for part in parts_of(task)]
        measured = measure_alone(model, weights, dataset, parts) if asking else []
        before = dict(zip(map(id, asking), measured, strict=True))
        trained = train_batched(train, model, weights, dataset, tasks)
        after = measure_batched(model, trained, dataset, list(map(parts_of, tasks)))
        return [
            result(dataset, task, row, measured, before.get(id(task)))
            for task, row, measured in zip(tasks, trained.cpu(), after, strict=True)
        ]

    def _obstacle(self, train: TrainBatched) -> str | None:
        """Why clients can't be batched, found out by training two of a few examples both ways; None where they can."""
        model, dataset, program = self._machine.model, self._machine.dataset, self._machine.program
        x, y = dataset.examples(int(dataset.num_examples("train").argmax()), "train")
        sizes = [min(3, len(y)), min(2, len(y))]  # of unequal sizes, so that one batch is filled up
        few = [StoredExamples(x[:size], y[:size], dataset.spec, self._machine.device).all() for size in sizes]
        config = {name: each.default for name, each in program.HYPERPARAMETERS.items()}
        weights = model.flat.clone()
        try:
            alone = [program.train(model, weights, each, config, generator(0)).clone() for each in few]
            with warnings.catch_warnings():
                # An operation that torch would do one client at a time, more slowly than we.
                warnings.filterwarnings("error", message=".*performance drop")
                together = Examples(*map(torch.cat, zip(*few, strict=True)))
                rows = train(model, weights, together, sizes, [config] * 2, [generator(0), generator(0)])
        except (Exception, SystemExit) as error:
            return _first_sentence(error)
        apart = max(float((row - each).norm() / (each - weights).norm()) for row, each in zip(rows, alone, strict=True))
        # Such as batch normalisation, which mixes the examples of a batch.
        return None if apart <= TOLERANCE else "a client's training is not the same when others train beside it"

    def _say_once(self, reason: str) -> None:
        if not self._has_said:
            self._say(f"clients train one at a time: {reason}")
        self._has_said = True


def _first_sentence(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0]

"""The batched executor's machine: many clients train in one tensor program, since one can't keep a GPU busy."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedtune.client.device_examples import DeviceExamples
from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.measure import measure_alone, measure_batched
from fedtune.client.tasks import ClientTask, EvaluateTask, Failure, Result, Task, TrainTask, describe
from fedtune.client.work import (
    TrainBatched,
    generator,
    parts_of,
    result,
    train_batched,
)
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.executors.machine import ALONE, Machine, MachineSettings, in_precision

LARGEST_CHUNK = 128  # clients
CHUNK_BYTES = 2**32  # for the copies of the clients' weights; if the memory can't hold the rest too, chunks are halved
COPIES = 4  # of a client's weights: the weights, the gradient, the velocity and a temporary one
TOLERANCE = 1e-2  # relative to the distance that training goes; a GPU's convolutions round to a thousandth


class BatchedMachine:
    """Does tasks as `Machine` does, but trains many clients at once; a result may differ by rounding.

    Clients train a chunk at a time. If a chunk does not fit the device's memory, chunks are halved. What can't be
    batched is done one client at a time, and `say` gets the reason, once.
    """

    def __init__(self, settings: MachineSettings, dataset: FederatedDataset, say: Callable[[str], None]) -> None:
        self._machine = Machine(replace(settings, engine="torch"), dataset)
        self.at_work = self._machine.at_work
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
            self._examples = DeviceExamples(dataset, settings.device)

    def describe(self) -> str:
        """Where clients train."""
        return ALONE if self._train is None else f"in one tensor program on {self._machine.device}"

    def run_all(self, weights: Tensor, tasks: Sequence[Task]) -> list[Result]:
        """The results in the order of the tasks. Each update owns the memory of its weights."""
        if self._train is None:
            return self._machine.run_all(weights, tasks)
        # Train the clients in chunks. A chunk that did not fit gives no results and is tried again, halved.
        batchable = [(index, task) for index, task in enumerate(tasks) if not isinstance(task, EvaluateTask)]
        results: dict[int, Result] = {}
        while batchable:
            chunk = batchable[: self._chunk_size]
            computed = self._run_chunk(self._train, weights, [task for _, task in chunk])
            results.update({index: result for (index, _), result in zip(chunk, computed, strict=False)})
            batchable = batchable[len(computed) :]
        # Then evaluate.
        rest = [index for index in range(len(tasks)) if index not in results]
        results.update(zip(rest, self._machine.run_all(weights, [tasks[index] for index in rest]), strict=True))
        return [results[index] for index in range(len(tasks))]

    def _run_chunk(self, train: TrainBatched, weights: Tensor, tasks: Sequence[ClientTask]) -> list[Result]:
        """The results; empty if the chunk did not fit the memory. Chunks are half as large from then on."""
        try:
            return self._compute(train, weights, tasks)
        except torch.OutOfMemoryError as error:
            if len(tasks) == 1:
                reason = str(error).splitlines()[0]
                device = self._machine.device
                raise InputError(f"{describe(tasks[0])} must fit the memory of {device}: {reason}") from None
        except (Exception, SystemExit) as error:
            results = self._machine.run_all(weights, tasks)
            # If no client fails alone, `train_batched` is at fault.
            if not any(isinstance(result, Failure) for result in results):
                self._say_once(_first_sentence(error))
            return results
        # Not in the `except` block: until it ends, the error keeps the tensors of its frames in memory.
        self._chunk_size = len(tasks) // 2
        return []

    def _compute(self, train: TrainBatched, weights: Tensor, tasks: Sequence[ClientTask]) -> list[Result]:
        self.at_work.begin(tasks)
        model, dataset = self._machine.model, self._machine.dataset
        # Measure the weights before training, for the tasks that ask for it.
        asking = [index for index, task in enumerate(tasks) if isinstance(task, TrainTask) and task.error_before]
        parts = [part for index in asking for part in parts_of(tasks[index])]
        measured = measure_alone(model, weights, dataset, parts) if asking else []
        before = dict(zip(asking, measured, strict=True))
        # Train all clients, and measure the weights of each after it.
        to_train, to_measure = [(task.client, "train") for task in tasks], list(map(parts_of, tasks))
        sizes = self._examples.sizes(to_train)
        trained = train_batched(train, model, weights, self._examples.take(to_train), sizes, tasks)
        all_parts = [part for parts in to_measure for part in parts]
        part_sizes = list(map(self._examples.sizes, to_measure))
        after = measure_batched(model, trained, self._examples.take(all_parts), part_sizes)
        rows = trained.cpu()
        return [result(dataset, task, rows[i], after[i], before.get(i)) for i, task in enumerate(tasks)]

    def _obstacle(self, train: TrainBatched) -> str | None:
        """The reason why clients can't be batched, or None. To find out, it trains two small clients both ways."""
        model, dataset, program = self._machine.model, self._machine.dataset, self._machine.program
        x, y = dataset.examples(int(dataset.num_examples("train").argmax()), "train")
        sizes = [min(3, len(y)), min(2, len(y))]  # of unequal sizes, so that one batch is filled up
        few = [StoredExamples(x[:size], y[:size], dataset.spec, self._machine.device).all() for size in sizes]
        config = {name: known.default for name, known in program.HYPERPARAMETERS.items()}
        weights = model.flat.clone()
        try:
            alone = [program.train(model, weights, examples, config, generator(0)).clone() for examples in few]
            with warnings.catch_warnings():
                # torch warns of an operation that it would do one client at a time, more slowly than `Machine` does.
                warnings.filterwarnings("error", message=".*performance drop")
                together = Examples(*map(torch.cat, zip(*few, strict=True)))
                rows = train(model, weights, together, sizes, [config] * 2, [generator(0), generator(0)])
        except (Exception, SystemExit) as error:
            return _first_sentence(error)
        distances = [(row - own).norm() / (own - weights).norm() for row, own in zip(rows, alone, strict=True)]
        # Batch normalisation fails this check: it mixes the examples of a batch.
        if max(map(float, distances)) <= TOLERANCE:
            return None
        return "a client's training is not the same if other clients train with it"

    def _say_once(self, reason: str) -> None:
        if not self._has_said:
            self._say(f"clients train one at a time: {reason}")
        self._has_said = True


def _first_sentence(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split()).split(". ")[0]

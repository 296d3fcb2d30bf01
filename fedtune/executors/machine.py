"""A machine: it holds the model, the federation's data and the client program, and does any client's tasks."""

import functools
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from fedtune import plugins
from fedtune.client.flat_model import FlatModel
from fedtune.client.program import ClientProgram
from fedtune.client.tasks import ClientTask, EvaluateTask, Failure, Result, Task, Update, describe
from fedtune.client.work import evaluate_clients, train_alone, train_and_measure, train_side_by_side
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.executors.watch import AtWork

LARGEST_GROUP = 2**22  # numbers in the training examples of clients that train together
ALONE = "in this process"  # where the clients of a machine train, if each trains alone


@dataclass(frozen=True)
class MachineSettings:
    """What a machine is made from; small and picklable, so that it can be sent to a worker process."""

    model: Mapping[str, Any]  # the [model] table
    client: str  # the client program's name
    device: str
    precision: str = "fp32"  # of training: fp32 or bf16


class Machine:
    """Does tasks. A result depends on the weights and the task alone, not on other tasks."""

    def __init__(self, settings: MachineSettings, dataset: FederatedDataset) -> None:
        # Two threads add in another order than one thread: every executor uses one, so that their bits agree.
        torch.set_num_threads(1)
        self.dataset = dataset
        self.device = settings.device
        self.model = FlatModel(
            plugins.make_model(settings.model, dataset.spec), settings.device, dataset.spec.objective
        )
        self.program = plugins.load_client_program(settings.client)
        self._train_alone = functools.partial(train_alone, in_precision(settings, self.program.train))
        train_together: Any = getattr(self.program, "train_together", None)
        self._train_side_by_side = functools.partial(train_side_by_side, train_together)
        self.num_together = num_together(settings, self.program, self.model)
        self.at_work = AtWork()

    def describe(self) -> str:
        """Where clients train."""
        return ALONE + side_by_side(self.num_together)

    def run(self, weights: torch.Tensor, task: Task) -> Result:
        """The task's result, a Failure if the program raises or exits. Its weights are valid until the next call."""
        self.at_work.begin([task])
        try:
            return self.compute(weights, task)
        except (Exception, SystemExit) as error:  # anybody may write a plug-in: one fails a client, not the run
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            return Failure(f"{describe(task)}: {reason}")

    def run_each(self, weights: torch.Tensor, tasks: Sequence[Task]) -> Iterator[Result]:
        """The results of the tasks in their order. A result's weights are valid until the next result is asked for.

        Several clients of a small model train together, if the client program can do that.
        """
        for several in self._groups(tasks):
            if len(several) > 1:
                yield from self._run_together(weights, cast(list[ClientTask], several))
            else:
                yield self.run(weights, several[0])

    def run_all(self, weights: torch.Tensor, tasks: Sequence[Task]) -> list[Result]:
        """The results of `run_each`. Each update owns the memory of its weights."""
        return [detached_copy(result) for result in self.run_each(weights, tasks)]

    def run_alone(self, weights: torch.Tensor, tasks: Sequence[Task]) -> list[Result]:
        """The results of `run_all`. The tasks are done one at a time, so a failing client affects no other."""
        return [detached_copy(self.run(weights, task)) for task in tasks]

    def compute(self, weights: torch.Tensor, task: Task) -> Result:
        """The task's result, like `run`, but exceptions of the client program are not caught."""
        if isinstance(task, EvaluateTask):
            return evaluate_clients(self.model, weights, self.dataset, task.clients)
        return train_and_measure(self._train_alone, self.model, weights, self.dataset, [task])[0]

    def _groups(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """The tasks in their order, in groups of tasks that are done together."""
        group: list[Task] = []
        size = 0
        for task in tasks:
            added = LARGEST_GROUP + 1  # an evaluation is a group of its own
            if not isinstance(task, EvaluateTask):
                start, stop = self.dataset.ranges[task.client, 0]
                added = int(stop - start) * math.prod(self.dataset.spec.input_shape)
            if group and (len(group) == self.num_together or size + added > LARGEST_GROUP):
                yield group
                group, size = [], 0
            group.append(task)
            size += added
        if group:
            yield group

    def _run_together(self, weights: torch.Tensor, tasks: Sequence[ClientTask]) -> list[Result]:
        self.at_work.begin(tasks)
        try:
            return train_and_measure(self._train_side_by_side, self.model, weights, self.dataset, tasks)
        except (Exception, SystemExit) as error:
            results = self.run_alone(weights, tasks)
            # If no client fails alone, `train_together` is at fault.
            if not any(isinstance(result, Failure) for result in results):
                self.num_together = 1
                reason = f"train_together raised {type(error).__name__}: {error}"
                warnings.warn(f"clients now train one at a time: {reason}", RuntimeWarning, stacklevel=2)
            return results


def num_together(settings: MachineSettings, program: ClientProgram, model: FlatModel) -> int:
    """How many clients a machine trains together: 1 unless the client program has `train_together` and allows more."""
    train, train_together = program.train, getattr(program, "train_together", None)
    if settings.precision != "fp32" or train_together is None:
        return 1
    if getattr(train, "__module__", None) != getattr(train_together, "__module__", None):
        return 1  # a program with a `train` of its own may have imported another program's `train_together`
    says = getattr(program, "num_together", None)
    if says is None:
        raise InputError(f"the client program {settings.client!r} has train_together and must have num_together too")
    count = says(model)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise InputError(f"num_together of {settings.client!r} must be a whole number >= 1, got {count!r}")
    return count


def side_by_side(num_together: int) -> str:
    """The end of a message about where clients train: how many train together; empty if each trains alone."""
    return f", up to {num_together} together" if num_together > 1 else ""


def in_precision(settings: MachineSettings, train: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The training function, with autocast to bfloat16 if the settings ask for it."""
    if settings.precision == "fp32":
        return train
    # Without its cache, which would keep the first step's weights for all later steps.
    autocast = torch.autocast(torch.device(settings.device).type, torch.bfloat16, cache_enabled=False)

    def train_in_bf16(*arguments: Any) -> torch.Tensor:
        with autocast:
            return train(*arguments)

    return train_in_bf16


def detached_copy(result: Result) -> Result:
    """The result, with an update's weights copied to the CPU, so that it owns their memory."""
    return Update(result.weights.to("cpu", copy=True), result.metrics) if isinstance(result, Update) else result

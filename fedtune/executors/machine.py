"""A machine: it holds the model, the federation's data and the client program, and does any client's tasks."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedtune import plugins
from fedtune.client.flat_model import FlatModel
from fedtune.client.tasks import EvaluateTask, Failure, Result, Task, Update, describe
from fedtune.client.work import evaluate_clients, train_and_measure
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import NoKernelError
from fedtune.executors.engine import compile_model
from fedtune.executors.watch import AtWork
from fedtune.settings import Settings, client_program_name

ALONE = "in this process"  # where the clients of a machine train


@dataclass(frozen=True)
class MachineSettings:
    """What a machine is made from; small and picklable, so that it can be sent to a worker process."""

    model: Mapping[str, Any]  # the [model] table
    client: str  # the client program's name
    device: str
    precision: str = "fp32"  # of training: fp32 or bf16
    engine: str = "torch"  # in which clients train: torch or compiled, which is then required


def machine_settings(settings: Settings) -> MachineSettings:
    """What the machines of a run with these settings are made from."""
    client = client_program_name(settings)
    return MachineSettings(settings.model, client, settings.device, settings.precision, settings.engine)


class Machine:
    """Does tasks. A result depends on the weights and the task alone, not on other tasks.

    Raises NoKernelError if the settings require a compiled kernel that can't be had here.
    """

    def __init__(self, settings: MachineSettings, dataset: FederatedDataset) -> None:
        # Two threads add in another order than one thread: every executor uses one, so that their bits agree.
        torch.set_num_threads(1)
        self.dataset = dataset
        self.device = settings.device
        self.model = FlatModel(
            plugins.make_model(settings.model, dataset.spec), settings.device, dataset.spec.objective
        )
        self.program = plugins.load_client_program(settings.client)
        if settings.engine == "compiled":
            compiled = compile_model(settings.client, self.model, dataset.spec, settings.device, settings.precision)
            if isinstance(compiled, str):
                raise NoKernelError(compiled)
            self.model.compiled = compiled
        self._train = in_precision(settings, self.program.train)
        self.at_work = AtWork()

    def describe(self) -> str:
        """Where clients train."""
        return ALONE

    def run(self, weights: torch.Tensor, task: Task) -> Result:
        """The task's result, a Failure if the program raises or exits. Its weights are valid until the next call."""
        self.at_work.begin([task])
        try:
            return self.compute(weights, task)
        except (Exception, SystemExit) as error:  # anybody may write a plug-in: one fails a client, not the run
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            return Failure(f"{describe(task)}: {reason}")

    def run_all(self, weights: torch.Tensor, tasks: Sequence[Task]) -> list[Result]:
        """The results of `run` in the order of the tasks. Each update owns the memory of its weights."""
        return [detached_copy(self.run(weights, task)) for task in tasks]

    def compute(self, weights: torch.Tensor, task: Task) -> Result:
        """The task's result, like `run`, but exceptions of the client program are not caught."""
        if isinstance(task, EvaluateTask):
            return evaluate_clients(self.model, weights, self.dataset, task.clients)
        return train_and_measure(self._train, self.model, weights, self.dataset, task)


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

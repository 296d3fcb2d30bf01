"""One machine that does any client's work: a resident model, the federation's data and the client program."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedtune import plugins
from fedtune.client_work import evaluate_clients, personalise_client, train_client
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.flat_model import FlatModel
from fedtune.tasks import EvaluateTask, Failure, PersonaliseTask, Result, Task, Update, describe


@dataclass(frozen=True)
class MachineSettings:
    """What a machine is made from; small and picklable, so that it can be sent to a worker process."""

    model: Mapping[str, Any]  # the [model] table
    client: str  # the client program's name
    device: str
    precision: str = "fp32"  # of training: fp32 or bf16


class Machine:
    """Does one task at a time. A result depends on the weights and the task alone, not on what was done before."""

    def __init__(self, settings: MachineSettings, dataset: FederatedDataset) -> None:
        # Two threads add in another order than one: every executor uses one, so that their bits agree.
        torch.set_num_threads(1)
        self.dataset = dataset
        self.device = settings.device
        self.model = FlatModel(
            plugins.make_model(settings.model, dataset.spec), settings.device, dataset.spec.objective
        )
        self.program = plugins.client_program(settings.client)
        self._train = in_precision(settings, self.program.train)

    def run(self, weights: torch.Tensor, task: Task) -> Result:
        """The task's result, its weights valid until the next call. A program that raises or exits is a Failure."""
        try:
            return self._compute(weights, task)
        except (Exception, SystemExit) as error:  # plug-ins are anybody's code: a client is lost, not the run
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            return Failure(f"{describe(task)}: {reason}")

    def run_all(self, weights: torch.Tensor, tasks: Sequence[Task]) -> list[Result]:
        """The results of several tasks, their weights in memory of their own."""
        return [_keep(self.run(weights, task)) for task in tasks]

    def _compute(self, weights: torch.Tensor, task: Task) -> Result:
        if isinstance(task, EvaluateTask):
            return evaluate_clients(self.model, weights, self.dataset, task.clients, self.device)
        arguments = (self._train, self.model, weights, self.dataset, task.client, task.config, task.seed)
        if isinstance(task, PersonaliseTask):
            return [personalise_client(*arguments, self.device)]
        return Update(*train_client(*arguments, task.error_before, self.device))


def in_precision(settings: MachineSettings, train: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The training function, with autocast to bfloat16 where the settings say so."""
    if settings.precision == "fp32":
        return train
    # Without its cache, in which the first step's weights would stand for those of all.
    autocast = torch.autocast(torch.device(settings.device).type, torch.bfloat16, cache_enabled=False)

    def train_in_bf16(*arguments: Any) -> torch.Tensor:
        with autocast:
            return train(*arguments)

    return train_in_bf16


def _keep(result: Result) -> Result:
    return Update(result.weights.to("cpu", copy=True), result.metrics) if isinstance(result, Update) else result

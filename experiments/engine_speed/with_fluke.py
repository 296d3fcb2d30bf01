"""fluke: its FedAvg, whose clients train one after another in this process.

python with_fluke.py MODEL PLANS
"""

import copy
import sys
import types
from collections.abc import Iterator
from typing import Any

import work

if __name__ == "__main__":
    # fluke imports torchvision, whose wheel expects torch's build for GPUs. Nothing of torchvision is used here.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")

from fluke import FlukeENV
from fluke.algorithms import CentralizedFL
from fluke.client import Client
from fluke.config import OptimizerConfigurator
from fluke.data import FastDataLoader
from fluke.evaluation import Evaluator
from fluke.server import Server
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector


class Measure(Evaluator):
    """The metrics that every engine takes of a client's model."""

    def evaluate(self, round: int, model: nn.Module, eval_data_loader: FastDataLoader, **_: Any) -> dict[str, float]:
        return work.measure(model, *eval_data_loader.tensors)


class PlannedServer(Server):
    """A server for which the plan says which clients take part, and in which order they take their examples."""

    turns: Iterator[list[work.Turn]]

    def get_eligible_clients(self, eligible_perc: float) -> list[Client]:
        cohort = next(self.turns)
        for turn in cohort:
            self.clients[turn.client].train_set = loader(*(t[turn.order] for t in PARTS[turn.client].train.tensors))
        return [self.clients[turn.client] for turn in cohort]


class FedAvg(CentralizedFL):
    """Without the evaluation of all clients that follows the last round."""

    def finalize(self) -> None: ...


def loader(*tensors: Tensor) -> FastDataLoader:
    """Batches in the order of the tensors."""
    return FastDataLoader(*tensors, num_labels=CLASSES, batch_size=work.BATCH_SIZE, skip_singleton=False)


def make_client(index: int, part: work.Part) -> Client:
    """A client that keeps nothing from one round to the next."""
    validation = loader(*part.validation.tensors)
    optimizer = OptimizerConfigurator({"name": "SGD", "lr": work.LEARNING_RATE})
    return Client(index, None, validation, optimizer, nn.CrossEntropyLoss(), local_epochs=1, persistency=False)


def run_rounds(cohort_size: int, rounds: int) -> Tensor:
    """The weights after the rounds."""
    server.model, server.turns = copy.deepcopy(INITIAL), iter(work.read_plan(PLANS, MODEL, cohort_size))
    federation.run(rounds, cohort_size / work.NUM_CLIENTS)
    return parameters_to_vector(server.model.parameters())


if __name__ == "__main__":
    answers = work.take_stdout()
    MODEL, PLANS = sys.argv[1:]
    CLASSES = work.make_spec(MODEL).num_classes
    INITIAL, PARTS = work.load(MODEL)
    FlukeENV().set_device("cpu")
    FlukeENV().set_evaluator(Measure(eval_every=1))
    FlukeENV().set_eval_cfg(post_fit=True, server=False)
    clients = [make_client(index, part) for index, part in enumerate(PARTS)]
    server = PlannedServer(INITIAL, None, clients)
    federation = FedAvg(len(clients), None, {}, clients, server)
    work.serve(answers, run_rounds)

"""pfl-research: its federated averaging and simulated backend, over one process or several, as torchrun starts them.

python with_pfl.py MODEL PLANS PROCESSES
"""

import itertools
import os
import socket
import subprocess
import sys
from typing import IO, Any

import torch
import work
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector


def start_others(processes: int) -> list[subprocess.Popen]:
    """The processes with the ranks from 1 on; this one becomes rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "engine_speed",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    others = []
    for rank in range(1, processes):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        others.append(
            subprocess.Popen([sys.executable, *sys.argv], stdin=subprocess.PIPE, stdout=sys.stderr, env=environment)
        )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    return others


class Relay:
    """The lines of stdin; each line goes to the other processes first. Only this process writes files."""

    def __init__(self, others: list[subprocess.Popen]) -> None:
        self._others = others

    def __iter__(self) -> Any:
        for line in iter(sys.__stdin__.readline, ""):
            for other in self._others:
                other.stdin.write(f"{line.rsplit(maxsplit=1)[0]} -\n".encode())
                other.stdin.flush()
            yield line
        for other in self._others:
            other.stdin.close()
            other.wait()


def main(model: str, plans: str, answers: IO[str]) -> None:
    # These modules join the other processes when they are imported.
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Weighted
    from pfl.model.pytorch import PyTorchModel

    class Averaging(FederatedAveraging):
        """Measures on a client's validation examples; pfl itself measures on the training examples."""

        def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
            statistics, _ = super().train_one_user(initial_model_state, model, user_dataset, central_context)
            return statistics, model.evaluate(user_dataset.metadata["validation"])

    def make_user(turn: work.Turn) -> PyTorchTensorDataset:
        part = parts[turn.client]
        order = torch.tensor(turn.order)
        validation = PyTorchTensorDataset(part.validation.tensors)
        return PyTorchTensorDataset(
            tuple(tensor[order] for tensor in part.train.tensors), metadata={"validation": validation}
        )

    module, parts = work.load(model)
    module.loss = lambda x, y: cross_entropy(module.train()(x), y)
    module.metrics = lambda x, y: {
        name: Weighted(value * len(y), len(y)) for name, value in work.measure(module, x, y).items()
    }
    pfl_model = PyTorchModel(module, torch.optim.SGD, torch.optim.SGD(module.parameters(), lr=1.0))
    initial = pfl_model.get_parameters()

    def train(cohort_size: int, rounds: int) -> Tensor:
        pfl_model.set_parameters(initial)
        turns = itertools.chain.from_iterable(work.read_plan(plans, model, cohort_size)[:rounds])
        backend = SimulatedBackend(FederatedDataset(make_user, lambda: next(turns)), val_data=None)
        algorithm = Averaging()
        algorithm._current_central_iteration = 1  # in round 0, pfl always evaluates on training examples as well
        algorithm.run(
            NNAlgorithmParams(
                central_num_iterations=1 + rounds,
                evaluation_frequency=1 + rounds,
                train_cohort_size=cohort_size,
                val_cohort_size=None,
            ),
            backend,
            pfl_model,
            NNTrainHyperParams(
                local_batch_size=work.BATCH_SIZE, local_num_epochs=1, local_learning_rate=work.LEARNING_RATE
            ),
            NNEvalHyperParams(local_batch_size=work.sizes(model).validation),
            send_metrics_to_platform=False,
        )
        return parameters_to_vector(module.parameters())

    work.serve(answers, train)


if __name__ == "__main__":
    MODEL, PLANS, PROCESSES = sys.argv[1:]
    ANSWERS = work.take_stdout()
    if int(PROCESSES) > 1 and "RANK" not in os.environ:
        sys.stdin = Relay(start_others(int(PROCESSES)))
    main(MODEL, PLANS, ANSWERS)

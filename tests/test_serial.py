import numpy as np
import torch

from fedtune.client.tasks import EvaluateTask
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.machine import MachineSettings
from fedtune.executors.serial import SerialExecutor


def test_batches_are_computed_one_at_a_time_in_the_order_of_submission():
    y = np.arange(30) % 3
    dataset = FederatedDataset.from_clients({"a": (np.eye(3, dtype=np.float32)[y], y)}, name="made up", num_classes=3)
    executor = SerialExecutor(MachineSettings({"name": "logistic"}, "local_sgd", "cpu"), dataset)
    right, wrong = torch.zeros(12), torch.zeros(12)
    right[:9], wrong[:9] = torch.eye(3).flatten(), -torch.eye(3).flatten()
    tickets = [executor.submit(weights, [EvaluateTask((0,))]) for weights in (right, wrong)]
    assert [executor.finished(ticket) for ticket in tickets] == [False, False]
    executor.step()
    assert [executor.finished(ticket) for ticket in tickets] == [True, False]
    executor.step()
    assert [executor.finished(ticket) for ticket in tickets] == [True, True]
    errors = [executor.collect(ticket)[0][0]["test_error"] for ticket in reversed(tickets)]
    assert errors == [1.0, 0.0]
    executor.close()

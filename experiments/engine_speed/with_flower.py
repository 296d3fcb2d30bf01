"""Flower's own simulation on Ray: its FedAvg, an actor a core, and a ClientApp in the manner of its PyTorch template.

python with_flower.py MODEL PLANS
"""

import copy
import os
import sys
from collections.abc import Iterable

import torch
import work
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor

client_app, server_app = ClientApp(), ServerApp()


class PlannedFedAvg(FedAvg):
    """FedAvg, except that the plan says which clients take part."""

    def __init__(self, model: str, plans: str, cohort_size: int) -> None:
        super().__init__()
        self.config = {"model": model, "plans": plans, "cohort_size": cohort_size}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        cohort = work.read_plan(self.config["plans"], self.config["model"], self.config["cohort_size"])[
            server_round - 1
        ]
        all_nodes = sorted(grid.get_node_ids())
        nodes = [all_nodes[turn.client] for turn in cohort]
        config = ConfigRecord({**self.config, "round": server_round, "nodes": nodes})
        return self._construct_messages(RecordDict({"arrays": arrays, "config": config}), nodes, MessageType.TRAIN)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """The client's weights after training, and its metrics."""
    config = message.content["config"]
    cohort = work.read_plan(config["plans"], config["model"], config["cohort_size"])[config["round"] - 1]
    turn = cohort[config["nodes"].index(context.node_id)]
    module, parts = work.load(config["model"])
    local = copy.deepcopy(module)
    local.load_state_dict(message.content["arrays"].to_torch_state_dict())
    metrics = work.train_plainly(local, parts[turn.client], turn.order)
    content = {
        "arrays": ArrayRecord(local.state_dict()),
        "metrics": MetricRecord({**metrics, "num-examples": len(turn.order)}),
    }
    return Message(RecordDict(content), reply_to=message)


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Does what the lines on stdin say; returning ends the simulation."""
    initial = ArrayRecord(work.make_module(MODEL, ours=False).state_dict())

    def run_rounds(cohort_size: int, rounds: int) -> Tensor:
        strategy, arrays = PlannedFedAvg(MODEL, PLANS, cohort_size), initial
        for server_round in range(1, rounds + 1):
            messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
            replies = list(grid.send_and_receive(messages))
            if len(replies) != cohort_size or any(reply.has_error() for reply in replies):
                raise RuntimeError(f"every client must answer, got {[reply.error for reply in replies]}")
            arrays, _ = strategy.aggregate_train(server_round, replies)
        return torch.cat([tensor.reshape(-1) for tensor in arrays.to_torch_state_dict().values()])

    work.serve(ANSWERS, run_rounds)


if __name__ == "__main__":
    ANSWERS = work.take_stdout()
    MODEL, PLANS = sys.argv[1:]
    cores = len(os.sched_getaffinity(0))
    run_simulation(
        server_app,
        client_app,
        num_supernodes=work.NUM_CLIENTS,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "_temp_dir": f"{PLANS}/ray", "_node_ip_address": "127.0.0.1"},
        },
    )

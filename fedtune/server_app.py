"""The Flower ServerApp: one federation, with fixed hyperparameters or FedEx, on the grid that Flower gives it.

Its run configuration holds `settings`, the TOML text of a run's settings. The app trains the first tuner in them
(`manual`, `fedex` or another one within one federation) for `max_rounds` rounds. If the run configuration also holds
`out`, the app writes the trained weights to that file.
"""

from collections import defaultdict
from pathlib import Path

import torch
from flwr.app import Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file

from fedtune import plugins
from fedtune.client.flat_model import FlatModel
from fedtune.errors import InputError
from fedtune.hyperparameters import resolve_hyperparameters
from fedtune.initial_weights import initial_weights
from fedtune.server import messages as protocol
from fedtune.server.flower_compat import pack
from fedtune.server.replies import Count, good_answers, metrics_in
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import DevicesSettings
from fedtune.study_tuners import make_draw, tuner_settings

TIMEOUT = 3600.0  # seconds for which the server waits for replies, as in Flower's own loop

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains the federation, and writes its weights to the file `out`, if the run configuration names one."""
    torch.set_num_threads(1)  # two threads add in another order than one, so the last bits differ
    settings = protocol.run_settings(context.run_config.get("settings"))
    tuner = tuner_settings(settings.tuners[0], settings)
    if tuner.kind.searches:
        raise InputError(
            f"a ServerApp trains one federation: tuners must begin with one such as fedex, got {tuner.name!r}"
        )
    if settings.devices != DevicesSettings():
        raise InputError("[devices] must be left out for a ServerApp: it simulates devices, and these are real")
    spec = plugins.load_dataset(settings.data).spec
    hyperparameters = resolve_hyperparameters(settings)
    trial = make_draw(tuner, settings.seed, hyperparameters)(0)
    policy = tuner.policy.make_policy(trial, spec.num_classes, hyperparameters.space.client, settings.seed)
    strategy = FedTuneStrategy(
        trial,
        settings.server,
        policy,
        cohort_size=settings.cohort_size,
        seed=settings.seed,
        nodes=list(nodes_by_client(grid).values()),
        evaluate_every=settings.evaluate_every,
        objective=spec.objective,
    )
    weights = initial_weights(settings, spec, settings.seed)
    result = strategy.start(grid, pack(weights.numpy()), num_rounds=settings.max_rounds)
    if "out" in context.run_config:
        model = FlatModel(plugins.make_model(settings.model, spec))
        trained = model.state_dict(torch.from_numpy(result.arrays["weights"].numpy()))
        out = Path(str(context.run_config["out"]))
        out.parent.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory.
        save_file({name: tensor.clone() for name, tensor in trained.items()}, out)


def nodes_by_client(grid: Grid) -> dict[int, int]:
    """The node of each client, in client order; each node reports its client's number.

    Flower's node ids are random in each run. Raises InputError if a node gives no good answer, or two nodes name one
    client: it must be clear who takes part, and nothing is trained yet.
    """
    questions = [
        Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in sorted(grid.get_node_ids())
    ]
    asked = [question.metadata for question in questions]
    replies = grid.send_and_receive(questions, timeout=TIMEOUT)
    answers, problems = good_answers(replies, asked, lambda reply: metrics_in(reply, {"client": Count(0, 2**63 - 1)}))
    silent = [metadata.dst_node_id for metadata in asked if metadata.dst_node_id not in answers]
    if problems or silent:
        raise InputError(
            f"a node can't say which client it is: {problems[0] if problems else f'node {silent[0]} did not answer'}"
        )
    nodes_of = defaultdict(list)
    for node, metrics in answers.items():
        nodes_of[int(metrics["client"])].append(node)
    for client, nodes in nodes_of.items():
        if len(nodes) > 1:
            names = ", ".join(map(str, nodes))
            raise InputError(f"every node must be a client of its own, got nodes {names} for client {client}")
    return {client: nodes_of[client][0] for client in sorted(nodes_of)}

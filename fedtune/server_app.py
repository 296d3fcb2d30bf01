"""The Flower ServerApp: one federation, with fixed hyperparameters or FedEx, on the grid that Flower gives it.

Its run configuration holds `settings`, the TOML text of a run's settings. The app trains the first tuner in them
(`manual`, `fedex` or another one within one federation) for `max_rounds` rounds. If the run configuration also holds
`out`, the app writes the trained weights to that file.
"""

from collections import Counter
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
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import DevicesSettings
from fedtune.study_tuners import make_draw, tuner_settings

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
        nodes=nodes_in_client_order(grid),
        evaluate_every=settings.evaluate_every,
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


def nodes_in_client_order(grid: Grid) -> list[int]:
    """All nodes, ordered by the client that each one reports to be: Flower's node ids are random in each run."""
    questions = [
        Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in sorted(grid.get_node_ids())
    ]
    client_of = {}
    for reply in grid.send_and_receive(questions):
        if reply.has_error():
            raise InputError(f"a node can't say which client it is: {reply.error.reason}")
        client_of[reply.metadata.src_node_id] = int(protocol.metrics(reply)["client"])  # type: ignore[arg-type]
    client, count = Counter(client_of.values()).most_common(1)[0] if client_of else (0, 0)
    if count > 1:
        raise InputError(f"every node must be a client of its own, got {count} nodes for client {client}")
    return sorted(client_of, key=lambda node: client_of[node])

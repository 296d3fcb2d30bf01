"""The Flower ServerApp: one federation, with fixed hyperparameters or FedEx, on the grid that Flower gives it.

Its run configuration holds `settings`, the TOML text of a run's settings. The app trains the first tuner in them
(`manual`, `fedex` or another one within one federation) for `max_rounds` rounds. The run configuration may also hold:

- `out`: the file to which the app writes the trained weights.
- `checkpoint`: the file to which it writes the whole state after each round; by default it stands beside `out`. If the
  file is there when the app starts, the app goes on after the round in it, and the result is the same to the bit. The
  app removes the file when it has written `out`.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from fedtune import plugins
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError
from fedtune.files import replacing
from fedtune.hyperparameters import resolve_hyperparameters
from fedtune.initial_weights import initial_weights
from fedtune.printable import printable
from fedtune.runs import server_checkpoint
from fedtune.runs.server_checkpoint import ServerState
from fedtune.server import messages as protocol
from fedtune.server.flower_compat import pack
from fedtune.server.replies import Count, good_answers, metrics_in
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import DevicesSettings, Settings
from fedtune.study_tuners import make_draw, tuner_settings
from fedtune.tuning.tuner_kind import TunerSettings

TIMEOUT = 3600.0  # seconds for which the server waits for replies, as in Flower's own loop

app = ServerApp()
log = logging.getLogger("flwr")  # what `flwr run --stream` shows


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains the federation, and writes its weights to the file `out`, if the run configuration names one."""
    torch.set_num_threads(1)  # two threads add in another order than one, so the last bits differ
    settings = protocol.run_settings(context.run_config.get("settings"))
    tuner = _tuner(settings)
    spec = plugins.load_dataset(settings.data).spec
    out, checkpoint = _files(context)

    # Go on where an earlier start ended, with the clients that took part in it.
    run = server_checkpoint.run_name(settings, tuner.name)
    saved = None if checkpoint is None else server_checkpoint.load(checkpoint, run)
    nodes = nodes_by_client(grid)
    clients = list(nodes) if saved is None else saved.clients
    strategy = _strategy(settings, tuner, spec, [nodes.get(client) for client in clients])
    weights, done = initial_weights(settings, spec, settings.seed), 0
    if saved is not None:
        weights, done = torch.from_numpy(saved.weights), saved.round
        strategy.restore(saved.strategy)
        log.info("%s of %s rounds are in the checkpoint %s", done, settings.max_rounds, checkpoint)
        for client in clients:
            if client not in nodes:
                log.warning("client %s took part before and has no node now: it is lost in every round", client)

    # Train, and keep the state after each round.
    def keep(server_round: int, weights: Float[Tensor, "weight"]) -> None:
        if checkpoint is not None:
            state = ServerState(server_round, weights.numpy(), clients, strategy.to_arrays())
            server_checkpoint.save(checkpoint, run, state)

    weights = _train(strategy, grid, weights, range(done + 1, settings.max_rounds + 1), keep)

    # Write the trained weights. The next start is then the start of a new run.
    if out is not None:
        trained = FlatModel(plugins.make_model(settings.model, spec)).state_dict(weights)
        # safetensors refuses tensors that share memory.
        with replacing(out) as temporary:
            save_file({name: tensor.clone() for name, tensor in trained.items()}, temporary)
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)


def nodes_by_client(grid: Grid) -> dict[int, int]:
    """The node of each client, in client order; each node reports its client's number.

    Flower's node ids are random in each run. Raises InputError if a node gives no good answer, or two nodes name one
    client: before a round is trained it must be clear who takes part.
    """
    questions = [
        Message(RecordDict(), dst_node_id=node, message_type=MessageType.QUERY) for node in sorted(grid.get_node_ids())
    ]
    asked = [question.metadata for question in questions]
    replies = grid.send_and_receive(questions, timeout=TIMEOUT)
    answers, problems = good_answers(replies, asked, lambda reply: metrics_in(reply, {"client": Count(0, 2**63 - 1)}))
    silent = [metadata.dst_node_id for metadata in asked if metadata.dst_node_id not in answers]
    if problems or silent:
        problem = printable(problems[0]) if problems else f"node {silent[0]} did not answer"
        raise InputError(f"a node can't say which client it is: {problem}")
    nodes_of = defaultdict(list)
    for node, metrics in answers.items():
        nodes_of[int(metrics["client"])].append(node)
    for client, nodes in nodes_of.items():
        if len(nodes) > 1:
            names = ", ".join(map(str, nodes))
            raise InputError(f"every node must be a client of its own, got nodes {names} for client {client}")
    return {client: nodes_of[client][0] for client in sorted(nodes_of)}


def _tuner(settings: Settings) -> TunerSettings:
    """The first tuner. Raises InputError if the settings are not for a ServerApp."""
    tuner = tuner_settings(settings.tuners[0], settings)
    if tuner.kind.searches:
        raise InputError(
            f"a ServerApp trains one federation: tuners must begin with one such as fedex, got {tuner.name!r}"
        )
    if settings.devices != DevicesSettings():
        raise InputError("[devices] must be left out for a ServerApp: it simulates devices, and these are real")
    return tuner


def _files(context: Context) -> tuple[Path | None, Path | None]:
    """The files `out` and `checkpoint`, in folders that exist; None for a file that is not written.

    Raises InputError if the run configuration names something else than a file.
    """
    files = {name: Path(str(context.run_config[name])) for name in ("out", "checkpoint") if name in context.run_config}
    out = files.get("out")
    if out is not None and out.name:
        files.setdefault("checkpoint", out.with_name(f"{out.name}.checkpoint"))
    for name, file in files.items():
        if file.is_dir():
            raise InputError(f"{name} in the run's config must be a file, got the folder {file}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{name} in the run's config must be in a folder that can be made: {error}") from None
    checkpoint = files.get("checkpoint")
    if checkpoint is not None and out is not None and checkpoint.resolve() == out.resolve():
        raise InputError(f"checkpoint in the run's config must be another file than out, got {checkpoint} for both")
    return out, checkpoint


def _strategy(
    settings: Settings, tuner: TunerSettings, spec: DatasetSpec, nodes: Sequence[int | None]
) -> FedTuneStrategy:
    hyperparameters = resolve_hyperparameters(settings)
    trial = make_draw(tuner, settings.seed, hyperparameters)(0)
    policy = tuner.policy.make_policy(trial, spec.num_classes, hyperparameters.space.client, settings.seed)
    return FedTuneStrategy(
        trial,
        settings.server,
        policy,
        cohort_size=settings.cohort_size,
        seed=settings.seed,
        nodes=nodes,
        evaluate_every=settings.evaluate_every,
        objective=spec.objective,
    )


def _train(
    strategy: FedTuneStrategy,
    grid: Grid,
    weights: Float[Tensor, "weight"],
    rounds: range,
    keep: Callable[[int, Float[Tensor, "weight"]], None],
) -> Float[Tensor, "weight"]:
    """The weights after the rounds; `keep` is called with a round and its weights.

    This is the loop of Flower's `Strategy.start`, which can only count from 1.
    """
    for server_round in rounds:
        log.info("round %s of %s", server_round, rounds.stop - 1)
        arrays = pack(weights.numpy())
        messages = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
        new_arrays, metrics = strategy.aggregate_train(server_round, grid.send_and_receive(messages, timeout=TIMEOUT))
        assert new_arrays is not None
        assert strategy.outcome is not None
        weights = torch.from_numpy(new_arrays["weights"].numpy())
        keep(server_round, weights)
        log.info("training: %s", metrics)
        for reason in strategy.outcome.failures:
            log.warning("a client was lost: %s", printable(reason))

        messages = strategy.configure_evaluate(server_round, new_arrays, ConfigRecord(), grid)
        metrics = strategy.aggregate_evaluate(server_round, grid.send_and_receive(messages, timeout=TIMEOUT))
        if metrics is not None:
            log.info("evaluation: %s", metrics)
        for reason in strategy.evaluation_failures:
            log.warning("a client was not evaluated: %s", printable(reason))
    return weights

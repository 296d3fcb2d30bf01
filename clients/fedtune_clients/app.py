"""The Flower ClientApp: what a client does, for Flower's own engine or a SuperNode on a device of one's own.

Of the run's settings [data], [model], `device` and the name in [client] count. The node's config says which client it
is ("partition-id"); the "config" of a message may say otherwise ("client"). What else messages hold is written in
`fedtune.server.messages`.
"""

import functools
from typing import NamedTuple

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedtune import plugins
from fedtune.client_work import Train, evaluate_clients, personalise_client, train_client
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.flat_model import FlatModel
from fedtune.server import messages as protocol
from fedtune.server.trials import client_program

app = ClientApp()


class Work(NamedTuple):
    """What a client works with, the same in every round of a run."""

    dataset: FederatedDataset
    model: FlatModel
    train: Train
    device: str


@app.train()
def train(message: Message, context: Context) -> Message:
    """The weights after local training, and the metrics of `train_client`."""
    work = _work(context)
    weights, metrics = train_client(
        work.train,
        work.model,
        protocol.weights(message),
        work.dataset,
        _client(protocol.config_of(message), context, work.dataset),
        protocol.hyperparameters(message),
        protocol.seed(message),
        protocol.wants(message, "error_before"),
        work.device,
    )
    return protocol.answer(message, metrics, weights.numpy(force=True).copy())  # the model is used again


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The client's metrics of `evaluate_clients`, or those of `personalise_client` where the message asks for that."""
    work, weights = _work(context), protocol.weights(message)
    client = _client(protocol.config_of(message), context, work.dataset)
    if protocol.wants(message, "personalise"):
        hyperparameters, seed = protocol.hyperparameters(message), protocol.seed(message)
        metrics = personalise_client(
            work.train, work.model, weights, work.dataset, client, hyperparameters, seed, work.device
        )
    else:
        (metrics,) = evaluate_clients(work.model, weights, work.dataset, [client], work.device)
    return protocol.answer(message, metrics)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which client this node is, as the metric "client"."""
    return protocol.answer(message, {"client": _client(ConfigRecord(), context, _work(context).dataset)})


def _work(context: Context) -> Work:
    return _load(context.run_config.get("settings"))


@functools.lru_cache(maxsize=1)
def _load(text: object) -> Work:
    torch.set_num_threads(1)  # two threads add in another order than one
    settings = protocol.run_settings(text)
    dataset = plugins.load_dataset(settings.data)
    model = FlatModel(plugins.make_model(settings.model, dataset.spec), settings.device, dataset.spec.objective)
    return Work(dataset, model, plugins.client_program(client_program(settings)).train, settings.device)


def _client(config: ConfigRecord, context: Context, dataset: FederatedDataset) -> int:
    client = config.get("client", context.node_config.get("partition-id"))
    if not isinstance(client, int) or not 0 <= client < dataset.num_clients:
        raise InputError(f"the client must be a whole number in 0..{dataset.num_clients - 1}, got {client!r}")
    return client

"""The Flower ClientApp: what a client does, for Flower's own engine or a SuperNode on a device of one's own.

The run's config holds "settings", the TOML text of a run's settings, of which [data], [model], `device` and the name in
[client] count.
The node's config says which client it is ("partition-id"); a message may say otherwise.

A message carries the record "arrays" with the flat float32 array "weights", and the record "config": "seed", each
hyperparameter as "client.NAME", for training "error_before", for evaluation "personalise", and possibly "client".
"""

import functools
import tomllib
from typing import NamedTuple

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtune import plugins
from fedtune.client_work import Train, evaluate_clients, personalise_client, train_client
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.flat_model import FlatModel
from fedtune.settings import resolve
from fedtune.tuning.space import Number

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
    work, config = _work(context), message.content.config_records["config"]
    weights, metrics = train_client(
        work.train,
        work.model,
        _weights(message),
        work.dataset,
        _client(config, context, work.dataset),
        _hyperparameters(config),
        _seed(config),
        bool(config.get("error_before", False)),
        work.device,
    )
    arrays = ArrayRecord({"weights": Array(weights.cpu().numpy())})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({**metrics})}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The client's metrics of `evaluate_clients`, or those of `personalise_client` where the message asks for that."""
    work, config = _work(context), message.content.config_records["config"]
    weights, client = _weights(message), _client(config, context, work.dataset)
    if config.get("personalise", False):
        metrics = personalise_client(
            work.train,
            work.model,
            weights,
            work.dataset,
            client,
            _hyperparameters(config),
            _seed(config),
            work.device,
        )
    else:
        (metrics,) = evaluate_clients(work.model, weights, work.dataset, [client], work.device)
    return Message(RecordDict({"metrics": MetricRecord({**metrics})}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Which client this node is, as the metric "client"."""
    client = _client(ConfigRecord(), context, _work(context).dataset)
    return Message(RecordDict({"metrics": MetricRecord({"client": client})}), reply_to=message)


def _work(context: Context) -> Work:
    if "settings" not in context.run_config:
        raise InputError("the run's config must hold 'settings', the TOML text of a run's settings")
    return _load(str(context.run_config["settings"]))


@functools.lru_cache(maxsize=1)
def _load(text: str) -> Work:
    settings = resolve([tomllib.loads(text)])
    dataset = plugins.load_dataset(settings.data)
    model = FlatModel(plugins.make_model(settings.model, dataset.spec), settings.device)
    program = plugins.client_program(str(settings.client.get("name", "local_sgd")))
    return Work(dataset, model, program.train, settings.device)


def _client(config: ConfigRecord, context: Context, dataset: FederatedDataset) -> int:
    client = config.get("client", context.node_config.get("partition-id"))
    if not isinstance(client, int) or not 0 <= client < dataset.num_clients:
        raise InputError(f"the client must be a whole number in 0..{dataset.num_clients - 1}, got {client!r}")
    return client


def _weights(message: Message) -> Tensor:
    return torch.from_numpy(message.content.array_records["arrays"]["weights"].numpy())


def _hyperparameters(config: ConfigRecord) -> dict[str, Number]:
    prefix = "client."
    return {
        name.removeprefix(prefix): value
        for name, value in config.items()
        if name.startswith(prefix) and isinstance(value, int | float)
    }


def _seed(config: ConfigRecord) -> int:
    seed = config.get("seed")
    if not isinstance(seed, int):
        raise InputError(f"the message's seed must be a whole number, got {seed!r}")
    return seed

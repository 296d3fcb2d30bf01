"""What the server and its clients tell each other: both ends, and every grid, write and read it here.

A message holds the record "arrays" with the flat float32 array "weights", and the record "config": "seed", the JSON
object "hyperparameters" (one value: where messages travel, Flower checks each), for training "error_before", for
evaluation "personalise". A reply holds the record "metrics", and after training "arrays". A query is answered with the
metric "client", the client's number.

The run's configuration holds "settings", the TOML text of a run's settings.
"""

import functools
import json
import tomllib

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from jaxtyping import Float
from torch import Tensor

from fedtune.client.tasks import EvaluateTask, Failure, PersonaliseTask, Result, Task, TrainTask, Update
from fedtune.errors import InputError
from fedtune.server.flower_compat import fill, pack
from fedtune.settings import Settings, resolve
from fedtune.tuning.space import Config, Number

CLIENT_ERROR = 1000  # the code in the reply of a client whose program raised; above Flower's own


def run_settings(text: object) -> Settings:
    """The settings of that text, what the run's config holds under "settings" (None: nothing). Raises InputError."""
    if not isinstance(text, str):
        raise InputError(f"the run's config must hold 'settings', the TOML text of a run's settings, got {text!r}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"'settings' in the run's config is not TOML: {error}") from None
    return resolve([table])


def train_config(config: ConfigRecord, hyperparameters: Config, seed: int, *, error_before: bool) -> ConfigRecord:
    """`config` and what one client is to train with."""
    text = json.dumps(dict(hyperparameters))
    return fill(ConfigRecord(), {**config, "seed": seed, "error_before": error_before, "hyperparameters": text})


def config_of(message: Message) -> ConfigRecord:
    """The record "config"."""
    record = message.content["config"]
    assert isinstance(record, ConfigRecord)
    return record


def task(message: Message, client: int) -> Task:
    """What the message asks of that client."""
    message_type = message.metadata.message_type
    if message_type not in (MessageType.TRAIN, MessageType.EVALUATE):
        raise ValueError(f"message type must be train, evaluate or query, got {message_type!r}")
    config = config_of(message)
    if message_type == MessageType.TRAIN:
        return TrainTask(client, *_training(config), bool(config.get("error_before", False)))
    return PersonaliseTask(client, *_training(config)) if config.get("personalise", False) else EvaluateTask((client,))


def weights(message: Message) -> Float[Tensor, "weight"]:
    """The weights in a message or reply: a view, where nothing was serialised on the way."""
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    return torch.from_numpy(record["weights"].numpy())


def metrics(reply: Message) -> MetricRecord:
    """The record "metrics"."""
    record = reply.content["metrics"]
    assert isinstance(record, MetricRecord)
    return record


def answer(message: Message, result: Result) -> Message:
    """The reply that tells the result: one client's, whose weights are not copied."""
    if isinstance(result, Failure):
        return Message(Error(CLIENT_ERROR, result.message), reply_to=message)
    if isinstance(result, Update):
        metrics, arrays = result.metrics, {"arrays": pack(result.weights.numpy())}
    else:
        (metrics,), arrays = result, {}
    return Message(fill(RecordDict(), {"metrics": fill(MetricRecord(), metrics), **arrays}), reply_to=message)


def _training(config: ConfigRecord) -> tuple[dict[str, Number], int]:
    """The configuration and the seed to train with."""
    seed = config.get("seed")
    if not isinstance(seed, int):
        raise InputError(f"the message's seed must be a whole number, got {seed!r}")
    return dict(_from_text(str(config["hyperparameters"]))), seed


# A round's messages hold few configurations, and often one.
@functools.lru_cache(maxsize=1024)
def _from_text(text: str) -> dict[str, Number]:
    config: dict[str, Number] = json.loads(text)
    return config

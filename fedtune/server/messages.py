"""What the server and its clients send each other. Both sides and every grid write and read messages here.

A message holds two records. "arrays" has the flat float32 array "weights". "config" has "seed" and "hyperparameters",
for training "error_before", for evaluation "personalise". "hyperparameters" is one JSON object, since Flower checks
every value that it sends. A reply holds the record "metrics", and after training "arrays". The answer to a query is the
metric "client", the client's number.

The run's configuration holds "settings", the TOML text of a run's settings.
"""

import functools
import json
import tomllib
from collections.abc import Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict
from jaxtyping import Float
from torch import Tensor

from fedtune.client.tasks import EvaluateTask, Failure, PersonaliseTask, Result, Task, TrainTask, Update
from fedtune.errors import InputError
from fedtune.server.flower_compat import entries_of, fill, pack, reply
from fedtune.settings import Settings, resolve
from fedtune.tuning.space import Config, Number

CLIENT_ERROR = 1000  # the code in the reply of a client whose program raised; above Flower's own


def run_settings(text: object) -> Settings:
    """The settings in `text`, the value of "settings" in the run's config. Raises InputError.

    `engine` "auto" becomes "torch": each node would decide for itself, and the nodes could differ.
    """
    if not isinstance(text, str):
        raise InputError(f"the run's config must hold 'settings', the TOML text of a run's settings, got {text!r}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"'settings' in the run's config is not TOML: {error}") from None
    settings = resolve([table])
    return settings.model_copy(update={"engine": "torch"}) if settings.engine == "auto" else settings


def train_config(config: ConfigRecord, hyperparameters: Config, seed: int, *, error_before: bool) -> ConfigRecord:
    """`config`, with the hyperparameters, seed and options with which one client trains."""
    text = json.dumps(dict(hyperparameters))
    return fill(
        ConfigRecord(), {**entries_of(config), "seed": seed, "error_before": error_before, "hyperparameters": text}
    )


def with_seed(config: ConfigRecord, seed: int) -> ConfigRecord:
    """A copy of what `train_config` made, for a client with another seed."""
    return fill(ConfigRecord(), {**entries_of(config), "seed": seed})


def config_of(message: Message) -> ConfigRecord:
    """The message's record "config"."""
    record = message.content["config"]
    assert isinstance(record, ConfigRecord)
    return record


def task(message: Message, client: int) -> Task:
    """The task that the message gives to the client. Raises ValueError for other messages than train and evaluate."""
    message_type = message.metadata.message_type
    if message_type not in (MessageType.TRAIN, MessageType.EVALUATE):
        raise ValueError(f"message type must be train, evaluate or query, got {message_type!r}")
    config = entries_of(config_of(message))
    if message_type == MessageType.TRAIN:
        return TrainTask(client, *_training(config), bool(config.get("error_before", False)))
    return PersonaliseTask(client, *_training(config)) if config.get("personalise", False) else EvaluateTask((client,))


def weights(message: Message) -> Float[Tensor, "weight"]:
    """The weights in a message or reply: a view, unless the message was serialised on its way."""
    record = message.content["arrays"]
    assert isinstance(record, ArrayRecord)
    return torch.from_numpy(record["weights"].numpy())


def answer(message: Message, result: Result) -> Message:
    """The reply that holds one client's result; its weights are not copied."""
    if isinstance(result, Failure):
        return Message(Error(CLIENT_ERROR, result.message), reply_to=message)
    if isinstance(result, Update):
        records = {"metrics": fill(MetricRecord(), result.metrics), "arrays": pack(result.weights.numpy())}
    else:
        (metrics,) = result
        records = {"metrics": fill(MetricRecord(), metrics)}
    return reply(message, fill(RecordDict(), records))


def _training(config: Mapping[str, Any]) -> tuple[dict[str, Number], int]:
    """The configuration and the seed with which a client trains."""
    seed = config.get("seed")
    if not isinstance(seed, int):
        raise InputError(f"the message's seed must be a whole number, got {seed!r}")
    return dict(_from_text(str(config["hyperparameters"]))), seed


# Most messages of a round repeat a configuration.
@functools.lru_cache(maxsize=1024)
def _from_text(text: str) -> dict[str, Number]:
    config: dict[str, Number] = json.loads(text)
    return config

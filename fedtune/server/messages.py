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
from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from jaxtyping import Float
from torch import Tensor

from fedtune.errors import InputError
from fedtune.server.flower_compat import fill, pack
from fedtune.settings import Settings, resolve
from fedtune.tuning.space import Config, Number


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


def hyperparameters(message: Message) -> dict[str, Number]:
    """The client configuration to train with."""
    return dict(_from_text(str(config_of(message)["hyperparameters"])))


def seed(message: Message) -> int:
    """The seed to train with."""
    value = config_of(message).get("seed")
    if not isinstance(value, int):
        raise InputError(f"the message's seed must be a whole number, got {value!r}")
    return value


def wants(message: Message, what: str) -> bool:
    """Whether the message asks for `error_before` or to `personalise`."""
    return bool(config_of(message).get(what, False))


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


def answer(
    message: Message, metrics: Mapping[str, Number], weights: Float[np.ndarray, "weight"] | None = None
) -> Message:
    """The reply to a message; the weights are not copied."""
    records = {"metrics": fill(MetricRecord(), metrics)} | ({} if weights is None else {"arrays": pack(weights)})
    return Message(fill(RecordDict(), records), reply_to=message)


# A round's messages hold few configurations, and often one.
@functools.lru_cache(maxsize=1024)
def _from_text(text: str) -> dict[str, Number]:
    config: dict[str, Number] = json.loads(text)
    return config

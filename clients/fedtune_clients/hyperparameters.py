"""The hyperparameters of local SGD, and the ranges that are searched by default. README.md says what each one means."""

import functools

from fedtune.client import Config, Hyperparameter, Number
from fedtune.errors import UnknownNameError

HYPERPARAMETERS = {
    "learning_rate": Hyperparameter(0.1, low=0.0, low_open=True),
    "momentum": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    "weight_decay": Hyperparameter(0.0, low=0.0),
    "batch_size": Hyperparameter(10, low=1, integer=True),
    "epochs": Hyperparameter(1, low=1, integer=True),
    "dropout": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    "proximal_mu": Hyperparameter(0.0, low=0.0),
}

# The ranges of Khodak et al. (2021), as in mnist.toml, for data sets whose settings name no search space.
SPACE = {
    "learning_rate": {"log_uniform": [1e-4, 1.0]},
    "momentum": {"uniform": [0.0, 0.99]},
    "weight_decay": {"log_uniform": [1e-5, 1e-3]},
    "batch_size": {"power_of_two": [8, 128]},
    "epochs": {"integer": [1, 5]},
    "dropout": {"uniform": [0.0, 0.5]},
    "proximal_mu": {"log_uniform": [1e-5, 1.0]},
}


def complete(config: Config) -> dict[str, Number]:
    """The configuration, with the default of each hyperparameter that it leaves out.

    Raises an InputError if a name is unknown or a value is outside its range.
    """
    # Many clients of a round have the same configuration, which is checked once. 1 and True are different values.
    items, types = tuple(config.items()), tuple(map(type, config.values()))
    try:
        return dict(_checked(items, types))
    except TypeError:  # a value that can't be hashed is none that is allowed, and is not remembered
        return _checked.__wrapped__(items, types)


@functools.lru_cache(maxsize=1024)
def _checked(items: tuple[tuple[str, Number], ...], types: tuple[type, ...]) -> dict[str, Number]:
    config = dict(items)
    for name in config:
        if name not in HYPERPARAMETERS:
            raise UnknownNameError("client hyperparameter", name, HYPERPARAMETERS)
    return {
        name: hyperparameter.check(name, config.get(name, hyperparameter.default))
        for name, hyperparameter in HYPERPARAMETERS.items()
    }

"""The checkpoint of a ServerApp: one file, replaced after each round, from which the next start goes on.

It holds the round, the weights, the clients that take part, the strategy's state, and which run they belong to. After
a crash the file holds a complete round.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from fedtune.errors import InputError
from fedtune.runs import checkpoint
from fedtune.settings import Settings, digest


class ServerState(NamedTuple):
    """A federation on real nodes after a round."""

    round: int
    weights: Float[np.ndarray, "weight"]
    clients: Sequence[int]  # the numbers of the clients that take part, ascending
    strategy: Mapping[str, np.ndarray]


def run_name(settings: Settings, tuner: str) -> str:
    """The same for all settings with which a ServerApp computes the same weights."""
    return f"{digest(settings)} {tuner} {settings.seed}"


def save(path: Path, run: str, state: ServerState) -> None:
    """Writes the state of the run; at every moment `path` holds the complete old checkpoint or the complete new one.

    Raises OSError if it can't be written, as on a full disk.
    """
    arrays = {
        "run": np.frombuffer(run.encode(), np.uint8),
        "round": np.array(state.round),
        "weights": state.weights,
        "clients": np.array(state.clients, np.int64),
    }
    checkpoint.save(path, {**arrays, **state.strategy})


def load(path: Path, run: str) -> ServerState | None:
    """The state of the run; None if there is no file.

    Raises InputError if the file is damaged, or is no checkpoint of this run.
    """
    if not path.exists():
        return None
    try:
        arrays = checkpoint.load(path)
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror or error}") from None
    if arrays.pop("run", np.zeros(0, np.uint8)).tobytes() != run.encode():
        raise InputError(
            f"checkpoint {path} must be of a ServerApp with these settings, got another one: give the settings with "
            "which it was written, or remove it to start from the first round"
        )
    return ServerState(int(arrays.pop("round")), arrays.pop("weights"), arrays.pop("clients").tolist(), arrays)

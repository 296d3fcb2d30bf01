"""The engines that are compared: how each one is started, for which models, and what it is compared with."""

import sys
from pathlib import Path

from peers import python_of
from processes import CORES, Engine

IN_FLIGHT = 4  # trials at once, as a search has them
LIMIT = "the machine's limit"  # answers as the engines do, and does no round
OURS, SERIAL, SEARCH = "fedtune, pool", "fedtune, serial", f"fedtune, pool, {IN_FLIGHT} trials"
BY_TORCH = "fedtune, pool, torch"
FLOWER, PFL, FLUKE = (str(python_of(peer)) for peer in ("flower", "pfl", "fluke"))
ENGINES = {
    LIMIT: Engine(sys.executable, "limit.py", (), 1),
    OURS: Engine(sys.executable, "with_fedtune.py", ("pool", "1", "compiled"), 1),
    SEARCH: Engine(sys.executable, "with_fedtune.py", ("pool", str(IN_FLIGHT), "compiled"), 1),
    SERIAL: Engine(sys.executable, "with_fedtune.py", ("serial", "1", "compiled"), 1),
    BY_TORCH: Engine(sys.executable, "with_fedtune.py", ("pool", "1", "torch"), 1),
    "Flower on Ray": Engine(FLOWER, "with_flower.py", (), 1),
    "pfl": Engine(PFL, "with_pfl.py", ("1",), 1),
    "pfl, threads": Engine(PFL, "with_pfl.py", ("1",), CORES),
    "pfl, processes": Engine(PFL, "with_pfl.py", (str(CORES),), 1),
    "fluke": Engine(FLUKE, "with_fluke.py", (), 1),
    "fluke, threads": Engine(FLUKE, "with_fluke.py", (), CORES),
    "plain": Engine(sys.executable, "plain_loop.py", (), 1),
    "plain, threads": Engine(sys.executable, "plain_loop.py", (), CORES),
}
EQUAL = OURS, SEARCH, SERIAL  # to the bit
# One thread for each core gains nothing if an operation takes microseconds, and loses much if the cores are busy. The
# compiled kernel does not have the CNN, so OURS is BY_TORCH there.
LARGE = ["cnn", "leaf_lstm"]
ONLY_FOR = {
    BY_TORCH: ["logistic", "mlp", "lstm", "leaf_lstm"],
    SEARCH: ["logistic", "mlp", "lstm", "cnn"],  # with LEAF's LSTM it would take too long
    "pfl, threads": LARGE,
    "fluke, threads": LARGE,
    "plain, threads": LARGE,
}
RIVALS = {  # each with the ways to run it; the fastest way counts
    "pfl": ["pfl", "pfl, threads", "pfl, processes"],
    "Flower on Ray": ["Flower on Ray"],
    "fluke": ["fluke", "fluke, threads"],
    "plain": ["plain", "plain, threads"],
    BY_TORCH: [BY_TORCH],
}
STARTED = {  # the engines whose start and memory are measured, by model
    "logistic": [OURS, "Flower on Ray", "pfl", "plain"],
    "cnn": [OURS, "Flower on Ray"],
}


def installed(engine: Engine) -> bool:
    """Whether the engine's interpreter exists; those of the peers are made by peers.py."""
    return Path(engine.python).exists()


def engines_for(model: str, without: list[str]) -> dict[str, Engine]:
    """The engines that are measured with this model, except those that are not installed."""
    return {
        name: engine
        for name, engine in ENGINES.items()
        if model in ONLY_FOR.get(name, [model]) and installed(engine) and name not in without
    }

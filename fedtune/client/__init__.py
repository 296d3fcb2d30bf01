"""The work of one client: its tasks, its examples, the flat model, training and measuring.

Local SGD itself is in `clients/fedtune_clients`: `work` calls the functions of a client program. The public names here
are the names that a client program needs:

    ClientProgram   what a client program must define
    CompiledModel   what a client program may make of a model, to train it faster
    Config, Hyperparameter, Number    its configuration, and the ranges that it declares
    Examples, StoredExamples    a client's examples, as a model gets them and as they are stored
    FlatModel       the model, with its weights in one flat tensor

A name is imported when it is first used, so that `import fedtune.client` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.client.compiled_model import CompiledModel
    from fedtune.client.examples import Examples, StoredExamples
    from fedtune.client.flat_model import FlatModel
    from fedtune.client.program import ClientProgram
    from fedtune.tuning.space import Config, Hyperparameter, Number

__all__ = [
    "ClientProgram",
    "CompiledModel",
    "Config",
    "Examples",
    "FlatModel",
    "Hyperparameter",
    "Number",
    "StoredExamples",
]

_MODULES = {
    "ClientProgram": "fedtune.client.program",
    "CompiledModel": "fedtune.client.compiled_model",
    "Config": "fedtune.tuning.space",
    "Examples": "fedtune.client.examples",
    "FlatModel": "fedtune.client.flat_model",
    "Hyperparameter": "fedtune.tuning.space",
    "Number": "fedtune.tuning.space",
    "StoredExamples": "fedtune.client.examples",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)

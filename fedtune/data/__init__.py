"""Everybody's examples: how a federated data set is made, checked and partitioned, and where its files come from.

A data-set plug-in needs nothing from the modules below. They are imported when one of their names is first used, so
that `import fedtune.data` stays quick.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedtune.data.federated_dataset import FederatedDataset

if TYPE_CHECKING:
    from fedtune.data.checks import check as check
    from fedtune.data.checks import find_problems as find_problems
    from fedtune.data.formats.clients import from_clients as from_clients
    from fedtune.data.formats.clients import from_hub as from_hub
    from fedtune.data.formats.clients import from_torch as from_torch
    from fedtune.data.formats.folders import from_folder as from_folder
    from fedtune.data.formats.leaf import from_leaf as from_leaf
    from fedtune.data.formats.leaf_arrays import LeafArrays as LeafArrays
    from fedtune.data.formats.leaf_arrays import read_leaf as read_leaf
    from fedtune.data.formats.tables import from_frame as from_frame
    from fedtune.data.formats.tables import from_table as from_table
    from fedtune.data.formats.text import CHARACTER_CLASSES as CHARACTER_CLASSES
    from fedtune.data.formats.text import encode_characters as encode_characters
    from fedtune.data.partition import make_partition as make_partition
    from fedtune.data.parts import PARTS as PARTS
    from fedtune.data.parts import part_sizes as part_sizes
    from fedtune.data.problems import BadDataError as BadDataError
    from fedtune.data.problems import Problem as Problem
    from fedtune.data.sources import GzipMirror as GzipMirror
    from fedtune.data.sources import NpmPackage as NpmPackage
    from fedtune.data.sources import PipArchive as PipArchive
    from fedtune.data.sources import Source as Source
    from fedtune.data.sources import cache_folder as cache_folder
    from fedtune.data.sources import fetch as fetch
    from fedtune.data.spec import IGNORED as IGNORED
    from fedtune.data.spec import DatasetSpec as DatasetSpec
    from fedtune.data.stats import statistics as statistics

_MODULES = {
    "BadDataError": "problems",
    "CHARACTER_CLASSES": "formats.text",
    "DatasetSpec": "spec",
    "GzipMirror": "sources",
    "IGNORED": "spec",
    "LeafArrays": "formats.leaf_arrays",
    "NpmPackage": "sources",
    "PARTS": "parts",
    "PipArchive": "sources",
    "Problem": "problems",
    "Source": "sources",
    "cache_folder": "sources",
    "check": "checks",
    "encode_characters": "formats.text",
    "fetch": "sources",
    "find_problems": "checks",
    "from_clients": "formats.clients",
    "from_folder": "formats.folders",
    "from_frame": "formats.tables",
    "from_hub": "formats.clients",
    "from_leaf": "formats.leaf",
    "from_table": "formats.tables",
    "from_torch": "formats.clients",
    "make_partition": "partition",
    "part_sizes": "parts",
    "read_leaf": "formats.leaf_arrays",
    "statistics": "stats",
}
__all__ = ["FederatedDataset", *_MODULES]


def __getattr__(name: str) -> Any:
    """A public name, from the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _method(name: str) -> Callable[..., Any]:
    """The public function of that name; its module is imported when it is called."""

    def method(*arguments: Any, **options: Any) -> Any:
        return __getattr__(name)(*arguments, **options)

    method.__doc__ = f"The same as `fedtune.data.{name}`, which describes the arguments."
    return method


# The class declares these, but its module must not know the readers and the checks, since they know the class.
FederatedDataset.from_clients = staticmethod(_method("from_clients"))
FederatedDataset.from_torch = staticmethod(_method("from_torch"))
FederatedDataset.from_hub = staticmethod(_method("from_hub"))
FederatedDataset.from_frame = staticmethod(_method("from_frame"))
FederatedDataset.from_folder = staticmethod(_method("from_folder"))
FederatedDataset.from_leaf = staticmethod(_method("from_leaf"))
FederatedDataset.check = _method("check")
FederatedDataset.stats = _method("statistics")

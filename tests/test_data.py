"""The public names of fedtune.data, and the methods that it adds to FederatedDataset."""

import ast
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from flwr_datasets.partitioner import IidPartitioner
from torch.utils.data import TensorDataset

import datasets
import fedtune.data
from fedtune.data import FederatedDataset, from_clients
from fedtune.data.formats.leaf_export import export_leaf

ROOT = Path(__file__).parent.parent


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_names_for_type_checkers_are_those_of_the_table():
    body = ast.parse(Path(fedtune.data.__file__).read_text()).body
    block = next(node for node in body if isinstance(node, ast.If))
    shown = {alias.asname: node.module for node in block.body for alias in node.names}
    assert shown == {name: f"fedtune.data.{module}" for name, module in fedtune.data._MODULES.items()}


def test_every_public_name_is_there_and_described():
    for name in fedtune.data.__all__:
        value = getattr(fedtune.data, name)
        assert not callable(value) or value.__doc__, name


def test_no_module_hides_a_public_name():
    modules = {module.name for module in pkgutil.iter_modules(fedtune.data.__path__)}
    assert modules & {*fedtune.data.__all__} == set()


@pytest.mark.parametrize("pattern", ["docs/*.md", "docs/algorithms/*.md", "datasets/*.md", "datasets/*/*.py"])
def test_docs_and_plug_ins_import_from_no_deeper_path(pattern):
    texts = {path: path.read_text() for path in ROOT.glob(pattern)}
    assert texts
    assert {path for path, text in texts.items() if re.search(r"(from|import) fedtune\.data\.", text)} == set()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'fedtune\.data' has no attribute 'from_excel'"):
        fedtune.data.from_excel  # noqa: B018


def test_importing_the_package_imports_no_large_library():
    loaded = run_python("import fedtune.data, json, sys; print(json.dumps([*sys.modules]))")
    assert {"pandas", "torch", "pyarrow", "sklearn", "datasets", "PIL"} & {*json.loads(loaded)} == set()


def test_the_methods_are_there_when_only_the_module_of_the_class_is_imported():
    code = """
from fedtune.data.federated_dataset import FederatedDataset
dataset = FederatedDataset.from_clients({"a": ([[0.0], [1.0], [2.0]], [0, 1, 1])}, name="three")
print(dataset.check(), dataset.stats()["examples"])
"""
    assert run_python(code) == "[] 3\n"


def clients():
    draws = np.random.default_rng(0)
    return {name: (draws.normal(size=(10, 2)).astype(np.float32), draws.integers(0, 2, 10)) for name in "ab"}


def rows():
    """The table of the same examples: client, two features, label."""
    pairs = [(client, *example) for client, arrays in clients().items() for example in zip(*arrays, strict=True)]
    return [(client, *x.tolist(), int(y)) for client, x, y in pairs]


def arguments_of(name, folder):
    """The arguments with which a function makes a data set of the two clients; its files go into the folder."""
    folder.mkdir()
    if name == "from_torch":
        tensors = {client: map(torch.from_numpy, pair) for client, pair in clients().items()}
        return ({client: TensorDataset(*pair) for client, pair in tensors.items()},), {"name": "two"}
    if name == "from_hub":
        table = datasets.Dataset.from_dict({"x": [row[1:3] for row in rows()], "y": [row[3] for row in rows()]})
        return (table, IidPartitioner(2)), {"name": "two", "x": "x", "y": "y"}
    if name == "from_frame":
        table = pd.DataFrame(rows(), columns=["client", "height", "age", "label"])
        return (table,), {"client": "client", "label": "label"}
    if name == "from_folder":
        for client, (x, y) in clients().items():
            np.savez(folder / f"{client}.npz", x=x, y=y)
        return (folder,), {}
    if name == "from_leaf":
        export_leaf(from_clients(clients(), name="two"), folder / "leaf")
        return (folder / "leaf",), {}
    return (clients(),), {"name": "two"}


@pytest.mark.parametrize("name", ["from_clients", "from_torch", "from_hub", "from_frame", "from_folder", "from_leaf"])
def test_a_method_of_the_class_makes_what_the_function_makes(name, tmp_path):
    made = []
    for number, home in enumerate([fedtune.data, FederatedDataset]):
        arguments, options = arguments_of(name, tmp_path / str(number))
        made.append(getattr(home, name)(*arguments, seed=3, **options))
    ours, theirs = made
    assert isinstance(ours, FederatedDataset)
    assert (ours.spec, ours.client_ids) == (theirs.spec, theirs.client_ids)
    assert ours.num_clients == 2
    for array in ("x", "y", "ranges"):
        assert getattr(ours, array).tobytes() == getattr(theirs, array).tobytes()
    assert ours.check() == fedtune.data.check(ours) == []
    assert ours.stats() == fedtune.data.statistics(ours)


def test_the_method_check_is_the_function():
    dataset = from_clients({"a": (np.full((5, 1), np.nan), np.zeros(5, int)), "b": ([[1.0]] * 5, [0] * 5)}, name="bad")
    assert dataset.check() == fedtune.data.check(dataset)
    assert dataset.check() == ["client 'a': x must be finite, got NaN or infinity in 5 of its examples"]

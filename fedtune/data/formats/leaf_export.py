"""Writes data sets in the JSON form of LEAF, which `fedtune.data.formats.leaf` reads."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.formats.leaf import EXTRA
from fedtune.data.formats.text import decode_rows
from fedtune.data.parts import PARTS
from fedtune.data.problems import first_of, repeated_ids
from fedtune.errors import InputError
from fedtune.files import new_folder


def export_leaf(dataset: FederatedDataset, folder: str | Path, *, users_per_file: int = 100) -> None:
    """Writes the data set into a new folder, from which `from_leaf` makes the same data set again, bit for bit.

    The folder appears only when it is complete. The numbers of an example become one list, as in LEAF's files; windows
    of LEAF's characters become strings. The text of one user is in memory at a time.
    """
    folder = Path(folder)
    if users_per_file < 1:
        raise InputError(f"users_per_file must be >= 1, got {users_per_file}")
    if folder.exists():
        raise InputError(f"{folder} must be a new folder, but it exists")
    if repeated := repeated_ids(dataset.client_ids):
        raise InputError(first_of(repeated))
    with new_folder(folder) as complete:
        for number, part in enumerate(PARTS):
            (complete / part).mkdir(parents=True)
            clients = [client for client, size in enumerate(dataset.sizes()[:, number].tolist()) if size]
            for first in range(0, len(clients), users_per_file):
                file = complete / part / f"{first // users_per_file:06d}.json"
                with file.open("w", encoding="ascii", newline="\n") as stream:
                    _write_file(stream, dataset, part, clients[first : first + users_per_file])
        (complete / EXTRA).write_text(json.dumps(_extra(dataset)), encoding="ascii", newline="\n")


def _write_file(stream: TextIO, dataset: FederatedDataset, part: str, clients: Sequence[int]) -> None:
    sizes = dataset.num_examples(part)
    users = [dataset.client_ids[client] for client in clients]
    lists: dict[str, Any] = {"users": users, "num_samples": [int(sizes[client]) for client in clients]}
    if dataset.leaf.hierarchies is not None:
        lists["hierarchies"] = [dataset.leaf.hierarchies[client] for client in clients]
    head = json.dumps(lists)
    stream.write(f'{head[:-1]}, "user_data": {{')
    for place, client in enumerate(clients):
        stream.write(", " if place else "")
        stream.write(f"{json.dumps(dataset.client_ids[client])}: {json.dumps(_user_data(dataset, client, part))}")
    stream.write("}}\n")


def _user_data(dataset: FederatedDataset, client: int, part: str) -> dict[str, Any]:
    x, y = dataset.examples(client, part)
    if dataset.leaf.characters:
        return {"x": decode_rows(x), "y": decode_rows(y[:, None])}
    return {"x": x.reshape(len(x), -1).tolist() if x.ndim > 1 else x.tolist(), "y": y.tolist()}


def _extra(dataset: FederatedDataset) -> dict[str, Any]:
    """What LEAF's form can't hold, for `fedtune.json`."""
    return {
        "name": dataset.name,
        "spec": dataclasses.asdict(dataset.spec),
        "x_dtype": dataset.x.dtype.str,
        "y_dtype": dataset.y.dtype.str,
        "characters": dataset.leaf.characters,
        "client_ids": list(dataset.client_ids),
    }

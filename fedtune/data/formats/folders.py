"""Data sets of folders, in one of four forms.

site_a.npz, site_b.npz …                 a client's arrays x and y
site_a.csv, site_b.csv … (or .parquet)   a client's table, with a label column
site_a/cat/1.png, site_a/dog/2.png …     a client's images, in one folder for each class
x.npy, y.npy, sizes.npy                  the examples of all clients one after another, which may be larger than the
                                         memory, since they are mapped; and how many examples each client has
"""

import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.formats.clients import from_clients
from fedtune.data.formats.tables import SUFFIXES, from_frame, read_frame
from fedtune.data.reading import check_memory, reading
from fedtune.errors import InputError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp")
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")  # whatever the file's name ends in
ARRAYS = ("x.npy", "y.npy", "sizes.npy")


def from_folder(
    path: str | Path,
    *,
    label: str = "label",
    features: Sequence[str] | None = None,
    objective: str = "classification",
    input_kind: str = "real",
    num_classes: int | None = None,
    scale: float | None = None,
    standardize: bool = True,
    seed: int = 0,
) -> FederatedDataset:
    """The data set of a folder; a client's id is the name of its file or folder.

    `label`, `features` and `standardize` are for tables, as in `from_frame`; tables take no `input_kind`, `num_classes`
    and `scale`. `scale` None means 1 / 255 for images and 1 for everything else. `seed` draws the parts of each client,
    except for the arrays of all clients: there a client's parts are its first examples, the next and the last.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"the folder {folder} does not exist")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    suffixes = {entry.suffix for entry in entries}
    options: dict[str, Any] = {"name": folder.name, "objective": objective}
    arrays: dict[str, Any] = {
        "input_kind": input_kind,
        "num_classes": num_classes,
        "scale": 1.0 if scale is None else scale,
    }
    if {entry.name for entry in entries} >= set(ARRAYS):
        return _from_whole_arrays(folder, **options, **arrays)
    if entries and all(entry.is_dir() for entry in entries):
        if scale is None:
            arrays["scale"] = 1 / 255
        return _from_images(entries, seed=seed, **options, **arrays)
    if suffixes == {".npz"}:
        check_memory(f"the arrays in {folder}", sum(_unpacked_bytes(entry) for entry in entries))
        clients = {entry.stem: _read_npz(entry) for entry in entries}
        return from_clients(clients, seed=seed, **options, **arrays)
    if len(suffixes) == 1 and suffixes <= set(SUFFIXES):
        return _from_tables(entries, label=label, features=features, standardize=standardize, seed=seed, **options)
    raise InputError(_unknown_form(folder, entries))


def _from_whole_arrays(folder: Path, **options: Any) -> FederatedDataset:
    """The data set of the arrays of all clients; the options are those of `FederatedDataset.from_arrays`."""
    x, y, sizes = (_load_array(folder / name) for name in ARRAYS)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu":
        raise InputError(
            f"{folder / ARRAYS[2]} must hold a whole number for each client, got {sizes.dtype} of shape {sizes.shape}"
        )
    return FederatedDataset.from_arrays(x, y, sizes, **options)


def _from_images(clients: Sequence[Path], *, num_classes: int | None, **options: Any) -> FederatedDataset:
    """The data set of a folder of images for each client; the options are those of `from_clients`."""
    images, classes = _read_images(clients)
    return from_clients(images, num_classes=len(classes) if num_classes is None else num_classes, **options)


def _from_tables(files: Sequence[Path], **options: Any) -> FederatedDataset:
    """The data set of a table for each client; the options are those of `from_frame`."""
    import pandas as pd  # not above: worker processes never need it

    frames = {file.stem: read_frame(file) for file in files}
    if taken := [file.name for file in files if "client" in frames[file.stem].columns]:
        raise InputError(f"a client's table must have no column 'client', got one in {taken[0]}")
    parts = [frame.assign(client=client) for client, frame in frames.items()]
    return from_frame(pd.concat(parts, ignore_index=True), client="client", **options)


def _unknown_form(folder: Path, entries: Sequence[Path]) -> str:
    """The message that says what a folder must hold and what this one holds, the rarest kind first."""
    kind_of = {entry.name: "/" if entry.is_dir() else entry.suffix for entry in entries}
    count = Counter(kind_of.values())
    # The rarest kind is most likely the mistake.
    odd_first = sorted(kind_of, key=lambda name: (count[kind_of[name]], name))
    return (
        f"a folder of clients must hold only .npz files, only tables ({' or '.join(SUFFIXES)}), only folders of "
        f"images, or {', '.join(ARRAYS)}, got {', '.join(odd_first[:5]) or 'nothing'} in {folder}"
    )


def _load_array(path: Path) -> np.ndarray:
    with reading(path, f"{path} can't be read as an array"):
        array = np.load(path, mmap_mode="r")
        if not isinstance(array, np.ndarray) or array.ndim == 0:
            raise ValueError("it must hold one array with an axis of examples or clients")
        return _native(array)


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with reading(path, f"{path} can't be read as arrays"), np.load(path) as arrays:
        if missing := [name for name in ("x", "y") if name not in arrays]:
            raise InputError(f"{path} must hold the arrays x and y, got no {missing[0]}")
        return _native(arrays["x"]), _native(arrays["y"])


def _native(array: np.ndarray) -> np.ndarray:
    """The array with its numbers in this machine's order of bytes; it is copied if they are in the other one."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _unpacked_bytes(path: Path) -> int:
    """How many bytes the arrays in a .npz file take."""
    with reading(path, f"{path} can't be read as arrays"), zipfile.ZipFile(path) as archive:
        return sum(member.file_size for member in archive.infolist())


def _read_images(clients: Sequence[Path]) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """The images of each client, and the names of the classes: the folders of all clients in alphabetical order."""
    found = {client.name: list(_images(client)) for client in clients}
    classes = sorted({path.parent.name for paths in found.values() for path in paths})
    if not classes:
        raise InputError(f"a client's folder must hold a folder of images a class, got none in {clients[0].parent}")
    data = {}
    num_images = sum(map(len, found.values()))
    for client, paths in found.items():
        for path in paths[:1]:
            check_memory(f"the images in {clients[0].parent}", _read_image(path).nbytes * num_images)
        images = [_read_image(path) for path in paths]
        if len({image.shape for image in images}) > 1:
            first = next(path for path, image in zip(paths, images, strict=True) if image.shape != images[0].shape)
            raise InputError(f"all images must have the shape {images[0].shape} of {paths[0]}, got another in {first}")
        x = np.stack(images) if images else np.empty(0, np.uint8)
        data[client] = (x, np.array([classes.index(path.parent.name) for path in paths], np.int64))
    return data, classes


def _images(client: Path) -> Iterator[Path]:
    return (path for path in sorted(client.glob("*/*")) if path.suffix.lower() in IMAGES)


def _read_image(path: Path) -> np.ndarray:
    """Grey levels of shape (height, width), or colours of shape (3, height, width)."""
    from PIL import Image

    with reading(path, f"the image {path} can't be read"), warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # Not any format that Pillow knows: it would call another program for some of them.
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.mode in ("1", "L", "I;16", "LA"):
                return np.asarray(image.convert("L"))
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)

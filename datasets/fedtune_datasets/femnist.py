"""FEMNIST: handwritten digits and letters. Each writer is a client (LEAF: Caldas et al. 2018, arXiv 1812.01097).

The images come from the Hugging Face hub or from a folder of LEAF's JSON files. In both cases an image is as in LEAF:
upright, and black on white (MNIST's images are white on black). Images are held as bytes; a model gets LEAF's numbers,
from 0 for ink to 1 for paper. Classes 0–9 are the digits, 10–35 the capital letters, 36–61 the small letters.

`fraction` and `min_samples` are LEAF's options. Writers are taken in random order until they hold that fraction of all
images; the last writer loses images so that the fraction is exact. Then writers with too few images are left out.

Departures from LEAF: the fraction is of all files together, a writer with exactly min_samples images is kept, and a
writer's parts are drawn from all images of the writer, whatever part of LEAF's folder holds them. LEAF's own split is
used by `fedtune train FOLDER`.
"""

import hashlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from fedtune import rng
from fedtune.data import FederatedDataset, Problem, cache_folder, read_leaf
from fedtune.errors import InputError, UnknownNameError
from fedtune.files import new_folder, replacing
from fedtune_datasets.sampling import MIN_SAMPLES, check_sampling

SETTINGS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("femnist.toml").read_text(encoding="utf-8"))
CLASSES = {"all": 62, "digits": 10}
SIDE = 28
HUB_NAME = "flwrlabs/femnist"
REVISION = "df739a2b09df2b5cc1ec93107659b9a9a8566487"  # the commit of the data set on the hub
HUB_TIMEOUT = 5.0  # seconds in which the hub must answer; its own client would try again for more than 30 seconds
BATCH = 1000  # images that are decoded at a time


class Images(NamedTuple):
    """The images of all writers, one writer after another in the order of their names."""

    x: UInt8[np.ndarray, "image 28 28"]
    y: Int64[np.ndarray, "image"]
    sizes: Integer[np.ndarray, "writer"]
    writers: list[str]
    tolerated: list[Problem]


def prepare() -> Path:
    """The folder of the hub's images as arrays, verified; they are downloaded if it is missing.

    The checksums of the first download are kept beside the folder. Everything later is compared with them, a second
    download too.
    """
    folder = cache_folder("femnist") / f"hub-{REVISION[:12]}"
    checksums = folder.with_suffix(".json")
    if folder.is_dir():
        if different := _different(folder, checksums):
            raise InputError(
                f"{folder} is damaged: {different} has not the checksum in {checksums}; remove it, then `fedtune data "
                "prepare femnist`"
            )
        return folder
    images = _ask_hub()
    with new_folder(folder) as complete:
        _save(images, complete)
        if different := _different(complete, checksums):
            raise InputError(
                f"{HUB_NAME} must be what was downloaded first, but {different} has not the checksum in {checksums}; "
                "to accept the new one, remove that file"
            )
    return folder


def load(
    *,
    folder: str | None = None,
    classes: str = "all",
    fraction: float = 1.0,
    min_samples: int = MIN_SAMPLES,
    max_samples: int | None = None,
    seed: int = 0,
) -> FederatedDataset:
    """The images of the `classes` "all" or "digits", by writer, from LEAF's files in `folder`; None means from the hub.

    Writers with fewer than min_samples images are left out. If a writer has more than max_samples images, only
    max_samples of them are used, drawn at random; None means all.
    """
    if classes not in CLASSES:
        raise UnknownNameError("classes", classes, CLASSES)
    check_sampling(fraction, min_samples, max_samples)
    images = _read_saved(prepare()) if folder is None else _read_leaf(Path(folder))
    own = _of_classes(images, CLASSES[classes])
    wanted = _fraction_of(np.array([len(chosen) for chosen in own]), fraction, seed)
    kept = np.flatnonzero(wanted >= min_samples).tolist()
    if not kept:
        raise InputError(
            f"fraction and min_samples must leave a writer, got {fraction} and {min_samples}; the most that one of "
            f"{len(own)} then has is {wanted.max()}"
        )
    indices = [
        rng.stream(seed, "images", writer).permutation(own[writer])[: wanted[writer]][:max_samples] for writer in kept
    ]
    dataset = FederatedDataset.from_partition(
        images.x, images.y, indices, name="femnist", num_classes=CLASSES[classes], scale=1 / 255, seed=seed
    )
    return replace(dataset, client_ids=[images.writers[writer] for writer in kept], tolerated=images.tolerated)


def _different(folder: Path, checksums: Path) -> str | None:
    """The first file in the folder whose SHA-256 is not the recorded one; None if there is none.

    If nothing is recorded yet, the checksums are recorded.
    """
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        recorded = json.loads(checksums.read_text(encoding="utf-8"))
    except FileNotFoundError:
        recorded = found
        with replacing(checksums) as path:
            path.write_text(json.dumps(found, indent=1), encoding="utf-8", newline="\n")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{checksums} must hold the checksums of a download, got {error}") from None
    if not isinstance(recorded, dict):
        raise InputError(f"{checksums} must hold the checksums of a download, got {recorded!r:.40}")
    return next((name for name in {**recorded, **found} if recorded.get(name) != found.get(name)), None)


def _of_classes(images: Images, num_classes: int) -> list[Int64[np.ndarray, "_"]]:
    """The positions of each writer's images of the first classes. Labels outside all classes stay, for the check."""
    ends = images.sizes.cumsum()
    used = (images.y < num_classes) | (images.y >= max(CLASSES.values()))
    return [
        start + np.flatnonzero(used[start:stop])
        for start, stop in zip((ends - images.sizes).tolist(), ends.tolist(), strict=True)
    ]


def _fraction_of(sizes: Int64[np.ndarray, "writer"], fraction: float, seed: int) -> Int64[np.ndarray, "writer"]:
    """How many images of each writer are used, for a fraction of all images."""
    order = rng.stream(seed, "writers").permutation(len(sizes))
    missing = int(fraction * sizes.sum()) - (sizes[order].cumsum() - sizes[order])
    wanted = np.empty_like(sizes)
    wanted[order] = np.clip(missing, 0, sizes[order])
    return wanted


def _read_leaf(folder: Path) -> Images:
    """The images in LEAF's files."""
    tolerated: list[Problem] = []
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for writer, place, x, y in read_leaf(folder, (SIDE, SIDE), tolerated):
        if not (x.min() >= 0 and x.max() <= 1):
            raise InputError(f"{place}: x must be in 0..1, got {x.min()} to {x.max()}")
        found.setdefault(writer, []).append((np.rint(x * 255).astype(np.uint8), y))
    if not found:
        raise InputError(f"{folder} must hold at least one user, got none")
    writers = sorted(found)
    pairs = [pair for writer in writers for pair in found[writer]]
    sizes = [sum(len(y) for _, y in found[writer]) for writer in writers]
    x, y = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return Images(x, y, np.array(sizes), writers, tolerated)


def _ask_hub() -> Any:
    """The `datasets.Dataset` of this revision on the hub. Raises InputError if the hub does not give it."""
    from huggingface_hub import HfApi

    import datasets  # takes a second

    hub = HfApi()
    try:
        hub.dataset_info(HUB_NAME, revision=REVISION, timeout=HUB_TIMEOUT)
        return datasets.load_dataset(HUB_NAME, split="train", revision=REVISION)
    except Exception as error:  # several libraries raise errors that have no class in common
        raise InputError(
            f"cannot get {HUB_NAME} from {hub.endpoint}: {' '.join(str(error).split()) or type(error).__name__}. Go "
            "online, then `fedtune data prepare femnist`; or make LEAF's files (https://github.com/TalwalkarLab/leaf, "
            "data/femnist) and use them with `--set data.folder=PATH`"
        ) from error


def _save(images: Any, folder: Path) -> None:
    """Writes the hub's data set as arrays, sorted by writer. The images of a writer keep their order."""
    for column in ("image", "writer_id", "character"):
        if column not in images.column_names:
            raise UnknownNameError(f"column of {HUB_NAME}", column, images.column_names)
    writers, codes = np.unique(np.array(images["writer_id"][:]), return_inverse=True)
    order = np.argsort(codes, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    x = np.lib.format.open_memmap(folder / "x.npy", "w+", np.uint8, (len(order), SIDE, SIDE))
    pictures = images.select_columns("image").with_format("numpy")
    for start in range(0, len(order), BATCH):
        batch = np.asarray(pictures[start : start + BATCH]["image"])
        if batch.shape[1:] != (SIDE, SIDE) or batch.dtype != np.uint8:
            raise InputError(
                f"images of {HUB_NAME} must be 28 x 28 bytes, got {batch.dtype} of shape {batch.shape[1:]}"
            )
        x[place[start : start + BATCH]] = batch
    x.flush()
    np.save(folder / "y.npy", np.array(images["character"][:], np.int64)[order])
    np.save(folder / "sizes.npy", np.bincount(codes))
    (folder / "writers.json").write_text(json.dumps(writers.tolist()), encoding="utf-8", newline="\n")


def _read_saved(folder: Path) -> Images:
    """The images that `_save` wrote."""
    try:
        x, y, sizes = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in Images._fields[:3])
        writers = json.loads((folder / "writers.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{folder} is damaged: {error}; remove it, then `fedtune data prepare femnist`") from error
    return Images(np.asarray(x), np.asarray(y), np.asarray(sizes), writers, [])

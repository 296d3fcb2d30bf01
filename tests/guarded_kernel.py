"""A process that does jobs of the kernel in guarded memory; tests/test_kernel_fuzz.py starts it.

Each array has memory pages of its own. The page behind it, or the page before it, can't be read, and what the kernel
must not write can't be written. So an access outside an array ends the process, and the test sees that.
"""

import ctypes
import json
import mmap
import sys

import numpy as np

from fedtune_clients.kernel_library import Job, Library, load_library

PAGE = mmap.PAGESIZE
UNTOUCHED = 0xA5
PROTECT_NONE, PROTECT_READ = 0, 1
MPROTECT = ctypes.CDLL(None, use_errno=True).mprotect
MPROTECT.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Guarded:
    """A copy of an array, which ends where its pages end (`at_end`) or begins where they begin."""

    def __init__(self, values: np.ndarray, at_end: bool, writable: bool) -> None:
        values = np.ascontiguousarray(values)
        room = -(-max(values.nbytes, 1) // PAGE) * PAGE
        self._map = mmap.mmap(-1, room + 2 * PAGE)
        self._pages = np.frombuffer(self._map, np.uint8)
        self._pages[:] = UNTOUCHED
        begin = PAGE + (room - values.nbytes if at_end else 0)
        self._inside = slice(begin, begin + values.nbytes)
        self._pages[self._inside] = values.reshape(-1).view(np.uint8)
        self.address = self._pages.ctypes.data + begin
        start = self._pages.ctypes.data
        protect(start, PAGE, PROTECT_NONE)
        protect(start + PAGE + room, PAGE, PROTECT_NONE)
        if not writable:
            protect(start + PAGE, room, PROTECT_READ)
        self._room = slice(PAGE, PAGE + room)

    def bytes(self) -> bytes:
        """What the array holds."""
        return self._pages[self._inside].tobytes()

    def is_whole(self) -> bool:
        """Whether nothing was written beside the array, on its pages."""
        beside = np.delete(self._pages[self._room], np.arange(self._inside.start, self._inside.stop) - PAGE)
        return bool((beside == UNTOUCHED).all())


def protect(address: int, size: int, how: int) -> None:
    """Sets what can be done with memory pages."""
    if MPROTECT(address, size, how):
        raise OSError(ctypes.get_errno(), "mprotect")


def do(job: dict, library: Library, background: int) -> tuple[int, bool, list[bytes]]:
    """The kernel's status, whether it wrote into its arrays only, and what these hold.

    Each byte of the memory that it works in is `background` at first.
    """
    rng = np.random.default_rng(job["seed"])
    n, rows, width = job["num_examples"], np.array(job["rows"], np.int64), job["width"]
    x = {
        "uint8": rng.integers(0, min(job["num_tokens"], 256), (n, width)).astype(np.uint8),
        "float32": rng.standard_normal((n, width)).astype(np.float32),
        "int64": rng.integers(0, job["num_tokens"], (n, width)),
    }[job["x"]]
    if job["token"] is not None:
        x[job["place"] % n, width - 1] = job["token"]
    targets = rng.standard_normal((n, job["num_outputs"])).astype(np.float32)
    labels = rng.integers(0, job["num_outputs"], n)
    if job["label"] is not None:
        labels[job["place"] % n] = job["label"]
    weights = 0.3 * rng.standard_normal((3, job["num_weights"])).astype(np.float32)
    kept = rng.integers(0, 2, job["num_kept"]).astype(np.float32)

    def guarded(values: np.ndarray, writable: bool = False) -> Guarded:
        return Guarded(values, job["at_end"], writable)

    inputs = {
        "layers": guarded(np.array(job["layers"], np.int64)),
        "x": guarded(x),
        "y": guarded(targets if job["objective"] == 1 else labels),
        "rows": guarded(rows),
        "sent": guarded(weights[1]) if job["has_sent"] else None,
        "kept": guarded(kept) if job["has_kept"] else None,
    }
    outputs = {
        "weights": guarded(weights[0], writable=True),
        "velocity": guarded(weights[2], writable=True) if job["has_velocity"] else None,
        "losses": guarded(np.zeros(len(rows), np.float32), writable=True),
        "errors": guarded(np.zeros(len(rows), np.float32), writable=True),
    }
    addresses = {name: array.address for name, array in (inputs | outputs).items() if array}
    numbers = {name: job[name] for name in ("num_weights", "num_examples", "width", "batch_size", "objective")}
    asked = Job(
        **addresses,
        **numbers,
        num_layers=job["num_layers"],
        x_stored=job["x_stored"],
        x_stride=x.strides[0],
        scale=0.5,
        num_rows=len(rows),
        rate=0.1,
        momentum=0.9,
        weight_decay=0.01,
        proximal_mu=0.1 if job["has_sent"] else 0,
        dropout=0.5,
        sgemm=library.sgemm,
    )
    needed = library.functions.kernel_memory(asked)
    given = min(max(needed - job["missing"], 0), job["most_memory"])
    memory = guarded(np.full(4 * given, background, np.uint8), writable=True)
    asked.memory, asked.memory_size = memory.address, given
    function = library.functions.kernel_measure if job["measures"] else library.functions.kernel_train
    status = function(asked)
    arrays = [array for array in (*outputs.values(), memory) if array]
    whole = all(array.is_whole() for array in arrays)
    return status, whole, [array.bytes() for array in arrays if array is not memory]


def main() -> None:
    """Does a job for each line of the input, twice, and answers with a line."""
    library = load_library()
    assert isinstance(library, Library), library
    for line in sys.stdin:
        job = json.loads(line)
        (status, whole, first), (_, whole_again, second) = (do(job, library, background) for background in (0, 255))
        print(json.dumps([status, whole and whole_again, first == second]), flush=True)


if __name__ == "__main__":
    main()

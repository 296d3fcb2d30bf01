"""The library of kernel.c: how it is found and loaded, its structure `Job`, and the matrix product that it uses."""

import ctypes
import functools
import hashlib
import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch

from fedtune.operating_system import LIBRARY_SUFFIX

SOURCE = Path(__file__).with_name("kernel.c")
LIBRARY = SOURCE.with_name(f"libkernel{LIBRARY_SUFFIX}")

POINTER, NUM, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Job(ctypes.Structure):
    """The structure `Job` of kernel.c, which says what each field means."""

    _fields_ = (
        ("layers", POINTER),
        ("num_layers", NUM),
        ("weights", POINTER),
        ("num_weights", NUM),
        ("num_examples", NUM),
        ("x", POINTER),
        ("x_stored", NUM),
        ("x_stride", NUM),
        ("width", NUM),
        ("scale", REAL),
        ("y", POINTER),
        ("objective", NUM),
        ("rows", POINTER),
        ("num_rows", NUM),
        ("batch_size", NUM),
        ("rate", REAL),
        ("momentum", REAL),
        ("weight_decay", REAL),
        ("proximal_mu", REAL),
        ("velocity", POINTER),
        ("sent", POINTER),
        ("kept", POINTER),
        ("dropout", REAL),
        ("losses", POINTER),
        ("errors", POINTER),
        ("sgemm", POINTER),
        ("memory", POINTER),
        ("memory_size", NUM),
    )


class Library(NamedTuple):
    """The kernel, loaded, with the matrix product that it uses."""

    functions: ctypes.CDLL
    sgemm: int  # its address
    built_from: str  # the digest of kernel.c, then the compiler, the target and the flags


@functools.cache
def load_library() -> Library | str:
    """The kernel, or why there is none."""
    if platform.machine() in ("x86_64", "AMD64") and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return "the kernel needs a processor with AVX2"
    path = Path(os.environ.get("FEDTUNE_KERNEL_LIBRARY", LIBRARY))
    if not path.exists():
        return f"there is no kernel, {path.name}: `make install` builds it in a checkout"
    try:
        functions = ctypes.CDLL(str(path))
        functions.kernel_built_from.restype = ctypes.c_char_p
        functions.kernel_memory.restype = NUM
        for name in ("kernel_memory", "kernel_train", "kernel_measure"):
            getattr(functions, name).argtypes = [ctypes.POINTER(Job)]
    except (OSError, AttributeError) as error:  # AttributeError: it is another library
        return f"the kernel can't be loaded: {error}"
    built_from = functions.kernel_built_from().decode()
    if built_from.split()[0] != hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]:
        return "the kernel was not built from the present kernel.c: `make install` builds it again"
    sgemm = _find_sgemm()
    if sgemm is None:
        return "torch brings no sgemm, the matrix product of BLAS"
    return Library(functions, sgemm, built_from)


def _find_sgemm() -> int | None:
    """The address of BLAS' sgemm in a library that comes with torch or with the system."""
    folder = Path(torch.__file__).parent
    libraries = [
        *sorted((folder / "lib").glob("libtorch_cpu.*")),
        *sorted(folder.with_name("torch.libs").glob("lib*blas*")),
        Path("/System/Library/Frameworks/Accelerate.framework/Accelerate"),
    ]
    for path in libraries:
        try:
            return ctypes.cast(ctypes.CDLL(str(path)).sgemm_, POINTER).value
        except (OSError, AttributeError):
            continue
    return None

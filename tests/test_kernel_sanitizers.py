"""The kernel, compiled with AddressSanitizer and UndefinedBehaviorSanitizer, passes its own tests."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune_clients.kernel_library import SOURCE

TESTS = Path(__file__).parent
COMPILER = shutil.which("gcc") or shutil.which("clang")
FLAGS = ("-std=c11", "-O1", "-g", "-march=x86-64-v3", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs gcc or clang; zig brings no AddressSanitizer along"),
    pytest.mark.skipif(sys.platform != "linux" or os.uname().machine != "x86_64", reason="needs Linux on x86-64"),
]

# A job whose examples lie behind the end of their array.
READ_OUTSIDE = """
import ctypes, numpy as np
from fedtune_clients.kernel_library import Job, load_library
array = {name: np.zeros(size, dtype) for name, size, dtype in (
    ("layers", 7, np.int64), ("x", 1000, np.float32), ("y", 9, np.int64), ("rows", 9, np.int64),
    ("weights", 1000, np.float32), ("losses", 9, np.float32), ("errors", 9, np.float32), ("memory", 9999, np.float32),
)}
array["layers"][:] = 0, 1000, 1, 0, -1, -1, -1
array["rows"][:] = 8
job = Job(**{name: values.ctypes.data for name, values in array.items()}, num_layers=1, num_weights=1000, width=1000,
    num_examples=9, x_stored=1, x_stride=4000, num_rows=9, batch_size=1, memory_size=9999)
print("status", load_library().functions.kernel_measure(job))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What makes a process use the library that checks itself."""
    library = tmp_path_factory.mktemp("kernel") / "libkernel.so"
    built_from = f'-DBUILT_FROM="{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]} {Path(COMPILER).name}"'
    shared = ("-shared-libasan",) if COMPILER.endswith("clang") else ()
    command = [COMPILER, *FLAGS, *SANITIZERS, *shared, "-Wno-psabi", built_from, SOURCE, "-o", library, "-lm"]
    subprocess.run(command, check=True)
    runtime = "libclang_rt.asan-x86_64.so" if shared else "libasan.so"
    asked = subprocess.run([COMPILER, f"-print-file-name={runtime}"], check=True, capture_output=True, text=True)
    return os.environ | {
        "FEDTUNE_KERNEL_LIBRARY": str(library),
        "LD_PRELOAD": asked.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }


def test_they_see_a_read_outside_an_array(environment):
    done = subprocess.run([sys.executable, "-c", READ_OUTSIDE], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "status" not in done.stdout
    # What lies behind the array may be nothing, or memory that was given back.
    assert re.search("AddressSanitizer: heap-(buffer-overflow|use-after-free)", done.stderr), done.stderr


def test_the_kernel_does_nothing_that_they_see(environment):
    tests = [TESTS / "test_compiled.py", TESTS / "test_kernel_fuzz.py"]
    # Without checks of types at run time: they take most of the time, and the fast tests have them.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-o", "addopts=", *tests]
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    last = done.stdout.splitlines()[-1]
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert re.match(r"\d+ passed in ", last), last  # and none is skipped

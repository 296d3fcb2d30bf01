"""The kernel reads and writes nothing outside the arrays that a job gives it, whatever the job says of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedtune_clients.kernel_library import load_library
from fedtune_clients.layer_table import DROPOUT, EMBEDDING, LAST_STEP, LINEAR, LSTM, RELU, SIGMOID, TANH

pytestmark = [
    pytest.mark.skipif(isinstance(load_library(), str), reason=str(load_library())),
    pytest.mark.skipif(sys.platform == "win32", reason="there is no mprotect"),
]

DONE, BAD_LAYERS, BAD_MEMORY, BAD_ROW, BAD_LABEL, BAD_TOKEN = range(6)  # `enum status` of kernel.c
STORED = ("uint8", "float32", "int64")  # `enum stored`
MOST_NUMBERS = 2**18  # in an array

# Around the 16 lanes of a vector, its tiles, and the most columns of a product by own loops.
sizes = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 48, 64, 65, 70]))


class Table:
    """A table of layers that fit each other, and the flat weights behind it."""

    def __init__(self, width):
        self.rows, self.width, self.num_weights = [], width, 0

    def add(self, kind, num_out, *tensors):
        """Adds a layer; `tensors` are the sizes of its weights, None for one that it does not have."""
        at = [self._take(size) for size in tensors] + [-1] * (4 - len(tensors))
        self.rows.append([kind, self.width, num_out, *at])
        self.width = num_out

    def _take(self, size):
        begin = -1 if size is None else self.num_weights
        self.num_weights += size or 0
        return begin


@st.composite
def tables_of_numbers(draw):
    table = Table(draw(sizes))
    for kind in draw(st.lists(st.sampled_from([LINEAR, LINEAR, RELU, TANH, SIGMOID, DROPOUT]), min_size=1, max_size=6)):
        if kind == LINEAR:
            num_out = draw(sizes)
            table.add(LINEAR, num_out, num_out * table.width, draw(st.sampled_from([num_out, None])))
        else:
            table.add(kind, table.width)
    return table


@st.composite
def tables_of_tokens(draw):
    table = Table(draw(st.integers(1, 40)))
    vector = draw(sizes)
    table.add(EMBEDDING, vector, table.width * vector)
    num_lstms = draw(st.integers(1, 3))
    for number in range(num_lstms):
        num_out = draw(st.one_of(st.integers(1, 18), st.just(33)))
        table.add(LSTM, num_out, 4 * num_out * table.width, 4 * num_out**2, 4 * num_out, 4 * num_out)
        if number == num_lstms - 1:
            table.add(LAST_STEP, num_out)
        if draw(st.booleans()):
            table.add(DROPOUT, num_out)
    num_out = draw(sizes)
    table.add(LINEAR, num_out, num_out * table.width, num_out)
    return table


@st.composite
def jobs(draw):
    """A job whose arrays are as large as it says."""
    table = draw(st.one_of(tables_of_numbers(), tables_of_tokens()))
    is_text = table.rows[0][0] == EMBEDDING
    num_examples = draw(st.integers(1, 40))
    num_rows = draw(st.integers(0, 40))
    x = draw(st.sampled_from(["uint8", "int64"] if is_text else ["uint8", "float32"]))
    job = {
        "layers": table.rows,
        "num_layers": len(table.rows),
        "num_weights": table.num_weights,
        "num_examples": num_examples,
        "width": draw(st.integers(1, 9)) if is_text else table.rows[0][1],
        "num_tokens": table.rows[0][1] if is_text else 256,
        "x": x,
        "x_stored": STORED.index(x),
        "objective": draw(st.sampled_from([0, 1])),
        "rows": draw(st.lists(st.integers(0, num_examples - 1), min_size=num_rows, max_size=num_rows)),
        "batch_size": draw(st.one_of(st.integers(1, 12), st.sampled_from([40, 200, 2**40]))),
        "label": None,
        "token": None,
        "place": draw(st.integers(0, num_examples - 1)),
        "missing": 0,
        "most_memory": 2**24,
        "seed": draw(st.integers(0, 2**32)),
    }
    for name in ("has_velocity", "has_sent", "has_kept", "measures", "at_end"):
        job[name] = draw(st.booleans())
    return complete(job)


def complete(job):
    """The job with the sizes of the arrays that depend on the table of layers."""
    steps, num_kept = job["width"] if job["layers"][0][0] == EMBEDDING else 1, 0
    for kind, _, num_out, *_ in job["layers"]:
        steps = 1 if kind == LAST_STEP else steps
        num_kept += num_out * steps * len(job["rows"]) if kind == DROPOUT else 0
    num_outputs = job["layers"][-1][2]
    fits = 0 <= num_kept <= MOST_NUMBERS and 1 <= num_outputs <= MOST_NUMBERS // job["num_examples"]
    # The arrays of a job that does not fit are small: its table must be refused.
    sizes = {"num_kept": num_kept, "num_outputs": num_outputs} if fits else {"num_kept": 0, "num_outputs": 1}
    return job | sizes | {"has_kept": job["has_kept"] and num_kept > 0}


@pytest.fixture(scope="module")
def kernel():
    process = Kernel()
    yield process
    process.stop()


class Kernel:
    """Another process that does jobs. It is started again if a job ended it."""

    def __init__(self):
        self.process = None

    def do(self, job):
        """The kernel's status. Fails if the process ends, or if the kernel wrote beside an array."""
        if self.process is None:
            script = Path(__file__).with_name("guarded_kernel.py")
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.process = subprocess.Popen([sys.executable, str(script)], **pipes)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            pytest.fail(f"the process ended with exit code {self.stop()}")
        status, wrote_inside_only, repeats = json.loads(answer)
        assert wrote_inside_only
        assert repeats, "the results depend on what was in the memory before"
        return status

    def stop(self):
        process, self.process = self.process, None
        if process is None:
            return None
        process.stdin.close()
        process.stdout.close()
        return process.wait(60)


fuzzed = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@given(job=jobs())
@fuzzed
def test_a_job_that_fits_is_done(kernel, job):
    assert kernel.do(job) == DONE


@given(job=jobs(), data=st.data())
@fuzzed
def test_a_table_that_may_not_fit(kernel, job, data):
    """A number or two of it are others. Then it is refused, or fits after all."""
    layers = [list(row) for row in job["layers"]]
    others = st.one_of(st.integers(-2, 20), st.sampled_from([2**16, 2**29, 2**31, 2**32 + 1, 2**62, -(2**63)]))
    for _ in range(data.draw(st.integers(1, 2))):
        row = data.draw(st.sampled_from(layers))
        row[data.draw(st.integers(0, 6))] = data.draw(others)
    assert kernel.do(complete(job | {"layers": layers})) in (DONE, BAD_LAYERS, BAD_MEMORY, BAD_LABEL, BAD_TOKEN)


@given(job=jobs(), data=st.data())
@fuzzed
def test_numbers_that_do_not_fit_the_arrays(kernel, job, data):
    """Each kind has its status."""
    row, is_text = data.draw(st.sampled_from([*job["rows"], 0])), job["layers"][0][0] == EMBEDDING
    huge = st.sampled_from([-1, -(2**63), 2**31, 2**63 - 1])
    job = job | {"rows": [*job["rows"], row], "place": row}
    wrong = {
        "rows": (BAD_ROW, {"rows": [*job["rows"], data.draw(st.just(job["num_examples"]) | huge)]}),
        "labels": (BAD_LABEL, {"objective": 0, "label": data.draw(st.just(job["num_outputs"]) | huge)}),
        "memory": (BAD_MEMORY, {"missing": data.draw(st.integers(1, 16) | st.just(2**24))}),
        "weights": (BAD_LAYERS, {"num_weights": job["num_weights"] - 1}),
        "layers": (BAD_LAYERS, {"num_layers": data.draw(st.sampled_from([-1, 0, 65]) | huge)}),
        "stored": (BAD_LAYERS, {"x_stored": data.draw(st.sampled_from([1 if is_text else 2, 3]) | huge)}),
        "objective": (BAD_LAYERS, {"objective": data.draw(st.just(2) | huge)}),
        "batch": (BAD_LAYERS, {"batch_size": data.draw(st.sampled_from([0, -1, -(2**63)]))}),
    }
    if job["num_weights"] == 0:
        del wrong["weights"]
    if is_text:
        tokens = st.just(job["num_tokens"]) | huge
        wrong["tokens"] = BAD_TOKEN, {"x": "int64", "x_stored": 2, "token": data.draw(tokens)}
    status, change = wrong[data.draw(st.sampled_from(sorted(wrong)))]
    assert kernel.do(complete(job | change)) == status

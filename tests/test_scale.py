import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from fedtune.data.client_ids import NumberedIds
from fedtune.data.problems import repeated_ids
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder
from fedtune.settings import resolve
from fedtune.simulation.evaluation import evaluation_clients

NUM_CLIENTS, EXAMPLES = 1_000_000, 8  # examples are a client's
COHORT_SIZE, ROUNDS, EVALUATED = 10, 2, 30
BYTES_A_CLIENT = 120  # at most, at any time


class Rows(np.ndarray):
    """Examples that can only be read by slices, and remember which."""

    __array_ufunc__ = None

    def __array_function__(self, *call):
        raise TypeError("a function of all examples")

    def __getitem__(self, rows):
        assert isinstance(rows, slice)
        self.read |= set(range(*rows.indices(len(self))))
        return self.view(np.ndarray)[rows]

    @classmethod
    def of(cls, array):
        rows = array.view(cls)
        rows.read = set()
        return rows


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("million")
    np.save(folder / "sizes.npy", np.full(NUM_CLIENTS, EXAMPLES))
    np.save(folder / "x.npy", np.arange(NUM_CLIENTS * EXAMPLES, dtype=np.float32)[:, None])
    np.lib.format.open_memmap(folder / "y.npy", mode="w+", dtype=np.int64, shape=(NUM_CLIENTS * EXAMPLES,))
    rounds = {"tuners": ["manual"], "max_rounds": ROUNDS, "total_rounds": ROUNDS, "cohort_size": COHORT_SIZE}
    data = {"name": f"{folder}/", "num_classes": 2, "scale": 1e-7}
    tables = {"evaluation": {"clients": EVALUATED}, "model": {"name": "logistic"}, "executor": "serial"}
    return resolve([rounds, {"data": data, "client": {"learning_rate": 0.1}}, tables])


def test_a_million_clients_take_few_bytes_each_and_rounds_read_only_who_takes_part(settings, tmp_path):
    tracemalloc.start()
    try:
        prepared = prepare(settings)
        x, y = (Rows.of(array) for array in (prepared.dataset.x, prepared.dataset.y))
        folder = tmp_path / "run"
        claim_folder(folder, prepared.settings, force=False)
        replace(prepared, dataset=replace(prepared.dataset, x=x, y=y)).run(folder, lambda event: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 48 * NUM_CLIENTS < peak < BYTES_A_CLIENT * NUM_CLIENTS  # its index alone is 6 numbers a client
    assert x.read == y.read
    clients = {example // EXAMPLES for example in x.read}
    evaluated = set(evaluation_clients(NUM_CLIENTS, EVALUATED, settings.seed).tolist())
    assert evaluated < clients
    assert len(clients) <= EVALUATED + ROUNDS * COHORT_SIZE
    assert len(x.read - {EXAMPLES * client + number for client in evaluated for number in range(EXAMPLES)}) >= EXAMPLES


def test_ids_that_are_numbers_are_made_when_asked_for():
    ids = NumberedIds(NUM_CLIENTS)
    assert len(ids) == NUM_CLIENTS
    assert (ids[0], ids[-1], ids[10:30:10]) == ("0", "999999", ["10", "20"])
    assert list(NumberedIds(3)) == ["0", "1", "2"]
    with pytest.raises(IndexError):
        ids[NUM_CLIENTS]
    assert repeated_ids(ids) == []

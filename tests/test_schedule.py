"""The pool's schedule, without processes: a worker is a load, to which the test appends the chunks that it is given."""

from collections import Counter, deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.client.tasks import EvaluateTask, PersonaliseTask, TrainTask
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.executors.fair_share import fair_share
from fedtune.executors.schedule import CHUNK_SECONDS, EVALUATION_COST, STEP_COST, Piece, Schedule, task_cost

INSTANT = 1e-9  # seconds a cost: nothing but a worker's room limits a chunk


def make_schedule(costs, seconds_per_cost=None, short_seconds=0.0):
    """A schedule of one study whose tasks have these costs; the index of a task is its place among them."""
    schedule = Schedule(short_seconds)
    schedule.add_study(1.0)
    if seconds_per_cost is not None:
        schedule.measure_speed([Piece(0, 0, 0, 1.0)], seconds_per_cost)
    for index, cost in enumerate(costs):
        schedule.add(0.0, Piece(0, 0, index, cost))
    return schedule


def give(schedule, load, loads):
    """The indices of the tasks in the worker's next chunk, which it now has."""
    chunk = schedule.next_chunk(load, loads)
    if chunk:
        load.append(chunk)
    return [piece.index for piece in chunk]


def drain(schedule):
    """The indices of the waiting tasks, one chunk after another, as a worker gets them who answers at once."""
    chunks = []
    while chunk := schedule.next_chunk(deque(), [deque()]):
        chunks.append([piece.index for piece in chunk])
    return chunks


# What a task costs.


@pytest.fixture(scope="module")
def dataset():
    clients = {str(size): (np.zeros((size, 1), np.float32), np.arange(size) % 2) for size in (40, 30, 10)}
    return FederatedDataset.from_clients(clients, name="made up", num_classes=2)


@pytest.mark.parametrize("kind", [TrainTask, PersonaliseTask])
def test_training_costs_the_examples_and_the_steps_of_all_epochs(dataset, kind):
    num_train = 32  # of 40 examples
    assert dataset.num_examples("train")[0] == num_train
    assert task_cost(kind(0, {"epochs": 3, "batch_size": 5}, 1), dataset) == 3 * (num_train + STEP_COST * 7)
    assert task_cost(kind(0, {"batch_size": 8}, 1), dataset) == num_train + STEP_COST * 4
    assert task_cost(kind(0, {}, 1), dataset) == num_train + STEP_COST


@pytest.mark.parametrize("epochs", [0, -1])
def test_every_task_costs_something(dataset, epochs):
    """The range of a program's own `epochs` may begin at 0. The speed of a chunk without a cost could not be told."""
    assert task_cost(TrainTask(0, {"epochs": epochs}, 1), dataset) == 1


def test_an_evaluation_costs_the_validation_and_the_test_parts(dataset):
    assert task_cost(EvaluateTask((0, 2)), dataset) == EVALUATION_COST * (4 + 4 + 1 + 1)


# Which task goes first.


def test_the_smaller_order_goes_first_then_the_longer_task_then_the_earlier_one():
    schedule = make_schedule([])
    for index, (order, cost) in enumerate([(1.0, 9.0), (0.0, 2.0), (0.0, 5.0), (0.0, 2.0), (-1.0, 1.0)]):
        schedule.add(order, Piece(0, 0, index, cost))
    assert drain(schedule) == [[4], [2], [1], [3], [0]]


def test_a_task_that_is_put_back_goes_before_all_others():
    schedule = make_schedule([1.0, 2.0])
    chunk = schedule.next_chunk(deque(), [deque()])
    schedule.add(-100.0, Piece(0, 0, 2, 9.0))
    schedule.put_back(chunk)
    assert drain(schedule) == [[1], [2], [0]]


# How many tasks travel together.


def test_tasks_travel_alone_while_nobody_knows_how_long_they_take():
    schedule, load = make_schedule([1.0] * 20), deque()
    assert give(schedule, load, [load]) == [0]
    assert give(schedule, load, [load]) == []  # nor is a second chunk sent


def test_a_chunk_takes_no_longer_than_its_last_task_beyond_the_limit():
    seconds_per_cost = CHUNK_SECONDS / 2.5  # so that three tasks of cost 1 reach the limit
    schedule, load = make_schedule([1.0] * 20, seconds_per_cost), deque()
    assert give(schedule, load, [load]) == [0, 1, 2]
    # The first chunk takes less than two limits, so the next is sent early; then the worker has enough.
    assert give(schedule, load, [load]) == [3, 4, 5]
    assert give(schedule, load, [load]) == []


def test_a_worker_with_a_long_chunk_gets_no_second_one():
    schedule, load = make_schedule([1.0] * 20, 2 * CHUNK_SECONDS), deque()
    assert give(schedule, load, [load]) == [0]
    assert give(schedule, load, [load]) == []


@pytest.mark.parametrize(("num_waiting", "expected"), [(2, []), (3, [1])])
def test_the_last_tasks_are_for_the_workers_that_are_done_first(num_waiting, expected):
    """Of two workers one is idle. The busy one gets a second chunk only if more tasks wait than there are workers."""
    schedule, loads = make_schedule([1.0] * (1 + num_waiting), CHUNK_SECONDS), [deque(), deque()]
    assert give(schedule, loads[0], loads) == [0]
    assert give(schedule, loads[0], loads) == expected


def test_a_worker_that_has_its_part_of_the_work_gets_no_second_chunk():
    """Of a cost of 10 + 8 in all, 9 is the part of each of two workers; the first task alone is more."""
    schedule, loads = make_schedule([10.0] + [1.0] * 8, INSTANT), [deque(), deque()]
    assert give(schedule, loads[0], loads) == [0]
    assert give(schedule, loads[0], loads) == []
    # When that task has its result, 4 is the part of each, and a chunk of several tasks fills half of it.
    ((piece,),) = loads[0]
    schedule.finish(piece)
    loads[0].clear()
    assert give(schedule, loads[0], loads) == [1, 2]


def test_a_chunk_may_always_take_a_short_time():
    """Of nine tasks of one unit each, half of a worker's room is at most 2.25 units, and 3.1 units are a short time."""
    schedule, loads = make_schedule([1.0] * 9, CHUNK_SECONDS / 9, 3.1 * CHUNK_SECONDS / 9), [deque(), deque()]
    assert give(schedule, loads[0], loads) == [0, 1, 2]
    assert give(schedule, loads[1], loads) == [3, 4, 5]
    assert give(schedule, loads[0], loads) == [6, 7, 8]
    # A task that is longer travels alone, and one that may have ended a worker does too.
    schedule, load = make_schedule([4.0, 1.0], CHUNK_SECONDS / 9, 3.1 * CHUNK_SECONDS / 9), deque()
    assert give(schedule, load, [load, deque()]) == [0]
    schedule = make_schedule([1.0] * 4, CHUNK_SECONDS / 9, CHUNK_SECONDS)
    schedule.take_back(deque([schedule.next_chunk(deque(), [deque()])]))
    assert drain(schedule) == [[0], [1], [2], [3]]


@pytest.mark.parametrize("num_workers", [2, 3])
def test_a_chunk_of_several_tasks_is_at_most_half_of_what_its_worker_is_short_of_a_fair_share(num_workers):
    costs = [float(cost) for cost in (12, 200, 31, 90, 55, 400, 17, 60) for _ in range(20)]
    schedule, loads = make_schedule(costs, INSTANT), [deque() for _ in range(num_workers)]
    for _ in range(2):
        for load in loads:
            assert give(schedule, load, loads)
    share = sum(costs) / num_workers
    for load in loads:
        first, second = ([piece.cost for piece in chunk] for chunk in load)
        assert len(first) > 1
        assert sum(first) <= share / 2
        assert len(second) == 1 or sum(second) <= (share - sum(first)) / 2
    first = [piece.cost for piece in loads[0][0]]
    assert first == sorted(costs, reverse=True)[: len(first)]


# Whose turn it is.


@pytest.mark.parametrize(
    ("studies", "expected"), [({1.0: 40}, [8]), ({1.0: 40, 3.0: 40}, [2, 6]), ({2.0: 40, 1.0: 40, 9.0: 3}, [4, 1, 3])]
)
def test_studies_share_the_workers_by_water_filling(studies, expected):
    """The first study has all workers until the others come; as its tasks end, each study comes to its share."""
    assert fair_share(8, list(studies.values()), list(studies)) == expected
    schedule, loads = Schedule(), [deque() for _ in range(8)]
    for share, num_tasks in studies.items():
        study = schedule.add_study(share)
        for index in range(num_tasks):
            schedule.add(0.0, Piece(study, study, index, 1.0))
        for load in loads:
            if not load:
                give(schedule, load, loads)
    assert [load[0][0].study for load in loads] == [0] * 8
    for load in loads:
        chunk = load.popleft()
        schedule.measure_speed(chunk, 1.0)
        give(schedule, load, loads)
    counts = Counter(load[0][0].study for load in loads)
    assert [counts[study] for study in range(len(studies))] == expected


def test_a_study_that_lacks_half_of_its_share_waits_for_one_that_lacks_all_of_its():
    """Of five chunks, the next one counted, the first should have 4 and has 2, the second should have 1 and has 0."""
    schedule = Schedule()
    for share in (4.0, 1.0, 1.0):
        schedule.add(0.0, Piece(schedule.add_study(share), 0, 0, 1.0))
    for index in range(1, 10):
        schedule.add(0.0, Piece(0, 0, index, 1.0))
    loads = [deque([[Piece(study, 0, 10, 1.0)]]) for study in (0, 0, 2, 2)] + [deque()]
    assert fair_share(5, [12, 1, 3], [4.0, 1.0, 1.0]) == [4, 1, 0]
    assert [piece.study for piece in schedule.next_chunk(loads[-1], loads)] == [1]


# What happens when a worker dies.


END = pytest.mark.parametrize("end", [Schedule.worker_crashed, Schedule.worker_killed])


@END
def test_a_worker_that_ended_had_begun_only_with_its_first_chunk(end):
    schedule, load = make_schedule([1.0] * 40, CHUNK_SECONDS / 2.5), deque()
    assert (give(schedule, load, [load]), give(schedule, load, [load])) == ([0, 1, 2], [3, 4, 5])
    assert end(schedule, load) is None
    # The tasks of the first chunk now travel alone; those of the second may travel together.
    assert drain(schedule)[:4] == [[0], [1], [2], [3, 4, 5]]
    assert [[piece.alone for piece in chunk] for chunk in load] == [[True] * 3, [False] * 3]


@END
def test_a_suspect_does_not_join_a_longer_task_that_waits_before_it(end):
    schedule, load = make_schedule([1.0] * 2, CHUNK_SECONDS / 2.5), deque()
    for index in range(2, 20):
        schedule.add(1.0, Piece(0, 0, index, 1.25))
    assert (give(schedule, load, [load]), give(schedule, load, [load])) == ([0, 1, 2], [3, 4])
    end(schedule, load)
    schedule.measure_speed([Piece(0, 0, 0, 1.0)], INSTANT)  # so that a chunk has time for more
    assert drain(schedule)[:4] == [[2], [3, 4], [0], [1]]


def test_a_task_that_ends_two_workers_when_it_is_alone_is_given_up():
    schedule, load = make_schedule([1.0] * 40, CHUNK_SECONDS / 2.5), deque()
    assert give(schedule, load, [load]) == [0, 1, 2]
    guilty, crashes, answered = schedule.worker_crashed(load), 0, []
    assert guilty is None  # one of the others may have done it
    while guilty is None:
        load = deque()
        chunk = give(schedule, load, [load])
        if chunk == [0]:
            crashes += 1
            guilty = schedule.worker_crashed(load)
        else:
            answered += chunk
    assert (guilty.index, crashes) == (0, 2)
    assert sorted([*answered, *(index for chunk in drain(schedule) for index in chunk)]) == list(range(1, 40))


def test_a_task_is_not_blamed_for_the_workers_that_were_killed():
    schedule, verdicts = make_schedule([1.0]), []
    for end in (Schedule.worker_crashed, Schedule.worker_killed, Schedule.worker_crashed):
        load = deque()
        give(schedule, load, [load])
        verdicts.append(end(schedule, load))
    assert verdicts[:2] == [None, None]
    assert verdicts[2].num_crashes == 2


def test_a_task_whose_worker_is_killed_again_when_it_is_alone_stops_the_run():
    schedule, load = make_schedule([1.0] * 40, CHUNK_SECONDS / 2.5), deque()
    assert give(schedule, load, [load]) == [0, 1, 2]
    assert schedule.worker_killed(load) is None
    load = deque()
    assert give(schedule, load, [load]) == [0]
    assert schedule.worker_killed(load).index == 0


@END
def test_a_worker_that_ends_idle_has_nothing_to_give_back(end):
    schedule = make_schedule([1.0])
    assert end(schedule, deque()) is None
    assert drain(schedule) == [[0]]


@given(
    st.lists(st.floats(0.5, 100.0), min_size=1, max_size=40),
    st.integers(1, 4),
    st.sampled_from([1e-9, 1e-4, 1e-2, 1.0]),
    st.randoms(use_true_random=False),
)
def test_every_task_gets_one_result_whoever_ends(costs, num_workers, seconds_per_cost, random):
    """Workers answer, crash or are killed in any order, but no task's worker is killed again when it is alone.

    A task is done once or, if it was alone in two chunks whose workers crashed, given up.
    """
    schedule, loads = make_schedule(costs, seconds_per_cost), [deque() for _ in range(num_workers)]
    ended, crashes, kills = [], Counter(), Counter()
    while len(ended) < len(costs):
        for num_chunks in (0, 1):
            for load in loads:
                if len(load) == num_chunks:
                    give(schedule, load, loads)
        busy = [load for load in loads if load]
        assert busy  # otherwise nobody would ever do the rest
        load = random.choice(busy)
        begun = [piece.index for piece in load[0]]
        what = random.random()
        if what < 0.3:
            guilty = schedule.worker_crashed(load)
            crashes.update(begun if len(begun) == 1 else [])
            assert ([guilty.index] if guilty else []) == [index for index in begun if crashes[index] == 2]
            ended += [guilty] if guilty else []
            load.clear()
        elif what < 0.5 and not any(kills[index] for index in begun):
            kills.update(begun)
            assert schedule.worker_killed(load) is None
            load.clear()
        else:
            ended += load.popleft()
    assert sorted(piece.index for piece in ended) == list(range(len(costs)))
    assert drain(schedule) == []

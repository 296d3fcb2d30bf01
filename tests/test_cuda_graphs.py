"""What is recorded as CUDA graphs, and when. On a CPU nothing is; a stand-in shows what would be."""

import pytest
import torch

from fedtune_clients.cuda_graphs import MOST_GRAPHS, WARM_UP, Recorder, capture_on


def recorded(captured):
    """A capture that does what a replay does, with the tensors that were captured; it notes each call."""

    def capture(function):
        captured.append(function)
        return function

    return capture


def add_to(total):
    return lambda *numbers: total.add_(sum(numbers))


def test_nothing_is_recorded_on_a_cpu():
    assert capture_on(torch.device("cpu")) is None
    recorder, total = Recorder(None), torch.zeros(2)
    for _ in range(2 * WARM_UP):
        recorder.call("key", add_to(total), [torch.ones(2)])
    assert not recorder.records
    assert total.tolist() == [2 * WARM_UP] * 2


def test_a_call_is_recorded_when_it_comes_often_and_each_replay_has_its_own_inputs():
    captured, total = [], torch.zeros(2)
    recorder = Recorder(recorded(captured))
    assert recorder.records
    inputs = [torch.tensor([float(number), 1.0]) for number in range(3 * WARM_UP)]
    for number, given in enumerate(inputs):
        recorder.call("key", add_to(total), [given, given])
        assert len(captured) == (number >= WARM_UP)
    assert total.tolist() == (2 * torch.stack(inputs).sum(0)).tolist()
    assert [given.tolist() for given in inputs] == [[float(number), 1.0] for number in range(3 * WARM_UP)]


def test_no_more_is_recorded_than_the_memory_should_hold():
    captured, total = [], torch.zeros(2)
    recorder = Recorder(recorded(captured))
    for key in range(MOST_GRAPHS + 2):
        for _ in range(WARM_UP + 1):
            recorder.call(key, add_to(total), [torch.ones(2)])
    assert len(captured) == MOST_GRAPHS
    assert total.tolist() == [(MOST_GRAPHS + 2) * (WARM_UP + 1)] * 2


def failing(error, tried):
    def capture(function):
        tried.append(function)
        raise error

    return capture


def test_what_can_not_be_recorded_is_done_without_and_is_tried_once():
    tried, total = [], torch.zeros(2)
    recorder = Recorder(failing(RuntimeError("operation not permitted when stream is capturing"), tried))
    for key in range(2):
        for _ in range(WARM_UP + 2):
            recorder.call(key, add_to(total), [torch.ones(2)])
    assert len(tried) == 1
    assert total.tolist() == [2 * (WARM_UP + 2)] * 2


def test_a_lack_of_memory_is_an_error():
    recorder = Recorder(failing(torch.OutOfMemoryError("out of memory"), []))
    for _ in range(WARM_UP):
        recorder.call("key", add_to(torch.zeros(2)), [torch.ones(2)])
    with pytest.raises(torch.OutOfMemoryError):
        recorder.call("key", add_to(torch.zeros(2)), [torch.ones(2)])

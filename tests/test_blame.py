"""Whose fault it is that a worker ended. tests/test_executors.py has the workers."""

import signal

import pytest

from fedtune.executors.blame import is_crash, why_it_stopped


@pytest.mark.parametrize("exit_code", [0, 1, 3, 255, -6, -11, -7, -8, -4, -5, -31])
def test_an_exit_and_a_crash_are_the_tasks_fault(exit_code):
    assert is_crash(exit_code)


@pytest.mark.parametrize("exit_code", [None, *(-number for number in (1, 2, 3, 9, 10, 15, 24, 64))])
def test_other_signals_come_from_outside_and_a_lost_exit_code_proves_nothing(exit_code):
    assert not is_crash(exit_code)


@pytest.mark.parametrize(
    ("exit_code", "how"),
    [
        (-signal.SIGKILL, "was killed by signal 9 (SIGKILL), and again when the task was tried alone: out of memory?"),
        (-signal.SIGTERM, "was killed by signal 15 (SIGTERM), and again when the task was tried alone"),
        (-40, "was killed by signal 40, and again when the task was tried alone"),
        (None, "ended with the forkserver, which starts the workers, and again when the task was tried alone"),
    ],
)
def test_the_signal_is_named(exit_code, how):
    assert why_it_stopped(exit_code) == f"its worker process {how}"

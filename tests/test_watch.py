"""When a task is looked at. tests/test_executors.py has the tasks that hang."""

import math

import pytest

from fedtune.executors.watch import next_look
from fedtune.settings import WatchSettings


@pytest.mark.parametrize(
    ("settings", "seconds", "expected"),
    [
        ({}, 0.0, 60.0),
        ({}, 59.9, 60.0),
        ({}, 60.0, 120.0),
        ({}, 500.0, 960.0),  # the process was busy, and did not look at 120, 240 and 480
        ({"limit": 100.0}, 0.0, 60.0),
        ({"limit": 100.0}, 60.0, 100.0),
        ({"limit": 10.0}, 0.0, 10.0),
        ({"warn_after": 0.0}, 0.0, math.inf),
        ({"warn_after": 0.0, "limit": 100.0}, 0.0, 100.0),
    ],
)
def test_warnings_are_due_at_each_doubling_and_the_limit_once(settings, seconds, expected):
    assert next_look(WatchSettings(**settings), seconds) == expected

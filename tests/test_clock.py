from fedtune.simulation.clock import Clock


def test_events_come_by_time_and_equal_times_in_the_order_of_scheduling():
    clock = Clock()
    for time, event in ((2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")):
        clock.schedule(time, event)
    assert clock.peek() == "a"
    assert clock.time == 0.0
    assert [(clock.take(), clock.time) for _ in range(4)] == [("a", 1.0), ("b", 1.0), ("c", 2.0), ("d", 2.0)]
    assert len(clock) == 0

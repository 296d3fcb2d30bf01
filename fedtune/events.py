"""The events by which a run reports what happens; live progress, logs and trackers listen to them."""

from collections.abc import Callable
from typing import Any

Listener = Callable[[dict[str, Any]], None]

EVENTS = (
    "plan",
    "space",
    "executor",
    "ask",
    "round",
    "lost",
    "tell",
    "drop",
    "incumbent",
    "study_end",
    "warning",
)

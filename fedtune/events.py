"""The words in which a run reports what happens."""

from collections.abc import Callable
from typing import Any

Listener = Callable[[dict[str, Any]], None]


EVENTS = ("plan", "executor", "ask", "round", "lost", "tell", "drop", "incumbent", "study_end", "warning")

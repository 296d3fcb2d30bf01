"""The feedback of a client: its error or its loss on its validation part, and the bounds within which it counts.

Theta and the eliminations learn from it. It comes from a client's program, so any number may come.
"""

import math

import numpy as np
from jaxtyping import Float

SIGNALS = ("error", "loss")


def worst_error(signal: str, num_classes: int) -> float:
    """The largest feedback that counts, so that one client can't move theta for long: a larger one counts as this one.

    For a classification it is 1 for the error, and twice the loss of guessing for the loss. num_classes is 0 for a
    regression: error and loss are unbounded, and 1 for a model that guesses the mean. There it is 2.
    """
    return {"error": 1.0, "loss": 2 * math.log(num_classes)}[signal] if num_classes else 2.0


def bounded(error: Float[np.ndarray, " client"], worst: float) -> Float[np.ndarray, " client"]:
    """The errors within [0, worst]: one above or below counts as the nearer end, one that is not finite as `worst`."""
    error = np.asarray(error, np.float64)
    return np.clip(np.where(np.isfinite(error), error, worst), 0.0, worst)

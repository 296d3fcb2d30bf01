"""One training run on a folder of clients; it waits for a line on stdin before and after each round.

python one_run.py DATA COHORT ROUNDS ENGINE

Prints lines of JSON: first the cost of the set-up, then the cost of each round. It runs the code of the checkout that
is on PYTHONPATH.
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from own_cost import memory, processor_seconds

from fedtune.executors.processes import start_forkserver
from fedtune.layers import resolve_settings
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder
from fedtune.settings import Settings

NUM_CLASSES = 10
EVALUATED = 300  # clients


def make_settings(data: str, cohort: int, rounds: int, engine: str) -> Settings:
    """The settings of the run. A checkout from before the setting `engine` trains by torch."""
    chosen = {"engine": engine} if "engine" in Settings.model_fields else {}
    return resolve_settings(
        f"{data}/",
        {"tuners": ["manual"], "max_rounds": rounds, "total_rounds": rounds, "cohort_size": cohort},
        {"data": {"num_classes": NUM_CLASSES}, "model": {"name": "logistic"}, "executor": "pool", **chosen},
        {"client": {"learning_rate": 0.1, "batch_size": 4}, "evaluation": {"every": 4, "clients": EVALUATED}},
    )


def main(data: str, cohort: int, rounds: int, engine: str) -> None:
    def tell(**answer: Any) -> None:
        print(json.dumps(answer), flush=True)
        input()

    def added() -> dict[str, float]:
        return {f"{name}_memory": now - before[name] for name, now in memory().items()}

    def listener(event: dict[str, Any]) -> None:
        nonlocal started
        if event["event"] == "round":
            answer = {"seconds": time.perf_counter() - started, "processor": processor_seconds()}
            if event["round"] == rounds:  # only then, because to look at so many pages takes time too
                answer |= added()
            tell(**answer, evaluated=not math.isnan(event["validation_error"]))
            started = time.perf_counter()

    settings = make_settings(data, cohort, rounds, engine)
    start_forkserver()
    before, computed, started = memory(), time.process_time(), time.perf_counter()
    comparison = prepare(settings)
    tell(seconds=time.perf_counter() - started, set_up_processor=time.process_time() - computed, **added())
    with tempfile.TemporaryDirectory() as folder:
        claim_folder(Path(folder) / "run", comparison.settings, force=False)
        started = time.perf_counter()
        comparison.run(Path(folder) / "run", listener)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])

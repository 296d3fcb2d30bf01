"""One search with many trials of one round or a few; it prints what each tenth of its rounds costs.

python many_trials.py TRIALS

Every line is JSON. The last tenth includes the time until the results are written. The memory is what the run has
needed since its first trial.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from own_cost import memory

from fedtune.layers import tune_settings
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder

PARTS = 10


def main(trials: int) -> None:
    settings = tune_settings(
        "digits",
        "asha",
        trials,
        {"max_rounds": 4, "cohort_size": 2, "tuner": {"asha": {"reduction_factor": 4}}},
        {"model": {"name": "logistic"}, "executor": "serial", "evaluation": {"clients": 1, "every": 4}},
        {"client": {"epochs": 1, "batch_size": 32}, "space": {"only": ["client.learning_rate"]}},
    )
    comparison = prepare(settings)
    asked, rounds, part = set(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        claim_folder(run, comparison.settings, force=False)

        def tell(what: str) -> None:
            nonlocal rounds, started
            answer = {"part": what, "trials": len(asked), "rounds": rounds, "seconds": time.perf_counter() - started}
            files = [path.stat().st_size for path in run.rglob("*") if path.is_file()]
            answer |= {"own_memory": memory()["own"] - before, "files": len(files), "megabytes": sum(files) / 1e6}
            print(json.dumps(answer), flush=True)
            rounds, started = 0, time.perf_counter()

        def listener(event: dict[str, Any]) -> None:
            nonlocal rounds, part
            if event["event"] == "round":
                rounds += 1
                asked.add(event["trial"])
                if len(asked) >= trials * (part + 1) / PARTS and part < PARTS - 1:
                    part += 1
                    tell(f"{part}")

        before, started = memory()["own"], time.perf_counter()
        comparison.run(run, listener)
        tell(f"{PARTS}, with the results")


if __name__ == "__main__":
    main(int(sys.argv[1]))

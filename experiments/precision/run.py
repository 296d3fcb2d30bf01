"""Measures how --precision bf16 changes errors and the time of a client; prints them and writes results.csv."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd

import fedtune
from fedtune import plugins
from fedtune.client.tasks import TrainTask
from fedtune.executors.machine import Machine, MachineSettings

FOLDER = Path(__file__).parent
PRECISIONS = ("fp32", "bf16")
SMALLEST = {
    "models": ["logistic"],
    "rounds": 1,
    "repeats": 1,
    "out": Path("runs/smallest/precision"),
}
CONFIG = {"learning_rate": 0.1, "epochs": 1, "batch_size": 20}


def seconds_a_client(model: str, repeats: int) -> dict[str, list[float]]:
    """Processor time of one client's training on 48 images of MNIST, on one core, the two precisions in turn."""
    dataset = plugins.load_dataset({"name": "mnist"})
    machines = {
        name: Machine(MachineSettings({"name": model}, "local_sgd", "cpu", name), dataset) for name in PRECISIONS
    }
    weights = machines["fp32"].model.flat.clone()
    times: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for repeat in range(repeats + 1):
        for name, machine in machines.items():
            before = time.process_time()
            machine.run_all(weights, [TrainTask(client, CONFIG, seed=repeat) for client in range(10)])
            if repeat > 0:  # the first warms up
                times[name].append((time.process_time() - before) / 10)
    return times


def errors(model: str, rounds: int, seeds: int) -> dict[str, pd.Series]:
    """The test error of each seed after the given number of rounds on MNIST."""
    found = {}
    for name in PRECISIONS:
        with tempfile.TemporaryDirectory() as folder:
            run = fedtune.train(
                "mnist", rounds, seeds=seeds, model={"name": model}, precision=name, out=Path(folder) / "run"
            )
        found[name] = run.results["test_error"]
    return found


def main() -> None:
    """Measures each model and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["logistic", "mlp", "cnn"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for results.csv")
    parser.add_argument("--smallest", action="store_true", help="run in seconds; results go to runs/smallest")
    if parser.parse_args().smallest:
        parser.set_defaults(**SMALLEST)
    arguments = parser.parse_args()
    rows = []
    for model in arguments.models:
        times, error = seconds_a_client(model, arguments.repeats), errors(model, arguments.rounds, arguments.seeds)
        ratios = [a / b for a, b in zip(times["fp32"], times["bf16"], strict=True)]
        difference = error["bf16"] - error["fp32"]
        rows.append(
            {
                "model": model,
                "fp32_ms": 1000 * statistics.median(times["fp32"]),
                "bf16_ms": 1000 * statistics.median(times["bf16"]),
                "times_as_fast": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                "fp32_test_error": error["fp32"].mean(),
                "bf16_test_error": error["bf16"].mean(),
                "difference": difference.mean(),
                "difference_se": difference.sem(),
            }
        )
        print(pd.DataFrame(rows).round(4).to_string(index=False), flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(6).to_csv(arguments.out / "results.csv", index=False)


if __name__ == "__main__":
    main()

"""The command line. What is slow to import is imported by the command that needs it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.errors import InputError

if TYPE_CHECKING:
    from fedtune.report.frames import Run
    from fedtune.report.live import LiveProgress

app = typer.Typer(
    name="fedtune",
    help="Simulate federated learning on one machine, and tune it: FedEx beside ASHA, at an equal budget.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare and look at data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

WHAT = typer.Argument(
    help="A data set (see `fedtune list`), file.py:function, a table, a folder, or a settings .toml file."
)
What = Annotated[str, WHAT]
Model = Annotated[str | None, typer.Option(help="The model (see `fedtune list`), or file.py:function.")]
Assignments = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. client.learning_rate=0.05.")
]
Seed = Annotated[int | None, typer.Option(help="The first seed.")]
Out = Annotated[Path | None, typer.Option(help="The run folder; by default a new one under runs/.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an older run in --out.")]
Workers = Annotated[int | None, typer.Option(help="Processes to use; 0 is one a core. Never changes a number.")]
Device = Annotated[str | None, typer.Option(help="Where clients train, e.g. cpu or cuda.")]
Precision = Annotated[str | None, typer.Option(help="Of the clients' training: fp32 or bf16. Changes the numbers.")]
ExecutorName = Annotated[str | None, typer.Option(help="auto, serial, pool or batched.")]
Optuna = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Show the trials in this Optuna storage as well, e.g. sqlite:///trials.db."),
]
Rounds = Annotated[int | None, typer.Option(help="Rounds to train for.")]
MaxRounds = Annotated[int | None, typer.Option(help="Rounds that one configuration may get in a search.")]
TotalRounds = Annotated[int | None, typer.Option(help="Rounds that each tuner may spend in all.")]
Seeds = Annotated[int | None, typer.Option(help="How many seeds, from --seed on.")]


@app.command()
def train(
    what: What,
    rounds: Rounds = None,
    model: Model = None,
    assignments: Assignments = None,
    seed: Seed = None,
    seeds: Seeds = None,
    out: Out = None,
    force: Force = False,
    optuna: Optuna = None,
    workers: Workers = None,
    device: Device = None,
    executor: ExecutorName = None,
    precision: Precision = None,
) -> None:
    """Train one federation under fixed hyperparameters."""
    budget = {"max_rounds": rounds, "total_rounds": rounds}
    flags = {"seed": seed, "seeds": seeds, "workers": workers, "device": device, "executor": executor}
    flags |= {"precision": precision}
    _run(what, {"tuners": ["manual"], **budget, **flags}, model, assignments, out, force, optuna)


@app.command()
def tune(
    what: Annotated[str | None, WHAT] = None,
    tuner: Annotated[str | None, typer.Option(help="The tuner (see `fedtune list`), asha if left out.")] = None,
    max_rounds: MaxRounds = None,
    total_rounds: TotalRounds = None,
    extend: Annotated[
        Path | None, typer.Option(help="Go on with this finished run instead: --num-configs, --total-rounds or both.")
    ] = None,
    num_configs: Annotated[
        int | None,
        typer.Option(help="Configurations to draw in all (of sha: in a bracket); the budget follows if it is not set."),
    ] = None,
    model: Model = None,
    assignments: Assignments = None,
    seed: Seed = None,
    seeds: Seeds = None,
    out: Out = None,
    force: Force = False,
    optuna: Optuna = None,
    workers: Workers = None,
    device: Device = None,
    executor: ExecutorName = None,
    precision: Precision = None,
) -> None:
    """Search for good hyperparameters with one tuner, or go on with a search that has ended (--extend)."""
    if extend is not None:
        given = {"a data set": what, "--max-rounds": max_rounds, "--model": model, "--set": assignments, "--out": out}
        given |= {"--seed": seed, "--seeds": seeds, "--device": device, "--force": force or None}
        given |= {"--tuner": tuner, "--precision": precision}
        if too_much := [name for name, value in given.items() if value is not None]:
            raise InputError(f"--extend keeps the settings of its run, got {too_much[0]}")
        _extend(extend, num_configs, total_rounds, workers=workers, executor=executor, optuna=optuna)
        return
    if what is None:
        raise InputError("tune needs a data set or a settings file, or --extend and a run folder, got neither")
    budget = {"max_rounds": max_rounds, "total_rounds": total_rounds}
    flags = {"seed": seed, "seeds": seeds, "workers": workers, "device": device, "executor": executor}
    flags |= {"precision": precision}
    _run(what, {**budget, **flags}, model, assignments, out, force, optuna, tuner or "asha", num_configs)


@app.command()
def compare(
    what: What,
    tuners: Annotated[str | None, typer.Option(help="Names with commas between them (see `fedtune list`).")] = None,
    max_rounds: MaxRounds = None,
    total_rounds: TotalRounds = None,
    model: Model = None,
    assignments: Assignments = None,
    seed: Seed = None,
    seeds: Seeds = None,
    out: Out = None,
    force: Force = False,
    optuna: Optuna = None,
    workers: Workers = None,
    device: Device = None,
    executor: ExecutorName = None,
    precision: Precision = None,
    parallel_studies: Annotated[
        int | None, typer.Option(help="Studies computed at once, which share the workers. Never changes a number.")
    ] = None,
) -> None:
    """Compare tuners at an equal budget of rounds."""
    names = None if tuners is None else [name.strip() for name in tuners.split(",")]
    budget = {"max_rounds": max_rounds, "total_rounds": total_rounds}
    flags = {"seed": seed, "seeds": seeds, "workers": workers, "device": device, "executor": executor}
    flags |= {"precision": precision, "parallel_studies": parallel_studies}
    _run(what, {"tuners": names, **budget, **flags}, model, assignments, out, force, optuna)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    optuna: Optuna = None,
    workers: Workers = None,
    executor: ExecutorName = None,
) -> None:
    """Go on with a run that was stopped; the numbers are those of a run that never was."""
    import fedtune

    with _progress(run) as progress:
        finished = fedtune.resume(run, workers=workers, executor=executor, listener=progress, optuna=optuna)
    _show(finished)


@app.command()
def replay(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Rebuild the tuners of a run from its journals and check them; nothing is trained or written."""
    from fedtune.runs.replay import replay

    for study in replay(run):
        typer.echo(study)


@app.command("list")
def list_names() -> None:
    """List the data sets, models, client programs and tuners that are installed."""
    from fedtune.plugins import known
    from fedtune.tuning.tuners import TUNERS

    for title, names in (
        ("data sets", known("datasets")),
        ("models", known("models")),
        ("client programs", known("clients")),
        ("tuners", TUNERS),
    ):
        typer.echo(f"{title + ':':<17}{', '.join(sorted(names))}")


@data_app.command()
def prepare(name: Annotated[str, typer.Argument(help="A data set (see `fedtune list`).")]) -> None:
    """Download a data set and verify it; does nothing when it is there."""
    from fedtune.plugins import prepare_dataset

    folder = prepare_dataset(name)
    typer.echo(f"{name} is ready" + (f" in {folder}" if folder else ": it needs no download"))


@data_app.command()
def stats(
    what: What,
    assignments: Assignments = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw clients x labels and client sizes to this PNG file.")
    ] = None,
) -> None:
    """Show how many clients and examples a data set has, and how skewed they are."""
    import fedtune
    from fedtune.data.stats import statistics
    from fedtune.plugins import load_dataset
    from fedtune.report.plots import plot_stats
    from fedtune.report.tables import size_histogram, stats_table
    from fedtune.settings import parse_assignment

    settings = fedtune.resolve_settings(what, *map(parse_assignment, assignments or []))
    dataset = load_dataset(settings.data)
    _print(stats_table(statistics(dataset)))
    _print(size_histogram(dataset.sizes().sum(1)))
    if figure:
        plot_stats(dataset, figure)
        typer.echo(f"figure: {figure}")


@data_app.command()
def check(
    what: What,
    assignments: Assignments = None,
    every: Annotated[bool, typer.Option("--all", help="Print every problem, not the first 20 of a kind.")] = False,
) -> None:
    """Report every problem of a data set; the exit code is 0 for none, 1 for warnings alone, 2 for errors."""
    import fedtune
    from fedtune.data.checks import find_problems
    from fedtune.data.problems import BadDataError, errors_of
    from fedtune.plugins import load_dataset
    from fedtune.report.tables import problem_lines
    from fedtune.settings import parse_assignment

    settings = fedtune.resolve_settings(what, *map(parse_assignment, assignments or []))
    try:
        problems = find_problems(load_dataset(settings.data))
    except BadDataError as error:
        problems = error.problems
    for line in problem_lines(problems, None if every else 20):
        typer.echo(line)
    errors = errors_of(problems)
    typer.echo(f"{len(errors):,} errors, {len(problems) - len(errors):,} warnings")
    raise typer.Exit(2 if errors else 1 if problems else 0)


@data_app.command()
def export(
    what: What,
    out: Annotated[Path, typer.Option(help="The folder to write, which must not exist.")],
    form: Annotated[str, typer.Option("--format", help="The form of the files: leaf.")] = "leaf",
    users_per_file: Annotated[int, typer.Option(help="How many clients share a file.")] = 100,
    assignments: Assignments = None,
) -> None:
    """Write a data set as LEAF's JSON files."""
    import fedtune
    from fedtune.data.formats.leaf_export import export_leaf
    from fedtune.errors import UnknownNameError
    from fedtune.plugins import load_dataset
    from fedtune.settings import parse_assignment

    if form != "leaf":
        raise UnknownNameError("format", form, ["leaf"])
    settings = fedtune.resolve_settings(what, *map(parse_assignment, assignments or []))
    export_leaf(load_dataset(settings.data), out, users_per_file=users_per_file)
    typer.echo(f"folder: {out}")


def main() -> None:
    """The entry point: a bad input is one line and exit code 2."""
    try:
        app()
    except InputError as error:
        typer.echo(f"fedtune: {error}", err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written
        typer.echo(f"fedtune: {error}", err=True)
        sys.exit(1)


def _run(
    what: str,
    flags: dict[str, Any],
    model: str | None,
    assignments: list[str] | None,
    out: Path | None,
    force: bool,
    optuna: str | None,
    tuner: str | None = None,
    num_configs: int | None = None,
) -> None:
    import fedtune
    from fedtune.settings import parse_assignment

    layers = [{"model": {"name": model}}] if model else []
    layers += [parse_assignment(text) for text in assignments or []]
    given = {name: value for name, value in flags.items() if value is not None}
    if tuner is None:
        settings = fedtune.resolve_settings(what, *layers, given)
    else:
        settings = fedtune.tune_settings(what, tuner, num_configs, *layers, given)
    folder = out or fedtune.new_folder(settings)
    with _progress(folder) as progress:
        run = fedtune.run(settings, out=folder, force=force, listener=progress, optuna=optuna)
    _show(run)


def _extend(run: Path, num_configs: int | None, total_rounds: int | None, **where: Any) -> None:
    import fedtune

    with _progress(run) as progress:
        longer = fedtune.extend(run, num_configs=num_configs, total_rounds=total_rounds, listener=progress, **where)
    _show(longer)


@contextmanager
def _progress(folder: Path) -> Iterator["LiveProgress"]:
    """What shows the progress of the run in a folder, and how to go on with it where Ctrl-C stops it."""
    from fedtune.report.live import LiveProgress

    try:
        with LiveProgress() as progress:
            yield progress
    except KeyboardInterrupt:
        if (folder / "settings.toml").is_file():
            typer.echo(f"stopped; to go on: fedtune resume {folder}", err=True)
        raise


def _show(run: "Run") -> None:
    from fedtune.report.frames import summary
    from fedtune.report.tables import chosen_lines, summary_table

    _print(summary_table(summary(run.results, run.timings)))
    for line in chosen_lines(run.results, run.settings["space"]):
        typer.echo(line)
    for figure in sorted((run.folder / "figures").glob("*.png")):
        typer.echo(f"figure: {figure}")
    typer.echo(f"run folder: {run.folder}")


def _print(renderable: Any) -> None:
    from rich.console import Console

    Console().print(renderable)

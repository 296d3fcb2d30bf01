"""The command line. What is slow to import is imported by the command that needs it."""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune import cli_data
from fedtune.cli_options import (
    Assignments,
    Command,
    LoseClients,
    MaxRounds,
    NumConfigs,
    ResumeOptions,
    RunOptions,
    TotalRounds,
    assigned,
    with_options,
)
from fedtune.errors import InputError, RunStopped
from fedtune.operating_system import STOP_SIGNALS
from fedtune.printable import printable

if TYPE_CHECKING:
    from fedtune.report.frames import Run
    from fedtune.report.live import LiveProgress
    from fedtune.settings import Settings

app = typer.Typer(name="fedtune", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(cli_data.app, name="data")


def _show_version(wanted: bool) -> bool:
    if wanted:
        import fedtune

        typer.echo(f"fedtune {fedtune.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def fedtune_command(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Simulate federated learning on one machine, and tune it: FedEx beside ASHA, at an equal budget."""


@app.command(cls=Command)
@with_options
def train(
    what: str,
    rounds: Annotated[int | None, typer.Option(help="Rounds to train for.")] = None,
    *,
    options: RunOptions,
) -> None:
    """Train one federation under fixed hyperparameters.

    Example:
      fedtune train digits --rounds 5
    """
    import fedtune

    layers = options.layers(tuners=["manual"], max_rounds=rounds, total_rounds=rounds)
    _run(fedtune.resolve_settings(what, *layers), options)


@app.command(cls=Command)
@with_options
def tune(
    what: str,
    tuner: Annotated[str, typer.Option(help="The tuner (see `fedtune list`).")] = "asha",
    max_rounds: MaxRounds = None,
    total_rounds: TotalRounds = None,
    num_configs: NumConfigs = None,
    *,
    options: RunOptions,
) -> None:
    """Search for good hyperparameters with one tuner.

    Example:
      fedtune tune digits --tuner asha --num-configs 9 --max-rounds 9
    """
    import fedtune

    layers = options.layers(max_rounds=max_rounds, total_rounds=total_rounds)
    _run(fedtune.tune_settings(what, tuner, num_configs, *layers), options)


@app.command(cls=Command)
@with_options
def compare(
    what: str,
    tuners: Annotated[
        str | None, typer.Option(help="Tuners, separated by commas (see `fedtune list`), for example asha,fedex.")
    ] = None,
    max_rounds: MaxRounds = None,
    total_rounds: TotalRounds = None,
    parallel_studies: Annotated[
        int | None, typer.Option(help="Studies computed at once; they share the workers. Never changes a result.")
    ] = None,
    *,
    options: RunOptions,
) -> None:
    """Compare tuners at an equal budget of rounds.

    Example:
      fedtune compare digits --tuners manual,random,asha,fedex --max-rounds 9 --total-rounds 27
    """
    import fedtune

    names = None if tuners is None else [name.strip() for name in tuners.split(",")]
    layers = options.layers(
        tuners=names, max_rounds=max_rounds, total_rounds=total_rounds, parallel_studies=parallel_studies
    )
    _run(fedtune.compare_settings(what, *layers), options)


@app.command(cls=Command)
@with_options
def resume(
    run: Path,
    repair: Annotated[
        bool, typer.Option("--repair", help="Cut a journal that a power cut damaged at its last good line.")
    ] = False,
    lose_client: LoseClients = None,
    *,
    options: ResumeOptions,
) -> None:
    """Resume a run that was stopped; the results are the same as if it had never been interrupted.

    With --lose-client the run goes on without a client, which then fails in every round that is still to be trained.
    This changes the results.

    Example:
      fedtune resume runs/first
    """
    import fedtune

    with _progress(run) as progress:
        finished = fedtune.resume(
            run, repair=repair, lose_clients=lose_client or (), listener=progress, **asdict(options)
        )
    _show(finished)


@app.command(cls=Command)
@with_options
def extend(
    run: Path,
    num_configs: NumConfigs = None,
    total_rounds: TotalRounds = None,
    *,
    options: ResumeOptions,
) -> None:
    """Extend a finished search: its tuner draws more configurations, gets a larger budget, or both.

    Example:
      fedtune extend runs/search --num-configs 40
    """
    import fedtune

    with _progress(run) as progress:
        longer = fedtune.extend(
            run, num_configs=num_configs, total_rounds=total_rounds, listener=progress, **asdict(options)
        )
    _show(longer)


@app.command(cls=Command)
def replay(run: Path) -> None:
    """Rebuild the tuners of a run from its journals and check them; nothing is trained or written.

    Example:
      fedtune replay runs/first
    """
    from fedtune.runs.replay import replay

    for study in replay(run):
        typer.echo(study)


@app.command(cls=Command)
def space(what: str, assignments: Assignments = None) -> None:
    """Show what a run would search, what is fixed, and where each came from.

    Example:
      fedtune space digits --set client.momentum=0.9
    """
    from fedtune.layers import layers_of
    from fedtune.search_space import space_lines, space_rows

    for line in space_lines(space_rows(layers_of(what, assigned(assignments), "command line"))):
        typer.echo(line)


@app.command("list", cls=Command)
def list_names() -> None:
    """List the data sets, models, client programs and tuners that are installed.

    Example:
      fedtune list
    """
    from fedtune.plugins import known
    from fedtune.tuning.tuners import TUNERS

    for title, names in (
        ("data sets", known("datasets")),
        ("models", known("models")),
        ("client programs", known("clients")),
        ("tuners", TUNERS),
    ):
        typer.echo(f"{title + ':':<17}{', '.join(sorted(names))}")


@app.command(cls=Command)
def doctor() -> None:
    """Show what this machine offers to a run: the engine, BLAS, cores, GPUs, versions, downloaded data sets.

    Example:
      fedtune doctor
    """
    from fedtune.doctor import doctor_lines

    for line in doctor_lines():
        typer.echo(printable(line))


def main() -> None:
    """The entry point: a bad input is one line and exit code 2."""
    # A file or a pipe may have an encoding that lacks characters, as on Windows: they are shown as \u2588 and the like.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(args=_current_spelling(sys.argv[1:]))
    except InputError as error:
        typer.echo(f"fedtune: {printable(str(error))}", err=True)
        sys.exit(2)
    except (RunStopped, OSError) as error:  # a worker that was killed, a full disk, a folder that may not be written
        typer.echo(f"fedtune: {printable(str(error))}", err=True)
        sys.exit(1)


def _current_spelling(arguments: list[str]) -> list[str]:
    """The arguments; `tune --extend RUN`, the first spelling of `extend RUN`, still works."""
    without = [argument.removeprefix("--extend=") for argument in arguments[1:] if argument != "--extend"]
    if arguments[:1] == ["tune"] and without != arguments[1:]:
        return ["extend", *without]
    return arguments


def _run(settings: "Settings", options: RunOptions) -> None:
    """Runs what the settings describe, with progress, and shows the results."""
    import fedtune

    folder = options.out or fedtune.new_folder(settings)
    with _progress(folder) as progress:
        run = fedtune.run(settings, out=folder, force=options.force, listener=progress, optuna=options.optuna)
    _show(run)


@contextmanager
def _progress(folder: Path) -> Iterator["LiveProgress"]:
    """A display of the progress of the run in a folder.

    If Ctrl-C or one of STOP_SIGNALS (SIGTERM, a terminal that closes) stops the run, a line says how to resume it.
    """
    from fedtune.report.live import LiveProgress

    before = {number: signal.signal(number, _stop) for number in STOP_SIGNALS}
    try:
        with LiveProgress() as progress:
            yield progress
    except KeyboardInterrupt:
        if (folder / "settings.toml").is_file():
            typer.echo(f"stopped; to resume: fedtune resume {folder}", err=True)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    """Stops the program as Ctrl-C does. SystemExit would not do: a client's program may raise that, and only fails."""
    raise KeyboardInterrupt


def _show(run: "Run") -> None:
    """Prints a finished run: the table, what each search chose, and the paths of the figures.

    The exit code is 1 if every trial of a study failed.
    """
    from rich.console import Console

    from fedtune.report.frames import failed_studies, summary
    from fedtune.report.tables import MIN_WIDTH, chosen_lines, fixed_first_line, summary_table

    # A narrower table would hide columns. In a narrow terminal its lines wrap.
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    console.print(summary_table(summary(run.results, run.timings)))
    if run.settings.get("fixed_first") and (line := fixed_first_line(run.results)):
        typer.echo(line)
    for line in chosen_lines(run.results, run.settings["space"]):
        typer.echo(line)
    for figure in sorted((run.folder / "figures").glob("*.png")):
        typer.echo(f"figure: {figure}")
    typer.echo(f"run folder: {run.folder}")
    failed = failed_studies(run)
    for tuner, seed in failed:
        typer.echo(f"fedtune: {tuner}, seed {seed}: every trial failed: no client's update could be used", err=True)
    if failed:
        raise typer.Exit(1)

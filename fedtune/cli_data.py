"""The commands `fedtune data ...`. What is slow to import is imported by the command that needs it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli_options import Assignments, Command, assigned
from fedtune.errors import InputError

if TYPE_CHECKING:
    from fedtune.data.federated_dataset import FederatedDataset

Trust = Annotated[
    bool, typer.Option("--trust", help="Run the code that the settings of a run folder name as their data set.")
]

app = typer.Typer(help="Prepare and look at data sets.", no_args_is_help=True)


@app.command(cls=Command)
def prepare(name: str) -> None:
    """Download a data set and verify it; do nothing if it is there.

    Example:
      fedtune data prepare mnist
    """
    from fedtune.plugins import prepare_dataset

    folder = prepare_dataset(name)
    typer.echo(f"{name} is ready" + (f" in {folder}" if folder else ": it needs no download"))


@app.command(cls=Command)
def stats(
    what: str,
    assignments: Assignments = None,
    figure: Annotated[
        Path | None, typer.Option(help="Draw clients x labels and client sizes to this PNG file.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Show how many clients and examples a data set has, and how skewed they are.

    Example:
      fedtune data stats digits --figure digits.png
    """
    from rich.console import Console

    from fedtune.data.stats import statistics
    from fedtune.report.plots import check_path, plot_stats
    from fedtune.report.tables import size_histogram, stats_table

    if figure:
        check_path(figure)
    dataset = _load(what, assignments, trust)
    Console().print(stats_table(statistics(dataset)))
    Console().print(size_histogram(dataset.sizes().sum(1)))
    if figure:
        plot_stats(dataset, figure)
        typer.echo(f"figure: {figure}")


@app.command(cls=Command)
def check(
    what: str,
    assignments: Assignments = None,
    every: Annotated[bool, typer.Option("--all", help="Print every problem, not the first 20 of a kind.")] = False,
    trust: Trust = False,
) -> None:
    """Report every problem of a data set. The exit code is 0 for none, 1 if there are only warnings, 2 for errors.

    Example:
      fedtune data check digits
    """
    from fedtune.data.checks import find_problems
    from fedtune.data.problems import BadDataError, errors_of
    from fedtune.report.tables import problem_lines

    try:
        problems = find_problems(_load(what, assignments, trust))
    except BadDataError as error:
        problems = error.problems
    for line in problem_lines(problems, None if every else 20):
        typer.echo(line)
    errors = errors_of(problems)
    typer.echo(f"{len(errors):,} errors, {len(problems) - len(errors):,} warnings")
    raise typer.Exit(2 if errors else 1 if problems else 0)


@app.command(cls=Command)
def export(
    what: str,
    out: Annotated[Path, typer.Option(help="The folder to write, which must not exist.")],
    form: Annotated[str, typer.Option("--format", help="The form of the files: leaf.")] = "leaf",
    users_per_file: Annotated[int, typer.Option(help="How many clients share a file.")] = 100,
    assignments: Assignments = None,
    trust: Trust = False,
) -> None:
    """Write a data set as LEAF's JSON files.

    Example:
      fedtune data export digits --out digits_leaf
    """
    from fedtune.data.formats.leaf_export import export_leaf
    from fedtune.errors import UnknownNameError

    if form != "leaf":
        raise UnknownNameError("format", form, ["leaf"])
    export_leaf(_load(what, assignments, trust), out, users_per_file=users_per_file)
    typer.echo(f"folder: {out}")


def _load(what: str, assignments: list[str] | None, trust: bool) -> "FederatedDataset":
    """The data set. That of a run folder, or of its settings.toml, may come from a stranger: its code needs trust."""
    from fedtune.layers import data_table, resolve_settings
    from fedtune.plugins import load_dataset, name_kind

    layers = assigned(assignments)
    file = Path(what) if Path(what).name == "settings.toml" else Path(what, "settings.toml")
    if not file.is_file():
        return load_dataset(resolve_settings(what, *layers).data)
    data = data_table(file, *layers)
    if name_kind(data["name"]) == "file" and not trust:
        path = data["name"].rpartition(":")[0] or data["name"]
        raise InputError(
            f"{file} names {data['name']} as its data set, whose code would run: read {path}, then add --trust"
        )
    return load_dataset(data)

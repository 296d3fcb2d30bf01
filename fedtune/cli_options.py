"""The arguments and options that several commands share, each with its help."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand

ARGUMENT_HELP = {
    "what": "A data set (see `fedtune list`), file.py:function, a table, a folder, or a settings .toml file.",
    "run": "A run folder, for example runs/first.",
    "name": "An installed data set (see `fedtune list`).",
}

MaxRounds = Annotated[int | None, typer.Option(help="Rounds that one configuration may get in a search.")]
TotalRounds = Annotated[int | None, typer.Option(help="Rounds that each tuner may spend over all its trials.")]
NumConfigs = Annotated[
    int | None,
    typer.Option(help="Configurations to draw in all (of sha: in a bracket); sets the budget if nothing else does."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, for example client.learning_rate=0.05. Repeatable."),
]
Workers = Annotated[
    int | None, typer.Option(help="Processes to use; 0 means one for each core. Never changes a result.")
]
ExecutorName = Annotated[
    str | None, typer.Option("--executor", help="How clients are computed: auto, serial, pool or batched.")
]
LoseClients = Annotated[
    list[str] | None,
    typer.Option("--lose-client", metavar="ID", help="Go on without this client; it fails from now on. Repeatable."),
]
Optuna = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Also show the trials in this Optuna storage, for example sqlite:///trials.db."),
]


class Command(TyperCommand):
    """A command whose arguments have the help of ARGUMENT_HELP.

    Typer 0.20, which Flower requires, loses the help that an argument is declared with: it stores the help before
    click's constructor runs, and since click 8.5 that constructor sets it to None.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        for parameter in self.params:
            if isinstance(parameter, TyperArgument):
                parameter.help = ARGUMENT_HELP[str(parameter.name)]


@dataclass(frozen=True)
class ResumeOptions:
    """The options of the commands that continue an existing run: they say where it is computed and shown."""

    workers: Workers = None
    executor: ExecutorName = None
    optuna: Optuna = None


@dataclass(frozen=True)
class RunOptions:
    """The options of the commands that make a new run."""

    model: Annotated[str | None, typer.Option(help="The model (see `fedtune list`), or file.py:function.")] = None
    assignments: Assignments = None
    seed: Annotated[int | None, typer.Option(help="The first seed.")] = None
    seeds: Annotated[int | None, typer.Option(help="How many seeds; the first one is --seed.")] = None
    out: Annotated[Path | None, typer.Option(help="The run folder; by default a new one under runs/.")] = None
    force: Annotated[bool, typer.Option("--force", help="Overwrite an older run in --out.")] = False
    device: Annotated[str | None, typer.Option(help="Where clients train, for example cpu or cuda.")] = None
    precision: Annotated[
        str | None, typer.Option(help="The numbers that clients train with: fp32 or bf16. Changes the results.")
    ] = None
    workers: Workers = None
    executor: ExecutorName = None
    optuna: Optuna = None

    def layers(self, **settings: Any) -> list[dict[str, Any]]:
        """The layers of settings that the options and a command's own `settings` stand for; None means not set."""
        settings |= {
            "seed": self.seed,
            "seeds": self.seeds,
            "device": self.device,
            "precision": self.precision,
            "workers": self.workers,
            "executor": self.executor,
        }
        model = [{"model": {"name": self.model}}] if self.model else []
        given = {name: value for name, value in settings.items() if value is not None}
        return [*model, *assigned(self.assignments), given]


def assigned(assignments: list[str] | None) -> list[dict[str, Any]]:
    """A layer of settings for each `--set`."""
    from fedtune.settings_text import parse_assignment

    return [parse_assignment(text) for text in assignments or []]


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of its parameter `options`, which is a dataclass.

    Typer reads a command's options from its signature, so the fields are put there.
    """
    signature = inspect.signature(command)
    group = signature.parameters["options"].annotation
    own = [parameter for name, parameter in signature.parameters.items() if name != "options"]
    shared = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(group)
    ]

    @functools.wraps(command)
    def unfolded(**given: Any) -> None:
        options = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given, options=options)

    unfolded.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    return unfolded

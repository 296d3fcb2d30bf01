"""What a run would search, what is fixed, and where each came from: `fedtune space`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.hyperparameters import resolve_hyperparameters
from fedtune.layers import Layers
from fedtune.overlay import FIXED, dimensions, merge
from fedtune.settings import client_program_name
from fedtune.tuning.space import Number


@dataclass(frozen=True)
class SpaceRow:
    """One hyperparameter of a run. An origin is a data set, a client program, a file or the command line."""

    name: str  # such as client.learning_rate
    domain: Mapping[str, Any] | None  # as settings have it, {"log_uniform": [1e-4, 1.0]}; None if it is not searched
    domain_origin: str | None
    value: Number | None  # what `train` and the tuner manual use; None if the client program does not have it
    value_origin: str
    note: str = ""  # why it is not searched although it has a domain, or why it is left out


def space_rows(layers: Layers) -> list[SpaceRow]:
    """A row for each hyperparameter of the client program and of the server, and for each one that is left out.

    The domains and values are those that a run has with these layers. Raises InputError, as the run would.
    """
    settings = layers.resolve()
    hyperparameters = resolve_hyperparameters(settings)
    found = dimensions(*(merge(layer.table for layer in each) for each in (layers.shipped, layers.given)))
    program = f"client program {client_program_name(settings)}"
    values = {f"client.{name}": (value, program) for name, value in hyperparameters.client.items()}
    values |= {f"server.{name}": (value, "default") for name, value in hyperparameters.server.items()}
    rows = []
    for key, (value, default) in values.items():
        part, _, name = key.partition(".")
        domain = getattr(settings.space, part).get(name, FIXED)
        domain_origin = layers.origin(f"space.{key}") if domain != FIXED else None
        note = _why_fixed(found[key].fixed_by, key, layers) if key in found else ""
        value_origin = layers.origin(key) or default
        rows.append(SpaceRow(key, None if domain == FIXED else domain, domain_origin, value, value_origin, note))
    missing = f"{program} does not have it"
    return rows + [SpaceRow(key, None, None, None, origin, missing) for key, origin in layers.left_out]


def _why_fixed(fixed_by: str | None, key: str, layers: Layers) -> str:
    """Why a hyperparameter that has a domain is not searched; empty if it is searched."""
    if fixed_by is None:
        return ""
    because = "its value is set" if fixed_by == key else f"of {fixed_by} ({layers.origin(fixed_by)})"
    return f"not searched, because {because}"


def space_lines(rows: Sequence[SpaceRow]) -> Iterator[str]:
    """The rows as text: first what is searched, then what is fixed, then what is left out."""
    searched = [
        (row, _as_toml(row.domain), f"{row.domain_origin}; manual uses {row.value} ({row.value_origin})")
        for row in rows
        if row.domain is not None
    ]
    fixed = [
        (row, str(row.value), "; ".join(filter(None, (row.value_origin, row.note))))
        for row in rows
        if row.domain is None and row.value is not None
    ]
    left_out = [(row, "", f"{row.value_origin}; {row.note}") for row in rows if row.value is None]
    width = max(len(row.name) for row in rows)
    for title, shown in (("searched", searched), ("fixed", fixed), ("left out", left_out)):
        if shown or title == "searched":
            yield f"{title}:" if shown else f"{title}: nothing"
        second = max((len(text) for _, text, _ in shown), default=0)
        for row, text, where in shown:
            yield f"  {row.name:<{width}}  " + (f"{text:<{second}}  " if second else "") + where


def _as_toml(domain: Mapping[str, Any] | None) -> str:
    """The domain as one writes it in a settings file, {log_uniform = [0.0001, 1.0]}."""
    return ", ".join(f"{{{form} = {list(numbers)}}}" for form, numbers in (domain or {}).items())

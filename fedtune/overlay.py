"""How tables of settings are laid over each other: key by key, and the search space one dimension at a time.

A dimension is one hyperparameter, such as client.momentum. It is searched if it has a domain and the user does not fix
it. The user can fix it in three ways: the word "fixed" in place of its domain, a list `space.only` that does not name
it, or a value in `[client]` or `[server]` without a domain in the user's own `[space]`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from fedtune.errors import InputError, UnknownNameError

FIXED = "fixed"  # stands in place of a domain
PARTS = ("client", "server")
Tables = Mapping[str, Any]


def merge(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One table of settings, not yet checked; a later layer overrides an earlier one, key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge_into(merged, layer)
    return merged


class Dimension(NamedTuple):
    """A hyperparameter that has a domain, or the word "fixed" in its place, in some layer."""

    domain: Any  # as in settings: {log_uniform = [1e-4, 1.0]}, or the word
    fixed_by: str | None  # the setting that fixes it, by its dotted name; None if it is searched


def lay_over(shipped: Tables, given: Tables) -> dict[str, dict[str, Any]]:
    """The tables of `[space]`: the domain of every dimension that is searched, the word "fixed" for every other one.

    `shipped` and `given`, what the user gives, are tables of settings whose types were checked.
    """
    space: dict[str, dict[str, Any]] = {part: {} for part in PARTS}
    for key, dimension in dimensions(shipped, given).items():
        part, _, name = key.partition(".")
        space[part][name] = FIXED if dimension.fixed_by else dimension.domain
    return space


def dimensions(shipped: Tables, given: Tables) -> dict[str, Dimension]:
    """Every dimension by its dotted name; the arguments are as in `lay_over`. Raises InputError."""
    only = given.get("space", {}).get("only")
    found = {}
    for part in PARTS:
        below, above = shipped.get("space", {}).get(part, {}), given.get("space", {}).get(part, {})
        for name in {**below, **above}:
            key, asked = f"{part}.{name}", above.get(name)
            domain, fixed_by = asked or below[name], None
            if domain == FIXED:
                fixed_by = f"space.{key}"
            elif only is not None and key not in only:
                fixed_by = "space.only"
            elif only is None and asked is None and name in given.get(part, {}):
                fixed_by = key
            found[key] = Dimension(domain, fixed_by)
    _check_only(only or [], found)
    return found


def _check_only(only: Iterable[str], found: Mapping[str, Dimension]) -> None:
    """Raises InputError unless every name in `space.only` is a dimension that can be searched."""
    for key in only:
        if key not in found:
            raise UnknownNameError("dimension in space.only", key, found)
        if found[key].fixed_by:
            raise InputError(f'space.only must name what is searched, got {key!r}, and space.{key} = "{FIXED}"')


def _merge_into(target: dict[str, Any], layer: Mapping[str, Any], in_space: bool = False) -> None:
    for key, value in layer.items():
        # A domain of the search space counts as one value: {uniform = ...} replaces {log_uniform = ...}.
        if isinstance(value, Mapping):
            if not isinstance(target.get(key), dict) or (in_space and _is_domain(value)):
                target[key] = {}
            _merge_into(target[key], value, in_space or key == "space")
        else:
            target[key] = value


def _is_domain(value: Mapping[str, Any]) -> bool:
    return len(value) == 1 and isinstance(next(iter(value.values())), list)

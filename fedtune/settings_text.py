"""Settings as TOML text: a file of the user's, the settings.toml of a run, one assignment of the command line."""

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fedtune.errors import InputError
from fedtune.settings import Settings

# The settings that every version of fedtune has written into a run folder, also those that the user left out.
IN_EVERY_RUN = {
    "tuners",
    "seeds",
    "seed",
    "max_rounds",
    "total_rounds",
    "cohort_size",
    "parallel_trials",
    "workers",
    "device",
    "executor",
    "data",
    "model",
    "client",
    "server",
    "space",
    "tuner",
    "evaluation",
}


def read_settings(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, which may begin with a byte order mark.

    The settings of a run that was written before there was the setting `engine` get "torch": its clients trained there.
    """
    try:
        if path.exists() and not path.is_file():  # to open a named pipe would wait for ever
            raise OSError("it is no file")
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"settings file {path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, tables within tables
        raise InputError(f"settings file {path} is not TOML: {error}") from None
    if any(abs(number) >= 2**63 for number in _whole_numbers(tables)):
        raise InputError(f"settings file {path} must have whole numbers of 64 bits, as TOML has, got a longer one")
    return {"engine": "torch", **tables} if are_of_a_run(tables) else tables


def write_settings(settings: Settings) -> str:
    """TOML text from which `resolve` makes the same settings again."""
    tables = settings.model_dump(exclude_none=True)
    # Without this line the data set's own number would override "all" when the settings are read again.
    tables["evaluation"].setdefault("clients", "all")
    return tomli_w.dumps(tables)


def parse_assignment(text: str) -> dict[str, Any]:
    """The layer of one `--set a.b=value`; the value is TOML, and a bare word is a string."""
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise InputError(f"--set must be key=value, for example client.learning_rate=0.1, got {text!r}")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in reversed(_split_key(key)):
        parsed = {part: parsed}
    return parsed  # type: ignore[no-any-return]


def _whole_numbers(value: Any) -> Iterator[int]:
    """Every whole number within a value from TOML."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(member)


def _split_key(key: str) -> list[str]:
    return [part.strip().strip("\"'") for part in key.split(".")]


def are_of_a_run(table: Mapping[str, Any]) -> bool:
    """Whether the settings are those of a run folder: `write_settings` wrote them, of any version of fedtune."""
    return table.keys() >= IN_EVERY_RUN

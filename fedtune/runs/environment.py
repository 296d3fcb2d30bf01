"""The versions, the commit and the machine of a run, and the warning if a resumed run has other versions."""

import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fedtune.errors import InputError
from fedtune.events import Listener
from fedtune.files import replacing

VERSIONED = ("fedtune", "torch", "numpy", "flwr", "pandas", "flwr-datasets")


def check_versions(folder: Path, listener: Listener) -> None:
    """Warns if a run was begun with other versions, or if its environment.json is lost: then it is written anew.

    Raises InputError if environment.json is damaged.
    """
    path = folder / "environment.json"
    if not path.exists():
        message = (
            f"{path} was lost, with the versions that the run was begun with: it holds the present ones from now on"
        )
        listener({"event": "warning", "message": message})
        write_environment(folder)
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))["versions"]
        different = [f"{name} {begun[name]}, now {now}" for name in VERSIONED if (now := version(name)) != begun[name]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{path} must say which versions the run was begun with, got {reason}; if it can't be restored, remove it"
        ) from None
    if different:
        begun_with = f"the run was begun with {'; '.join(different)}"
        message = f"{begun_with}: its results may differ from a run with either set of versions"
        listener({"event": "warning", "message": message})


def write_environment(folder: Path) -> None:
    """Writes environment.json into a run folder."""
    with replacing(folder / "environment.json") as path:
        path.write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8", newline="\n")


def environment() -> dict[str, Any]:
    """Versions of the packages that decide the results, Python, the commit of the source, and the machine."""
    return {
        "versions": {name: version(name) for name in VERSIONED},
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": {
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
    }


def _commit() -> str | None:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            encoding="utf-8",
            check=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()

"""The repair of journals that a power cut damaged: what follows the last good line is cut off.

What was cut is computed again when the run is resumed, with the same results. Only if it names a lost client, the
client is lost anew: from the latest checkpoint before the cut on.
"""

import os
from pathlib import Path

from fedtune.operating_system import sync
from fedtune.runs.journal import DamagedJournalError, Journal
from fedtune.runs.run_folder import locked
from fedtune.settings import Settings


def repair_run(folder: Path, settings: Settings) -> list[str]:
    """What was cut: a line of text for each journal of the run that was damaged."""
    with locked(folder):
        journals = [folder / f"{tuner}-seed{seed}" / "journal.jsonl" for tuner, seed in settings.studies]
        return [cut for cut in map(_cut, journals) if cut is not None]


def _cut(path: Path) -> str | None:
    """Cuts a journal behind its last good line. Returns what was cut, in words; None if the journal is not damaged."""
    try:
        Journal(path, read_only=True)
    except DamagedJournalError as damage:
        bad = path.read_bytes()[damage.good_bytes :]
        os.truncate(path, damage.good_bytes)
        sync(path)
        num_lines = bad.removesuffix(b"\n").count(b"\n") + 1
        return (
            f"{path} was damaged: cut off all from line {damage.line_number} on ({num_lines:,} lines, {len(bad):,} "
            f"bytes); study {path.parent.name} computes again what was there"
        )
    return None

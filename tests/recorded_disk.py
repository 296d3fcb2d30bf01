"""Records what a run does to its folder, and builds the folder that a crash or a power cut would have left.

A crash between two operations leaves all operations before it. A power cut leaves more or less of what was not synced:
each write and each change of a name may be lost, whatever came after it, and a lost write may leave zeros.
"""

import os
import random
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Operation:
    """One change of the disk. `kind` is mkdir, create, rename, unlink, write, truncate or sync."""

    kind: str
    path: str
    target: str = ""  # the new name, of rename
    data: bytes = b""  # of write
    place: int = 0  # of write and truncate

    @property
    def names(self):
        """Whether it changes a folder's names and not a file's content."""
        return self.kind in ("mkdir", "create", "rename", "unlink")


@dataclass(eq=False)
class Recorder:
    """The operations on what is below `root`, in their order."""

    root: Path
    operations: list[Operation] = field(default_factory=list)
    paths: dict[int, str] = field(default_factory=dict)  # by descriptor
    contents: dict[str, bytes] = field(default_factory=dict)  # what the recorded operations left

    @contextmanager
    def recording(self, monkeypatch):
        """Within it, the operations of this process are recorded."""
        with monkeypatch.context() as patch:
            for name in ("open", "close", "mkdir", "replace", "rename", "unlink", "write", "ftruncate", "truncate"):
                patch.setattr(os, name, self._watched(name, getattr(os, name)))
            patch.setattr(os, "fsync", self._watched("fsync", lambda descriptor: None))
            yield self

    def note(self, *fields, **keywords):
        self.operations.append(Operation(*fields, **keywords))

    def _watched(self, name, function):
        watch = getattr(self, f"_{name}")

        def watched(where, *arguments, **keywords):
            path = self.paths.get(where) if isinstance(where, int) else self._within(where)
            if path is None:
                return function(where, *arguments, **keywords)
            if name == "open":
                existed = os.path.exists(where)
                descriptor = function(where, *arguments, **keywords)
                self._open(path, descriptor, existed)
                return descriptor
            watch(path, where, *arguments)
            return function(where, *arguments, **keywords)

        return watched

    def _within(self, path):
        relative = os.path.relpath(os.fspath(path), self.root)
        return None if relative.startswith("..") else relative

    def _open(self, path, descriptor, existed):
        self.paths[descriptor] = path
        if not existed:
            self.note("create", path)
            self.contents[path] = b""

    def _close(self, path, descriptor):
        del self.paths[descriptor]

    def _mkdir(self, path, where, *arguments):
        if not os.path.exists(where):
            self.note("mkdir", path)

    def _replace(self, path, where, target):
        self._look(path)
        self.note("rename", path, target=self._within(target))
        self.contents[self._within(target)] = self.contents.pop(path)

    _rename = _replace

    def _unlink(self, path, where, *arguments):
        if os.path.exists(where):
            self._look(path)
            self.note("unlink", path)
            del self.contents[path]

    def _write(self, path, descriptor, data):
        self.note("write", path, data=bytes(data), place=len(self.contents[path]))
        self.contents[path] += data

    def _ftruncate(self, path, where, size):
        if size != len(self.contents[path]):
            self.note("truncate", path, place=size)
            self.contents[path] = self.contents[path][:size]

    _truncate = _ftruncate

    def _fsync(self, path, descriptor):
        if (self.root / path).is_file():
            self._look(path)
        self.note("sync", path)

    def _look(self, path):
        """Records what other libraries wrote into the file since the last look."""
        content = (self.root / path).read_bytes()
        if content != self.contents[path]:
            self.note("write", path, data=content)
            self.contents[path] = content


class Disk:
    """Folders and files: which names there are, and what the files hold."""

    def __init__(self):
        self.folders = {"."}
        self.files = {}  # the number of a file, by path
        self.contents = []  # by number

    @classmethod
    def of(cls, folder):
        """What there is below a folder."""
        disk = cls()
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                disk.folders.add(name)
            else:
                disk.files[name] = len(disk.contents)
                disk.contents.append(path.read_bytes())
        return disk

    def copy(self):
        disk = Disk()
        disk.folders, disk.files, disk.contents = set(self.folders), dict(self.files), list(self.contents)
        return disk

    def seen(self):
        """{path: content} of all files whose folders exist; and the folders."""
        folders = [name for name in self.folders if all(str(above) in self.folders for above in Path(name).parents)]
        files = {
            path: self.contents[number]
            for path, number in self.files.items()
            if os.path.dirname(path) in ("", *folders)
        }
        return frozenset(folders), tuple(sorted(files.items()))

    def number_of(self, operation):
        """The file that an operation is about; None if it is about a folder."""
        return self.files.get(operation.path)

    def do(self, operation, number, *, lost=None):
        """Applies an operation. A lost write leaves nothing ("nothing") or zeros ("zeros")."""
        match operation.kind:
            case "mkdir":
                self.folders.add(operation.path)
            case "create":
                self.files[operation.path] = number
            case "rename":
                self.files.pop(operation.path, None)
                self.files[operation.target] = number
            case "unlink":
                self.files.pop(operation.path, None)
            case "truncate":
                self.contents[number] = self.contents[number][: operation.place]
            case "write" if lost != "nothing":
                data = bytes(len(operation.data)) if lost == "zeros" else operation.data
                content, end = self.contents[number], operation.place + len(data)
                self.contents[number] = content[: operation.place].ljust(operation.place, b"\0") + data + content[end:]


def numbered(start, operations):
    """[(operation, number of its file or None)], and a disk that has all these files, without names."""
    disk, pairs = start.copy(), []
    empty = start.copy()
    for operation in operations:
        if operation.kind == "create":
            number = len(disk.contents)
            disk.contents.append(b"")
            empty.contents.append(b"")
        else:
            number = disk.number_of(operation)
        disk.do(operation, number)
        pairs.append((operation, number))
    return pairs, empty


def crash_states(start, operations):
    """[(where, state)]: what a killed process leaves before each operation, within each write, and at the end."""
    pairs, disk = numbered(start, operations)
    states = [("at the start", disk.seen())]
    for index, (operation, number) in enumerate(pairs):
        if operation.kind == "write":
            half = disk.copy()
            half.do(
                Operation(
                    "write", operation.path, data=operation.data[: len(operation.data) // 2], place=operation.place
                ),
                number,
            )
            states.append((f"within operation {index}, {operation.kind} {operation.path}", half.seen()))
        disk.do(operation, number)
        states.append((f"after operation {index}, {operation.kind} {operation.path}", disk.seen()))
    return distinct(states)


def synced(pairs):
    """For each operation, whether a later sync brought it to the disk."""
    kept, files, folders = [], set(), set()
    for operation, number in reversed(pairs):
        if operation.kind == "sync":
            files.add(number) if number is not None else folders.add(operation.path)
            kept.append(True)
        elif operation.names:
            kept.append((os.path.dirname(operation.path) or ".") in folders)
        else:
            kept.append(number in files)
    return kept[::-1]


# What becomes of operations that were not synced: of names, and of content.
FATES = [
    ("kept", "kept"),
    ("kept", "nothing"),
    ("kept", "zeros"),
    ("lost", "kept"),
    ("lost", "nothing"),
    ("lost", "zeros"),
    ("any", "any"),
    ("any", "any"),
]


def power_cut_states(start, operations):
    """[(number of operations before, where, state)]: what a power cut after each operation may leave."""
    pairs, empty = numbered(start, operations)
    states = []
    for count in range(1, len(pairs) + 1):
        before = pairs[:count]
        survived = synced(before)
        for variant, (names, content) in enumerate(FATES):
            rng = random.Random(f"{count} {variant}")
            disk = empty.copy()
            for (operation, number), safe in zip(before, survived, strict=True):
                if operation.names:
                    fate = rng.choice(["kept", "lost"]) if names == "any" else names
                    if safe or fate == "kept":
                        disk.do(operation, number)
                else:
                    fate = rng.choice(["kept", "nothing", "zeros"]) if content == "any" else content
                    disk.do(operation, number, lost=None if safe or fate == "kept" else fate)
            last = before[-1][0]
            where = f"{names} names, {content} content after operation {count - 1}, {last.kind} {last.path}"
            states.append((count, where, disk.seen()))
    return states


def distinct(states):
    """The states without those that came before."""
    seen = set()
    return [state for state in states if not (state[-1] in seen or seen.add(state[-1]))]


def restore(state, folder):
    """Writes a state into an empty folder."""
    folders, files = state
    shutil.rmtree(folder, ignore_errors=True)
    for name in sorted(folders):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, content in files:
        (folder / name).write_bytes(content)

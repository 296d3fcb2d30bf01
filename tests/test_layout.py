import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("folder", ["clients", "datasets", "tests", "experiments"])
def test_folders_of_the_root_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_import_datasets_from_the_root_gives_hugging_faces_package():
    code = "import datasets; assert hasattr(datasets, 'Dataset'), datasets.__path__"
    # -c puts the working directory first on the path, as `python -m` from the root does.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# From the ground up. A module may import from floors below its own and from its own room. `data.__init__` is the front
# of the package: it offers names from all of data, also from the rooms above the container.
FLOORS = [
    {"errors", "printable"},
    {"operating_system", "rng"},
    {"files"},
    {"events", "data", "tuning", "overlay"},
    {"data.formats", "settings", "options"},
    {"data.__init__", "tuning.__init__", "settings_text"},
    {"client"},
    {"server", "plugins"},
    {"hyperparameters", "initial_weights", "layers", "testing"},
    {"study_tuners", "search_space"},
    {"executors", "simulation"},
    {"runs", "report"},
    {"server_app", "__init__", "doctor"},
    {"server.app", "cli_options"},
    {"cli_data"},
    {"cli"},
    {"__main__"},
]


def modules(package, folder):
    """The package's modules by dotted name; a package's own is that of its __init__.py."""
    named = {}
    for path in folder.rglob("*.py"):
        parts = (package, *path.relative_to(folder).with_suffix("").parts)
        named[".".join(parts).removesuffix(".__init__")] = path
    return named


def imports(path, known):
    """The known modules that a file imports anywhere in it, also within functions and for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must import by full names"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {member if member in known else node.module for member in members}
    return found & set(known)


def floor_of(module):
    """The number of the floor on which a module of fedtune lies, and its room there."""
    name = module.removeprefix("fedtune").removeprefix(".") or "__init__"
    rooms = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    parts = name.split(".")
    around = [".".join(parts[:size]) for size in range(len(parts), 0, -1)]
    room = next(room for room in [f"{name}.__init__", *around] if room in rooms)
    return rooms[room], room


FEDTUNE = modules("fedtune", ROOT / "fedtune")
CLIENTS = modules("fedtune_clients", ROOT / "clients" / "fedtune_clients")
DATASETS = modules("fedtune_datasets", ROOT / "datasets" / "fedtune_datasets")


@pytest.mark.parametrize("known", [FEDTUNE, CLIENTS, DATASETS], ids=["fedtune", "clients", "datasets"])
def test_no_imports_go_round_in_a_circle(known):
    graph = {module: imports(path, known) - {module} for module, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


@pytest.mark.parametrize("module", sorted(FEDTUNE))
def test_imports_go_down_the_floors(module):
    floor, room = floor_of(module)
    for imported in imports(FEDTUNE[module], FEDTUNE):
        below, other = floor_of(imported)
        assert below < floor or other == room, f"{module} ({room}) must not import {imported} ({other})"


def test_the_library_names_no_plug_in_package():
    plug_ins = CLIENTS | DATASETS
    assert {module: imports(path, plug_ins) for module, path in FEDTUNE.items()} == {
        module: set() for module in FEDTUNE
    }

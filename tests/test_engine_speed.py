"""The arithmetic and the tables of experiments/engine_speed; the script itself runs in test_experiments.py."""

import importlib
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from experiment_script import script_path

FOLDER = script_path("engine_speed").parent


@pytest.fixture(scope="module")
def experiment():
    """The experiment's modules, which import each other by their names."""
    names = {path.stem for path in FOLDER.glob("*.py")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(FOLDER), *sys.path])
        wanted = ("work", "limit", "engines", "measured", "tables", "run")
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in wanted})
    for name in names & sys.modules.keys():
        del sys.modules[name]


@pytest.mark.parametrize("model", ["logistic", "mlp", "cnn"])
def test_the_useful_arithmetic_is_that_of_the_layers(experiment, model):
    """By the shapes that a module sees: a product forwards, one for the weights, and one for inputs with a gradient."""
    counts = []

    def count(layer, inputs, output):
        products = 2 + inputs[0].requires_grad
        counts.append(products * 2 * output.numel() * layer.weight[0].numel())

    module = experiment.work.make_module(model, ours=False)
    for layer in module:
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.register_forward_hook(count)
    module(torch.randn(3, 28, 28))
    assert 3 * experiment.limit.flop_of_example(model) == sum(counts)


@pytest.mark.parametrize("model", ["lstm", "leaf_lstm"])
def test_the_useful_arithmetic_of_an_lstm_is_that_of_its_equations(experiment, model):
    """Written out, with what the first layer makes of each character taken from a table of all characters."""
    work, limit = experiment.work, experiment.limit
    module = work.make_module(model)
    counts = []

    def product(a, weight):
        counts.append((1 + a.requires_grad + weight.requires_grad) * 2 * a.numel() * len(weight))
        return a @ weight.T

    tokens = torch.randint(work.CHARACTERS, (2, work.WINDOW))
    first, *others = module.layers
    inputs = product(module.embedding.weight, first.weight_ih_l0)[tokens].unbind(1)
    for layer in module.layers:
        if layer in others:
            inputs = [product(h, layer.weight_ih_l0) for h in states]
        h = c = None
        states = []
        for x in inputs:
            i, f, g, o = (x if h is None else x + product(h, layer.weight_hh_l0)).chunk(4, 1)
            c = i.sigmoid() * g.tanh() + (0 if c is None else f.sigmoid() * c)
            h = o.sigmoid() * c.tanh()
            states.append(h)
    product(h, module.output.weight)
    assert sum(counts) == 2 * limit.flop_of_example(model) + limit.flop_of_step(model)


def test_a_round_has_the_arithmetic_of_all_examples_and_steps(experiment):
    limit = experiment.limit
    assert limit.flop_of_round("mlp", 10) == 10 * 100 * limit.flop_of_example("mlp")
    of_client = 40 * limit.flop_of_example("leaf_lstm") + 2 * limit.flop_of_step("leaf_lstm")
    assert limit.flop_of_round("leaf_lstm", 3) == 3 * of_client


def test_the_tables_compare_measurements_of_the_same_turn(experiment):
    """The medians alone would give 20 / 4 for pfl, and 2 / 4 for the limit."""
    of_turns = {
        "the machine's limit": [1, 2, 2],
        "fedtune, pool": [2, 4, 8],
        "pfl": [100, 100, 100],
        "pfl, processes": [8, 20, 32],
    }
    rows = [
        experiment.measured.Measured("milliseconds a round", "mlp", 10, engine, turn, value)
        for engine, values in of_turns.items()
        for turn, value in enumerate(values)
    ]
    results = experiment.measured.Results(pd.DataFrame(rows))
    assert results.advantage("mlp", 10, "pfl") == (4, 4, 5)
    assert results.share_of_limit("mlp", 10, "fedtune, pool") == (0.5, 0.25, 0.5)
    cells = next(experiment.tables.tables(results)).splitlines()[2].split(" | ")
    assert cells[1] == "4.00 (4.00–5.00); target at least 3: met"
    assert cells[-1] == "50% (25%–50%); target at least 40%: met |"


def test_a_missed_target_is_named_and_what_was_not_measured_is_empty(experiment):
    rows = [
        experiment.measured.Measured("seconds to the first round", "logistic", 10, engine, 0, seconds)
        for engine, seconds in {"fedtune, pool": 1.5, "Flower on Ray": 10}.items()
    ]
    tables = list(experiment.tables.tables(experiment.measured.Results(pd.DataFrame(rows))))
    assert "| 0.15 (0.15–0.15); target at most 0.12: **missed** |" in tables[3]
    assert len(tables[0].splitlines()) == 2  # its head


def test_the_tables_of_the_readme_are_those_of_the_results(experiment):
    results = experiment.measured.Results(pd.read_csv(FOLDER / "results.csv"))
    if experiment.engines.LIMIT not in results.engines(experiment.measured.ROUND):
        pytest.skip("the results were measured before there was a limit to compare with")
    readme = (FOLDER / "README.md").read_text()
    assert all(table in readme for table in experiment.tables.tables(results))


def test_the_demo_is_the_makefiles(experiment):
    makefile = (FOLDER.parents[1] / "Makefile").read_text().replace("\\\n", " ")
    assert experiment.run.DEMO_JOB in " ".join(makefile.split())

import pytest

from fedtune.errors import InputError, UnknownNameError
from fedtune.hyperparameters import resolve_hyperparameters
from fedtune.settings import client_program_name, resolve
from fedtune.tuning.domains import LogUniform, PowerOfTwo
from fedtune_clients.local_sgd import HYPERPARAMETERS

TABLE = {
    "data": {"name": "digits"},
    "client": {"learning_rate": 0.05, "epochs": 2},
    "server": {"learning_rate": 0.5, "clip_factor": 0.0},
    "space": {
        "client": {"learning_rate": {"log_uniform": [1e-3, 1.0]}, "batch_size": {"power_of_two": [8, 128]}},
        "server": {"momentum": {"choice": [0.0, 0.9]}, "learning_rate": {"log_uniform": [0.1, 10.0]}},
    },
}
FIXED_CLIENT = {name: hp.default for name, hp in HYPERPARAMETERS.items()} | {"learning_rate": 0.05, "epochs": 2}
FIXED_SERVER = {"learning_rate": 0.5, "momentum": 0.0, "decay": 0.0, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}


def hyperparameters(**change):
    return resolve_hyperparameters(resolve([TABLE, change]))


def test_fixed_values_are_completed_by_the_defaults():
    found = hyperparameters()
    assert found.client == FIXED_CLIENT
    assert found.server == FIXED_SERVER
    assert found.space.client == {"learning_rate": LogUniform(1e-3, 1.0), "batch_size": PowerOfTwo(8, 128)}
    assert set(found.space.server) == {"momentum", "learning_rate"}


def test_the_client_program_decides_what_is_known(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from fedtune.tuning.space import Hyperparameter\n"
        "HYPERPARAMETERS = {'warmth': Hyperparameter(3, integer=True)}\n"
        "def train(model, weights, examples, config, rng):\n    return weights\n"
    )
    settings = resolve([{"data": {"name": "digits"}, "client": {"name": str(program)}}])
    assert client_program_name(settings) == str(program)
    assert resolve_hyperparameters(settings).client == {"warmth": 3}
    assert client_program_name(resolve([TABLE])) == "local_sgd"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"client": {"rate": 1.0}}, "unknown client hyperparameter 'client.rate'; known: client.batch_size, client."),
        ({"client": {"momentum": 1.0}}, "client.momentum must be a finite number >= 0.0 and < 1.0, got 1.0"),
        ({"client": {"epochs": 1.5}}, "client.epochs must be a whole number >= 1, got 1.5"),
        ({"client": {"name": "sgd"}}, "unknown client program 'sgd'; known: local_sgd"),
        ({"space": {"client": {"rate": {"uniform": [0, 1]}}}}, "unknown client hyperparameter 'rate'; known: "),
        ({"space": {"server": {"rate": {"uniform": [0, 1]}}}}, "unknown server hyperparameter 'rate'; known: beta1, "),
        ({"space": {"client": {"momentum": {"uniform": [0, 1]}}}}, "client hyperparameter outside its range in "),
        ({"space": {"client": {"momentum": {"normal": [0, 1]}}}}, "unknown domain of space.client.momentum 'normal'"),
    ],
)
def test_hyperparameters_that_are_not_allowed(change, said):
    with pytest.raises(InputError) as raised:
        hyperparameters(**change)
    assert str(raised.value).startswith(said)
    assert isinstance(raised.value, UnknownNameError) == said.startswith("unknown")

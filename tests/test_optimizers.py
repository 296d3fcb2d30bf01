import pytest
import torch
from pydantic import ValidationError

from fedtune.errors import InputError
from fedtune.server import optimizers
from fedtune.settings import ServerSettings

W = torch.tensor([1.0, -2.0, 0.5])
MEANS = [torch.tensor([0.5, -1.0, 0.5]), torch.tensor([0.0, -3.0, 1.0]), torch.tensor([2.0, 0.0, -1.0])]
CONFIG = {"learning_rate": 0.5, "momentum": 0.9, "decay": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}


def run(optimizer, config):
    weights, state, seen = W, optimizers.init(W), []
    for server_round, mean in enumerate(MEANS, start=1):
        weights, state = optimizers.update(optimizer, state, weights, mean, config, server_round)
        seen.append(weights)
    return seen


def test_rate_one_without_momentum_is_exactly_the_mean():
    plain = CONFIG | {"learning_rate": 1.0, "momentum": 0.0, "decay": 0.0}
    for weights, mean in zip(run("sgd", plain), MEANS, strict=True):
        assert torch.equal(weights, mean)


def test_sgd_agrees_with_torch():
    parameter = W.clone()
    reference = torch.optim.SGD([parameter], lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(reference, gamma=0.9)
    for weights, mean in zip(run("sgd", CONFIG), MEANS, strict=True):
        parameter.grad = parameter - mean  # the pseudo-gradient
        reference.step()
        scheduler.step()
        torch.testing.assert_close(weights, parameter)


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_adaptive_optimisers_follow_reddi_et_al(optimizer):
    m = v = torch.zeros(3)
    w = W
    for t, (weights, mean) in enumerate(zip(run(optimizer, CONFIG), MEANS, strict=True)):
        delta = mean - w
        m = 0.9 * m + 0.1 * delta
        v = 0.99 * v + 0.01 * delta**2 if optimizer == "adam" else v - 0.01 * delta**2 * torch.sign(v - delta**2)
        w = w + 0.5 * 0.9**t * m / (v.sqrt() + 1e-3)
        torch.testing.assert_close(weights, w)


def test_inputs_are_left_alone():
    state = optimizers.init(W)
    optimizers.update("yogi", state, W, MEANS[0], CONFIG, 1)
    assert torch.equal(W, torch.tensor([1.0, -2.0, 0.5]))
    assert not state.first.any()
    assert not state.second.any()


@pytest.mark.parametrize("name", list(optimizers.HYPERPARAMETERS))
@pytest.mark.parametrize("value", [-1e-9, 0.0, 1e-9, 1 - 1e-9, 1.0, 1 + 1e-9, 1e9, float("inf"), float("nan")])
def test_a_searched_value_is_allowed_where_the_setting_is(name, value):
    hyperparameter = optimizers.HYPERPARAMETERS[name]
    assert hyperparameter.default == getattr(ServerSettings(), name)
    allowed = []
    for check in (lambda: ServerSettings(**{name: value}), lambda: hyperparameter.check(name, value)):
        try:
            check()
            allowed.append(True)
        except (ValidationError, InputError):
            allowed.append(False)
    assert allowed[0] == allowed[1]

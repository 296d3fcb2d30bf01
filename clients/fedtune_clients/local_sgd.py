"""Local SGD: what a client does with the weights it is sent. With `proximal_mu` > 0 it is the local solver of FedProx.

Source: McMahan et al. (2017), "Communication-Efficient Learning of Deep Networks from Decentralized Data", algorithm 1,
ClientUpdate; the proximal term is equation 2 of Li et al. (2020), "Federated Optimization in Heterogeneous Networks".

    ClientUpdate(k, w):
    1   for each local epoch i from 1 to E do
    2       B <- (split P_k into batches of size B)
    3       for batch b in B do
    4           w <- w - eta * grad l(w; b)
    5   return w to server

E is epochs, B batch_size, eta learning_rate, P_k examples. Added: momentum, dropout, weight decay and FedProx's term.
Line 4 follows the gradient of l(w; b) + weight_decay/2 |w|^2 + proximal_mu/2 |w - w0|^2, where w0 is the weights sent.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedtune.errors import UnknownNameError
from fedtune.flat_model import Examples, FlatModel, batches
from fedtune.tuning.space import Config, Hyperparameter, Number

HYPERPARAMETERS = {
    "learning_rate": Hyperparameter(0.1, low=0.0, low_open=True),
    "momentum": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    "weight_decay": Hyperparameter(0.0, low=0.0),
    "batch_size": Hyperparameter(10, low=1, integer=True),
    "epochs": Hyperparameter(1, low=1, integer=True),
    "dropout": Hyperparameter(0.0, low=0.0, high=1.0, high_open=True),
    "proximal_mu": Hyperparameter(0.0, low=0.0),
}

# What is searched on data for which nobody chose: the ranges of Khodak et al. (2021), as in mnist.toml.
SPACE = {
    "learning_rate": {"log_uniform": [1e-4, 1.0]},
    "momentum": {"uniform": [0.0, 0.99]},
    "weight_decay": {"log_uniform": [1e-5, 1e-3]},
    "batch_size": {"power_of_two": [8, 128]},
    "epochs": {"integer": [1, 5]},
    "dropout": {"uniform": [0.0, 0.5]},
    "proximal_mu": {"log_uniform": [1e-5, 1.0]},
}


def train(
    model: FlatModel, weights: Float[Tensor, "weight"], examples: Examples, config: Config, rng: np.random.Generator
) -> Float[Tensor, "weight"]:
    """The weights after local SGD from `weights` on `examples`: `model.flat`, valid until the model is next used.

    They depend on the arguments alone, not on what the model did before. What `config` leaves out keeps its default.
    """
    config = complete(config)
    mu, momentum = config["proximal_mu"], config["momentum"]
    settings = {
        "learning_rate": config["learning_rate"],
        "momentum": momentum,
        "weight_decay": config["weight_decay"] + mu,  # proximal_mu (w - w0) = proximal_mu w - proximal_mu w0
    }
    model.load(weights)
    attraction = model.slices(mu * model.flat) if mu > 0 else None  # not of `weights`, which may be on the CPU
    _prepare(model.module, config["dropout"], rng)
    parameters = model.slices(model.flat)
    velocities = [torch.zeros_like(parameter) for parameter in parameters] if momentum > 0 else []
    for _ in range(int(config["epochs"])):  # 1
        for x, y in batches(_shuffled(examples, rng), int(config["batch_size"])):  # 2, 3
            gradients = loss_gradients(model.loss(model.module(x), y), model.parameters)
            if attraction is not None:
                gradients = list(torch._foreach_sub(gradients, attraction))
            sgd_step(parameters, gradients, velocities, **settings)  # 4
    return model.flat  # 5


def train_batched(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Examples,
    sizes: Sequence[int],
    configs: Sequence[Config],
    rngs: Sequence[np.random.Generator],
) -> Float[Tensor, "client weight"]:
    """What `train` gives for each of several clients, to rounding: see `fedtune_clients.batched_sgd.train`."""
    from fedtune_clients import batched_sgd  # which imports this module

    return batched_sgd.train(model, weights, examples, sizes, configs, rngs)


def complete(config: Config) -> dict[str, Number]:
    """The configuration with the defaults of what it leaves out."""
    for name in config:
        if name not in HYPERPARAMETERS:
            raise UnknownNameError("client hyperparameter", name, HYPERPARAMETERS)
    return {name: hp.check(name, config.get(name, hp.default)) for name, hp in HYPERPARAMETERS.items()}


def _prepare(module: nn.Module, dropout: float, rng: np.random.Generator) -> None:
    """Puts the module into training mode with this dropout, and seeds the random numbers that its layers draw."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = dropout
    seed = int(rng.integers(2**63))
    if next(module.parameters()).is_cpu:
        torch.default_generator.manual_seed(seed)  # 200 times as fast as torch.manual_seed, which seeds every device
    else:
        torch.manual_seed(seed)


def _shuffled(examples: Examples, rng: np.random.Generator) -> Examples:
    order = torch.from_numpy(rng.permutation(len(examples.y))).to(examples.y.device)
    return Examples(examples.x.index_select(0, order), examples.y.index_select(0, order))


# Two private functions of torch save a fifth of a step of logistic regression; each has a public form beside it.


def engine_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the loss, contiguous; zero for a parameter that it does not depend on."""
    run_backward = torch.autograd.Variable._execution_engine.run_backward
    gradients = run_backward(
        (loss,), (torch.ones_like(loss),), False, False, tuple(parameters), True, accumulate_grad=False
    )
    return [
        torch.zeros_like(parameter) if gradient is None else gradient.contiguous()
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def autograd_gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The same as engine_gradients, in public terms."""
    return [gradient.contiguous() for gradient in torch.autograd.grad(loss, parameters, materialize_grads=True)]


def fused_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    velocities: list[Tensor],
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of SGD in place. Velocities start at zero; there are none without momentum.

    Gradients must be contiguous: the kernel reads their memory in order, whatever their strides.
    """
    torch._fused_sgd_(
        parameters,
        gradients,
        velocities,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=learning_rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
    )


def foreach_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    velocities: list[Tensor],
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> None:
    """The same as fused_step, in plain terms."""
    if weight_decay > 0:
        gradients = list(torch._foreach_add(gradients, parameters, alpha=weight_decay))
    if momentum > 0:
        torch._foreach_mul_(velocities, momentum)
        torch._foreach_add_(velocities, gradients)
        gradients = velocities
    torch._foreach_add_(parameters, gradients, alpha=-learning_rate)


def works(private: Callable[[], Tensor], expected: float) -> bool:
    """Whether this torch has the private function, and it does what we think."""
    try:
        return private().item() == expected
    except (AttributeError, RuntimeError, TypeError):
        return False


def _try_engine() -> Tensor:
    weight = torch.tensor(3.0, requires_grad=True)
    return engine_gradients(weight * weight, [weight])[0]


def _try_fused() -> Tensor:
    weight, gradient, velocity = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
    fused_step([weight], [gradient], [velocity], learning_rate=0.5, momentum=0.25, weight_decay=1.0)
    return weight


loss_gradients = engine_gradients if works(_try_engine, 2 * 3.0) else autograd_gradients
sgd_step = fused_step if works(_try_fused, 1.0 - 0.5 * (0.25 * 4.0 + (2.0 + 1.0 * 1.0))) else foreach_step

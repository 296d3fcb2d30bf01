"""SGD's step on one weight tensor of a client's model at a time; its source is `fedtune_clients.local_sgd`'s."""

import torch
from torch import Tensor

from fedtune.flat_model import FlatModel
from fedtune.tuning.space import Number


class Descent:
    """v <- momentum v + gradient + decay w - attraction, w <- w - learning_rate v, for one weight tensor at a time.

    `decay` is weight_decay + proximal_mu and the attraction proximal_mu w0, since the gradient of the proximal term is
    proximal_mu (w - w0); w0 is what the model holds now. The steps change the model's weights in place.
    """

    def __init__(self, model: FlatModel, config: dict[str, Number]) -> None:
        mu, momentum, rate = config["proximal_mu"], config["momentum"], config["learning_rate"]
        self._decay = config["weight_decay"] + mu
        self._rate = rate
        self._weights = model.slices(model.flat)
        self._attractions = model.slices(mu * model.flat) if mu > 0 else None
        self._velocities = [torch.zeros_like(weight) for weight in self._weights] if momentum > 0 else None
        # Without momentum the gradient goes straight to the weight.
        self._targets = self._velocities or self._weights
        self._keep, self._scale = (momentum, 1.0) if self._velocities else (1 - rate * self._decay, -rate)

    def step(self, index: int, gradient: Tensor) -> None:
        """Steps the weight of that number along its gradient."""
        target = self._targets[index]
        if self._keep != 1:
            target.mul_(self._keep)
        target.add_(gradient, alpha=self._scale)
        self._finish(index)

    def step_along_product(self, index: int, left: Tensor, right: Tensor) -> None:
        """`step` along the matrix product of the two, as one operation."""
        self._targets[index].addmm_(left, right, beta=self._keep, alpha=self._scale)
        self._finish(index)

    def _finish(self, index: int) -> None:
        if self._velocities:
            velocity, weight = self._velocities[index], self._weights[index]
            if self._decay:
                velocity.add_(weight, alpha=self._decay)
            if self._attractions:
                velocity.sub_(self._attractions[index])
            weight.sub_(velocity, alpha=self._rate)
        elif self._attractions:
            self._weights[index].add_(self._attractions[index], alpha=self._rate)

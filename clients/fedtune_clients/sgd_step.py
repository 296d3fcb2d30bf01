"""The step of SGD, on one weight tensor of a client's model at a time. `fedtune_clients.local_sgd` names the papers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtune.client import Number


class SGDStep:
    """v <- momentum v + gradient + decay w - attraction, w <- w - learning_rate v, for one weight tensor at a time.

    `decay` is weight_decay + proximal_mu and the attraction proximal_mu w0, since the gradient of the proximal term is
    proximal_mu (w - w0). w0 is what `weights` hold when this is made; the steps then change `weights` in place.
    """

    def __init__(self, weights: Sequence[Tensor], config: dict[str, Number]) -> None:
        mu, momentum, rate = config["proximal_mu"], config["momentum"], config["learning_rate"]
        self.weights = weights
        self._decay = config["weight_decay"] + mu
        self._rate = rate
        self._attractions = [mu * weight for weight in weights] if mu > 0 else None
        self._velocities = [torch.zeros_like(weight) for weight in weights] if momentum > 0 else None
        # Without momentum the gradient goes straight to the weight.
        self._targets = self._velocities or weights
        self._retained, self._scale = (momentum, 1.0) if self._velocities else (1 - rate * self._decay, -rate)

    def along(self, number: int, gradient: Tensor) -> None:
        """Steps the weight tensor of that number along its gradient."""
        target = self._targets[number]
        if self._retained != 1:
            target.mul_(self._retained)
        target.add_(gradient, alpha=self._scale)
        self._finish(number)

    def along_product(self, number: int, left: Tensor, right: Tensor) -> None:
        """Like `along` with left @ right as the gradient, in one operation. `right` is a matrix or a vector."""
        target = self._targets[number]
        add_product = target.addmm_ if right.ndim > 1 else target.addmv_
        add_product(left, right, beta=self._retained, alpha=self._scale)
        self._finish(number)

    def _finish(self, number: int) -> None:
        if self._velocities:
            velocity, weight = self._velocities[number], self.weights[number]
            if self._decay:
                velocity.add_(weight, alpha=self._decay)
            if self._attractions:
                velocity.sub_(self._attractions[number])
            weight.sub_(velocity, alpha=self._rate)
        elif self._attractions:
            self.weights[number].add_(self._attractions[number], alpha=self._rate)

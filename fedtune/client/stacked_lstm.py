"""The LSTM layer that many clients go through at once, each client with weights of its own.

A step of an LSTM is a few small operations, and a sequence has many steps. So backpropagation through the steps is
written out. What does not depend on the step before is computed for all steps at once: the products with the inputs,
the derivatives of the gates, and the gradients of the weights.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def stacked_lstm(
    layer: nn.LSTM, weights: Mapping[str, Float[Tensor, "client ..."]], x: Float[Tensor, "row step input"]
) -> tuple[Float[Tensor, "row step hidden"], None]:
    """The outputs of nn.LSTM of one layer with `batch_first`; its last states are left out.

    The steps are in float32 also under autocast.
    """
    by_inputs, by_hidden = weights["weight_ih_l0"], weights["weight_hh_l0"]
    num_clients, num_steps = len(by_inputs), x.size(1)
    # The part of the gates that comes from the inputs, of all steps.
    steps_first = x.reshape(num_clients, -1, *x.shape[1:]).transpose(1, 2)  # (client, step, example, input)
    gates = torch.bmm(steps_first.flatten(1, 2), by_inputs.transpose(1, 2)).float()
    if layer.bias:
        gates = gates + (weights["bias_ih_l0"] + weights["bias_hh_l0"])[:, None]
    gates = gates.reshape(num_clients, num_steps, -1, gates.size(2)).transpose(0, 1)  # (step, client, example, gate)
    hidden: Tensor = _Steps.apply(gates.contiguous(), by_hidden)  # type: ignore[no-untyped-call]
    return hidden.permute(1, 2, 0, 3).flatten(0, 1), None


class _Steps(torch.autograd.Function):
    """The hidden states of all steps.

    In torch's order the four gates are i, f, g and o. The cell is c = f c' + i g, the hidden state h = o tanh(c), where
    c' is the cell of the step before.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Float[Tensor, "step client example gate"], weight: Float[Tensor, "client gate hidden"]
    ) -> Float[Tensor, "step client example hidden"]:
        size = weight.size(2)
        gates = inputs.clone()
        sigmoids, tanhs, _ = torch.split(gates, [2 * size, size, size], -1)
        i, f, g, o = torch.split(gates, size, -1)  # (step, client, example, hidden) each
        cells, outs, hidden = (torch.empty(i.shape, device=i.device) for _ in range(3))
        for step in range(len(gates)):
            if step > 0:
                gates[step].baddbmm_(hidden[step - 1], weight.transpose(1, 2))
            sigmoids[step].sigmoid_()
            tanhs[step].tanh_()
            o[step].sigmoid_()
            torch.mul(i[step], g[step], out=cells[step])
            if step > 0:
                cells[step].addcmul_(f[step], cells[step - 1])
            torch.tanh(cells[step], out=outs[step])
            torch.mul(o[step], outs[step], out=hidden[step])
        ctx.save_for_backward(weight, gates, cells, outs, hidden)
        return hidden

    @staticmethod
    def backward(ctx: Any, by_hidden: Float[Tensor, "step client example hidden"]) -> tuple[Tensor, Tensor]:
        weight, gates, cells, outs, hidden = ctx.saved_tensors
        i, f, g, o = torch.split(gates, weight.size(2), -1)  # (step, client, example, hidden) each
        before = torch.cat([torch.zeros_like(cells[:1]), cells[:-1]])  # c'
        # The derivatives of c by the inputs of i, f and g, and of h by the input of o and by c.
        slopes = torch.stack([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g)], -2)
        slope_o = outs * o * (1 - o)
        slope_c = o * (1 - outs * outs)

        by_hidden = by_hidden.clone(memory_format=torch.contiguous_format)
        by_gates = torch.empty_like(gates)
        apart = by_gates.view(*cells.shape[:-1], 4, -1)  # (step, client, example, gate, hidden)
        by_cell = torch.zeros_like(cells[0])  # through the next step
        for step in reversed(range(len(gates))):
            by_h = by_hidden[step]
            if step + 1 < len(gates):
                by_h.baddbmm_(by_gates[step + 1], weight)
            by_cell.addcmul_(by_h, slope_c[step])
            torch.mul(by_cell.unsqueeze(-2), slopes[step], out=apart[step, ..., :3, :])
            torch.mul(by_h, slope_o[step], out=apart[step, ..., 3, :])
            by_cell.mul_(f[step])

        # The gradient of the weight sums over the examples and over the steps, of which the first has no state before.
        columns = by_gates[1:].permute(1, 3, 0, 2).flatten(2)  # (client, gate, step · example)
        rows = hidden[:-1].transpose(0, 1).flatten(1, 2)  # (client, step · example, hidden)
        with torch.autocast(weight.device.type, enabled=False):
            by_weight = torch.bmm(columns, rows)
        return by_gates, by_weight

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

`client_update` is the algorithm in its readable form: it defines what local SGD means. Runs use faster forms: `train`
(in `fedtune_clients.fast_sgd`), in a compiled kernel (`fedtune_clients.compiled`) or in torch, and `train_batched` (in
`fedtune_clients.batched_sgd`). Tests check that the weights of `train` and of `client_update` are equal within 1e-5 of
the way that training goes: the fast forms add and multiply the same numbers in another order. The bits are equal under
three conditions:
- `train` trains in torch;
- it leaves all of backpropagation to autograd, as it does under autocast;
- there is neither weight decay nor a proximal term.
On a GPU the two forms may draw different numbers for dropout.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedtune.client import Config, Examples, FlatModel, StoredExamples
from fedtune_clients.batched_sgd import train_batched
from fedtune_clients.compiled import compile_model
from fedtune_clients.fast_sgd import prepare, train
from fedtune_clients.hyperparameters import HYPERPARAMETERS, SPACE, complete

__all__ = ["HYPERPARAMETERS", "SPACE", "client_update", "compile_model", "train", "train_batched"]


def client_update(
    model: FlatModel,
    weights: Float[Tensor, "weight"],
    examples: Examples | StoredExamples,
    config: Config,
    rng: np.random.Generator,
) -> Float[Tensor, "weight"]:
    """The weights after local SGD from `weights` on `examples`: `model.flat`, valid until the model is next used."""
    values = complete(config)
    prepare(model.module, values["dropout"], seed=int(rng.integers(2**63)))
    model.load(weights)
    sent = [parameter.detach().clone() for parameter in model.parameters]  # w0
    sgd = torch.optim.SGD(
        model.parameters,
        lr=values["learning_rate"],
        momentum=values["momentum"],
        weight_decay=values["weight_decay"],
    )
    for _ in range(int(values["epochs"])):  # 1
        order = torch.from_numpy(rng.permutation(examples.num_examples))
        batches = torch.split(order, int(values["batch_size"]))  # 2
        for batch in batches:  # 3
            x, y = examples.take(batch)
            distance = sum((w - w0).square().sum() for w, w0 in zip(model.parameters, sent, strict=True))
            loss = model.loss(model.module(x), y) + values["proximal_mu"] / 2 * distance
            sgd.zero_grad()
            torch.autograd.backward(loss)
            sgd.step()  # 4
    return model.flat  # 5

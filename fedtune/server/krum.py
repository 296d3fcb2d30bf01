"""Krum and Multi-Krum: the updates that lie closest to their neighbours, by Euclidean distance.

Source: Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, 2017, section 4. For
vectors V_1 ... V_n of which f may be arbitrary, with 2 f + 2 < n (the lines are numbered here, not in the source):

    1  i -> j means that V_j belongs to the n - f - 2 closest vectors to V_i, with i != j
    2  s(i) = sum of ||V_i - V_j||^2 over i -> j, the score of worker i
    3  Krum: the vector with the smallest score; of equal scores the one with the smallest identifier
    4  Multi-Krum: the mean of the m vectors with the smallest scores

Symbols: V_i -> a row of `rows`, f -> `num_byzantine`, m -> `num_selected`, s -> `score`. Departures: V_i is a client's
clipped weights after local training, in the source a gradient; distances are the same, since all clients start from the
same weights. As in the source every client counts the same, whatever number of training examples it reports. The
source leaves m open; here it is n - f - 2, the default of the library calicarpa/krum.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from fedtune.server.rows import mean_of_rows, rows_of_chunks


def krum(
    weights: Float[Tensor, "weight"],
    updates: Sequence[Float[Tensor, "weight"]],
    scale: Float[np.ndarray, "client"],
    num_byzantine: int,
) -> Float[Tensor, "weight"]:
    """The clipped weights of the client with the smallest score."""
    chosen = select(_square_distances(weights, updates, scale), num_byzantine, 1)  # 3
    return _mean(weights, [updates[client] for client in chosen], scale[chosen])


def multi_krum(
    weights: Float[Tensor, "weight"],
    updates: Sequence[Float[Tensor, "weight"]],
    scale: Float[np.ndarray, "client"],
    num_byzantine: int,
) -> Float[Tensor, "weight"]:
    """The mean of the clipped weights of the n - f - 2 clients with the smallest scores."""
    num_selected = len(updates) - num_byzantine - 2
    chosen = select(_square_distances(weights, updates, scale), num_byzantine, num_selected)
    return _mean(weights, [updates[client] for client in chosen], scale[chosen])  # 4


def select(
    square_distances: Float[np.ndarray, "client client"], num_byzantine: int, num_selected: int
) -> Int[np.ndarray, "selected"]:
    """The clients with the smallest scores, ascending by client."""
    num_clients = len(square_distances)
    others = square_distances + np.diag(np.full(num_clients, np.inf))
    closest = np.sort(others, axis=1)[:, : num_clients - num_byzantine - 2]  # 1
    score = closest.sum(axis=1)  # 2
    return np.sort(np.argsort(score, kind="stable")[:num_selected])


def _square_distances(
    weights: Float[Tensor, "weight"], updates: Sequence[Float[Tensor, "weight"]], scale: Float[np.ndarray, "client"]
) -> Float[np.ndarray, "client client"]:
    """The squared distances between all clients, as ||a||^2 + ||b||^2 - 2 a b: four times as fast as differences."""
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for chunk, rows in rows_of_chunks(weights, updates, scale):
        changes = rows.double() - weights[chunk]  # so that little is lost when products cancel
        products += changes @ changes.T
    square_norms = products.diagonal()
    distances: np.ndarray = (square_norms[:, None] + square_norms - 2 * products).clamp(min=0.0).numpy()
    return distances


def _mean(
    weights: Float[Tensor, "weight"], updates: Sequence[Float[Tensor, "weight"]], scale: Float[np.ndarray, "client"]
) -> Float[Tensor, "weight"]:
    """The mean of the clients' clipped weights, in which every client counts the same."""
    mean = torch.empty_like(weights)
    for chunk, rows in rows_of_chunks(weights, updates, scale):
        mean[chunk] = mean_of_rows(rows)
    return mean

"""The coordinate-wise median and trimmed mean against definitions 1 and 2 of Yin et al. (2018), read literally."""

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
from hypothesis import given
from hypothesis import strategies as st

from fedtune.server import coordinatewise, rows

EXACT = {"rtol": 1e-7, "atol": 0.0}  # the mean of two numbers, rounded to float32


def literal_median(vectors):
    """Definition 1: coordinate k is the usual median of the k-th coordinates."""
    found = []
    for column in vectors.T.tolist():
        ordered = sorted(column)
        middle, odd = divmod(len(ordered), 2)
        found.append(ordered[middle] if odd else (ordered[middle - 1] + ordered[middle]) / 2)
    return np.array(found)


def literal_trimmed_mean(vectors, num_trimmed):
    """Definition 2: coordinate k is the mean of U_k, without the num_trimmed largest and smallest elements."""
    found = []
    for column in vectors.T.tolist():
        kept = list(column)
        for _ in range(num_trimmed):
            kept.remove(max(kept))
            kept.remove(min(kept))
        found.append(sum(kept) / len(kept))
    return np.array(found)


@st.composite
def cohorts(draw):
    """Updates in float32, many of them equal, as a matrix of (client, weight)."""
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    numbers = st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-100, 100, width=32).map(lambda x: round(x, 3)))
    values = draw(st.lists(numbers, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(values, np.float32).reshape(shape)


def as_arguments(vectors):
    updates = [torch.from_numpy(vector) for vector in vectors]
    return torch.zeros(vectors.shape[1]), updates, np.ones(len(vectors))


@given(cohorts())
def test_the_median_is_definition_1(vectors):
    found = coordinatewise.median(*as_arguments(vectors)).numpy()
    np.testing.assert_allclose(found, literal_median(vectors), **EXACT)


@given(cohorts(), st.integers(0, 4))
def test_the_trimmed_mean_is_definition_2(vectors, num_trimmed):
    num_trimmed = min(num_trimmed, (len(vectors) - 1) // 2)
    found = coordinatewise.trimmed_mean(*as_arguments(vectors), num_trimmed).numpy()
    np.testing.assert_allclose(found, literal_trimmed_mean(vectors, num_trimmed), rtol=1e-6, atol=1e-5)


def test_flowers_trimmed_mean_and_numpys_median_agree():
    vectors = np.random.default_rng(0).normal(size=(20, 300)).astype(np.float32)
    found = coordinatewise.trimmed_mean(*as_arguments(vectors), 6).numpy()
    np.testing.assert_allclose(found, trim_mean(vectors.astype(np.float64), 0.3), rtol=1e-6, atol=1e-8)
    assert np.array_equal(coordinatewise.median(*as_arguments(vectors[1:])).numpy(), np.median(vectors[1:], axis=0))


@pytest.mark.parametrize("numbers", [1, 7, 64, 10**6])
def test_the_size_of_the_chunks_changes_no_bit(numbers, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(7, 101)).astype(np.float32)
    weights, updates, scale = as_arguments(vectors)
    scale[3] = 0.1
    expected = [coordinatewise.median(weights, updates, scale), coordinatewise.trimmed_mean(weights, updates, scale, 2)]
    monkeypatch.setattr(rows, "CHUNK_NUMBERS", numbers)
    found = [coordinatewise.median(weights, updates, scale), coordinatewise.trimmed_mean(weights, updates, scale, 2)]
    assert all(map(torch.equal, found, expected))


def test_a_minority_of_arbitrary_updates_moves_a_coordinate_no_further_than_the_others_go():
    honest = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    vectors = np.concatenate([honest, np.full((4, 50), 1e30, np.float32)])
    for found in (
        coordinatewise.median(*as_arguments(vectors)).numpy(),
        coordinatewise.trimmed_mean(*as_arguments(vectors), 4).numpy(),
    ):
        assert (found >= honest.min(axis=0)).all()
        assert (found <= honest.max(axis=0)).all()

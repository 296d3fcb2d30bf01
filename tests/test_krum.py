"""Krum and Multi-Krum against section 4 of Blanchard et al. (2017), read literally."""

import itertools

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum
from hypothesis import given
from hypothesis import strategies as st

from fedtune.server import krum, rows


def literal_scores(vectors, num_byzantine):
    """The score of each vector: the sum of its squared distances to its n - f - 2 closest vectors."""
    scores = []
    for i, vector in enumerate(vectors):
        distances = [float(((vector - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i]
        scores.append(sum(sorted(distances)[: len(vectors) - num_byzantine - 2]))
    return scores


def literal_order(vectors, num_byzantine):
    """The identifiers by score; of equal scores the smaller identifier comes first."""
    scores = literal_scores(vectors, num_byzantine)
    return sorted(range(len(vectors)), key=lambda identifier: (scores[identifier], identifier))


@st.composite
def cohorts(draw):
    """f, and n >= 2 f + 3 updates of small whole numbers: so every sum is exact, and ties are common."""
    num_byzantine = draw(st.integers(1, 3))
    num_clients = draw(st.integers(2 * num_byzantine + 3, 2 * num_byzantine + 6))
    num_weights = draw(st.integers(1, 4))
    values = draw(st.lists(st.integers(-9, 9), min_size=num_clients * num_weights, max_size=num_clients * num_weights))
    return num_byzantine, np.array(values, np.float64).reshape(num_clients, num_weights)


def as_arguments(vectors):
    updates = [torch.from_numpy(vector.astype(np.float32)) for vector in vectors]
    return torch.zeros(vectors.shape[1]), updates, np.ones(len(vectors))


@given(cohorts())
def test_krum_is_the_vector_with_the_smallest_score(cohort):
    num_byzantine, vectors = cohort
    found = krum.krum(*as_arguments(vectors), num_byzantine).numpy()
    assert np.array_equal(found, vectors[literal_order(vectors, num_byzantine)[0]])


@given(cohorts())
def test_multi_krum_is_the_mean_of_the_vectors_with_the_smallest_scores(cohort):
    num_byzantine, vectors = cohort
    chosen = literal_order(vectors, num_byzantine)[: len(vectors) - num_byzantine - 2]
    found = krum.multi_krum(*as_arguments(vectors), num_byzantine).numpy()
    np.testing.assert_allclose(found, vectors[chosen].mean(axis=0), rtol=1e-6, atol=1e-6)


def test_flower_selects_the_same_clients():
    vectors = np.random.default_rng(0).normal(size=(12, 40))
    vectors[[2, 5, 7]] += 3.0
    distances = ((vectors[:, None] - vectors[None]) ** 2).sum(axis=2)
    contents = [RecordDict({"arrays": ArrayRecord([vector])}) for vector in vectors]
    selected = select_multikrum(contents, num_malicious_nodes=3, num_nodes_to_select=7)
    expected = sorted(next(i for i, content in enumerate(contents) if content is found) for found in selected)
    assert krum.select(distances, 3, 7).tolist() == expected


def test_of_equal_scores_the_first_client_wins():
    weights, updates, scale = as_arguments(np.array([[5.0], [1.0], [-1.0], [1.0], [-1.0]]))
    assert krum.krum(weights, updates, scale, 1) == 1.0


@pytest.mark.parametrize("numbers", [1, 7, 64])
def test_the_size_of_the_chunks_does_not_change_the_choice(numbers, monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(9, 101))
    arguments = as_arguments(vectors)
    expected = krum.krum(*arguments, 3), krum.multi_krum(*arguments, 3)
    monkeypatch.setattr(rows, "CHUNK_NUMBERS", numbers)
    assert all(map(torch.equal, (krum.krum(*arguments, 3), krum.multi_krum(*arguments, 3)), expected))


def test_far_clients_are_never_chosen():
    honest = np.random.default_rng(0).normal(size=(6, 50))
    for far in itertools.combinations(range(9), 3):
        vectors = np.insert(honest, [place - index for index, place in enumerate(far)], 1e3, axis=0)
        assert np.abs(krum.krum(*as_arguments(vectors), 3).numpy()).max() < 10
        assert np.abs(krum.multi_krum(*as_arguments(vectors), 3).numpy()).max() < 10


def test_distances_of_huge_updates_do_not_overflow():
    vectors = np.full((5, 3), 1.0)
    vectors[0], vectors[1] = 3e38, -3e38
    assert np.array_equal(krum.multi_krum(*as_arguments(vectors), 1).numpy(), np.ones(3, np.float32))

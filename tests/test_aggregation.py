"""What every aggregation shares: the guard before it, and what happens with too few usable updates."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedtune.layers import resolve_settings
from fedtune.runs.prepare import prepare
from fedtune.runs.run_folder import claim_folder
from fedtune.server.aggregation import aggregate
from fedtune.settings import ServerSettings

W = torch.arange(40.0) / 8
ROBUST = [
    ServerSettings(aggregation="median"),
    ServerSettings(aggregation="trimmed_mean", trim=0.2),
    ServerSettings(aggregation="krum", byzantine=1),
    ServerSettings(aggregation="multi_krum", byzantine=1),
]
ALL = [ServerSettings(), *ROBUST]
NEEDS = {"mean": 1, "median": 3, "trimmed_mean": 5, "krum": 5, "multi_krum": 5}
SIZES = (2.0, 5.0, 9.0, 30.0, 100.0, 1e4)
by_name = pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.aggregation)
robust = pytest.mark.parametrize("settings", ROBUST, ids=lambda settings: settings.aggregation)


def make_updates(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [W + torch.randn(40, generator=generator) for _ in range(count)]


def ones(updates):
    return np.ones(len(updates), int)


@by_name
def test_with_fewer_usable_updates_than_it_needs_all_are_rejected(settings):
    needed = NEEDS[settings.aggregation]
    assert settings.fewest_updates == needed
    updates = make_updates(needed)
    assert aggregate(W, updates, ones(updates), settings).weights is not None
    updates[0] = torch.full_like(W, float("nan"))
    result = aggregate(W, updates, ones(updates), settings)
    assert result.weights is None
    assert result.rejected.all()
    assert not result.clipped.any()


@by_name
@pytest.mark.parametrize("bad", ["not finite", "no examples"])
def test_a_rejected_update_does_not_count(settings, bad):
    updates = make_updates(7)
    expected = aggregate(W, updates, ones(updates), settings)
    sent, num_train = [*updates[:2], W + 1e3, *updates[2:]], np.array([1, 1, 1, 1, 1, 1, 1, 1])
    if bad == "not finite":
        sent[2] = sent[2] * float("inf")
    else:
        num_train[2] = 0
    result = aggregate(W, sent, num_train, settings)
    assert result.rejected.tolist() == [index == 2 for index in range(8)]
    torch.testing.assert_close(result.weights, expected.weights)


@by_name
@pytest.mark.parametrize("size", [1e3, 1e30, 1e37])
def test_an_exploded_update_counts_with_its_clipped_weights(settings, size):
    updates = [W + 2 * torch.eye(40)[index] for index in range(6)]  # each moves by 2
    direction = torch.eye(40)[1] + torch.eye(40)[2]
    result = aggregate(W, [*updates, W + size * direction], np.ones(7, int), settings)
    assert result.clipped.tolist() == [False] * 6 + [True]
    clipped = W + 6 * direction / direction.norm()  # three times the median of 2
    expected = aggregate(W, [*updates, clipped], np.ones(7, int), settings.model_copy(update={"clip_factor": 0.0}))
    torch.testing.assert_close(result.weights, expected.weights)


@robust
def test_clipping_and_rejection_go_together(settings):
    """Six of nine updates explode and the first one is rejected, so each robust aggregation uses clipped weights."""
    base = make_updates(9)
    sent = [
        torch.full_like(W, float("nan")),
        *base[:3],
        *(W + size * (update - W) for size, update in zip(SIZES, base[3:], strict=True)),
    ]
    tight = settings.model_copy(update={"clip_factor": 0.5})
    norms = [float((update - W).norm()) for update in sent[1:]]
    bound = 0.5 * float(np.median(norms))
    clipped = [W + min(1.0, bound / norm) * (update - W) for norm, update in zip(norms, sent[1:], strict=True)]
    expected = aggregate(W, clipped, ones(clipped), settings.model_copy(update={"clip_factor": 0.0}))
    torch.testing.assert_close(aggregate(W, sent, ones(sent), tight).weights, expected.weights)


@robust
def test_every_client_counts_the_same_whatever_number_of_examples_it_reports(settings):
    updates = make_updates(7)
    expected = aggregate(W, updates, ones(updates), settings).weights
    assert torch.equal(aggregate(W, updates, np.array([1, 9 * 10**18, 2, 3, 1, 1, 50]), settings).weights, expected)


@robust
def test_one_arbitrary_update_moves_the_weights_no_further_than_the_others_go(settings):
    updates = make_updates(9)
    low, high = torch.stack(updates).amin(dim=0), torch.stack(updates).amax(dim=0)
    for attack in (1e3, -1e3, 1e30):
        attacked = [*updates[:4], W + attack, *updates[4:]]
        found = aggregate(W, attacked, ones(attacked), settings.model_copy(update={"clip_factor": 0.0})).weights
        assert (low <= found).all()
        assert (found <= high).all()
    mean = aggregate(W, [*updates, W + 1e3], np.ones(10, int), ServerSettings(clip_factor=0.0)).weights
    assert (mean > high).all()


@by_name
def test_updates_and_weights_are_left_alone(settings):
    updates, weights = [*make_updates(7), W + 1e3], W.clone()
    before = [update.clone() for update in updates]
    result = aggregate(weights, updates, ones(updates), settings).weights
    result += 1.0
    assert torch.equal(weights, W)
    assert all(map(torch.equal, updates, before))


@given(st.integers(1, 500), st.integers(1, 499))
@example(100, 290)  # 0.29 * 100 is a little less than 29
def test_the_trimmed_share_is_rounded_down_in_decimals(num_updates, thousandths):
    settings = ServerSettings(aggregation="trimmed_mean", trim=thousandths / 1000)
    assert settings.num_trimmed(num_updates) == num_updates * thousandths // 1000
    assert settings.num_trimmed(settings.fewest_updates) == 1
    assert settings.num_trimmed(settings.fewest_updates - 1) == 0


@pytest.mark.slow
def test_a_run_with_a_robust_aggregation_has_the_same_bits_in_every_executor(tmp_path):
    found = {}
    for aggregation in ("mean", "median", "trimmed_mean", "multi_krum"):
        for executor in ("serial", "pool"):
            folder = tmp_path / f"{aggregation}-{executor}"
            settings = resolve_settings(
                "digits",
                {
                    "tuners": ["manual"],
                    "max_rounds": 3,
                    "total_rounds": 3,
                    "cohort_size": 6,
                    "executor": executor,
                    "workers": 2,
                    "server": {"aggregation": aggregation, "trim": 0.2},
                },
            )
            prepared = prepare(settings)
            claim_folder(folder, prepared.settings, force=False)
            prepared.run(folder, lambda event: None)
            found[aggregation, executor] = (folder / "rounds.parquet").read_bytes()
        assert found[aggregation, "serial"] == found[aggregation, "pool"]
    assert len(set(found.values())) == 4  # so each aggregation was in effect

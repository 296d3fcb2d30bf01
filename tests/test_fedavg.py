import numpy as np
import torch

from fedtune.server.aggregation import aggregate
from fedtune.settings import ServerSettings

W = torch.tensor([1.0, 2.0])


def average(weights, updates, num_train, clip_factor):
    """Federated averaging with its guard, as a round does it."""
    return aggregate(weights, updates, num_train, ServerSettings(clip_factor=clip_factor))


def updates(*changes):
    return [W + torch.tensor(change) for change in changes]


def test_the_mean_is_weighted_by_training_examples():
    result = average(W, updates([1.0, 0.0], [0.0, 4.0]), np.array([3, 1]), clip_factor=0.0)
    torch.testing.assert_close(result.weights, W + torch.tensor([3 * 1.0 / 4, 4.0 / 4]))
    assert not result.rejected.any()
    assert not result.clipped.any()


def test_counts_whose_sum_is_too_large_for_a_whole_number_are_halves():
    result = average(W, updates([1.0, 0.0], [0.0, 4.0]), np.array([9 * 10**18, 9 * 10**18]), clip_factor=0.0)
    torch.testing.assert_close(result.weights, W + torch.tensor([1.0 / 2, 4.0 / 2]))


def test_a_client_that_is_not_finite_is_dropped_and_the_rest_renormalised():
    for bad in (float("nan"), float("inf")):
        result = average(W, updates([1.0, 0.0], [bad, 0.0], [0.0, 1.0]), np.array([1, 100, 1]), clip_factor=3.0)
        torch.testing.assert_close(result.weights, W + torch.tensor([0.5, 0.5]))
        assert result.rejected.tolist() == [False, True, False]


def test_an_exploded_update_is_clipped_to_the_median_norm_times_the_factor():
    for size in (1e3, 1e30):  # the square of the latter overflows single precision
        result = average(W, updates([1.0, 0.0], [0.0, 1.0], [size, 0.0]), np.array([1, 1, 2]), clip_factor=3.0)
        torch.testing.assert_close(result.weights, W + torch.tensor([1.0 + 2 * 3.0, 1.0]) / 4)
        assert result.clipped.tolist() == [False, False, True]
        assert not result.rejected.any()


def test_factor_zero_turns_clipping_off():
    result = average(W, updates([1.0, 0.0], [0.0, 1.0], [1e3, 0.0]), np.array([1, 1, 1]), clip_factor=0.0)
    torch.testing.assert_close(result.weights, W + torch.tensor([1001.0, 1.0]) / 3)


def test_clipping_that_does_not_act_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, generator=generator)
    ups = [weights + torch.randn(1000, generator=generator) for _ in range(5)]
    sizes = np.array([3, 1, 4, 1, 5])
    assert torch.equal(average(weights, ups, sizes, 3.0).weights, average(weights, ups, sizes, 0.0).weights)


def test_the_mean_has_the_bits_of_a_plain_loop_over_the_clients():
    """So results do not change with the version of fedtune: the sum is in single precision, in client order."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(1000, generator=generator)
    ups = [weights + size * torch.randn(1000, generator=generator) for size in (1.0, 1.0, 99.0, 1.0, float("nan"))]
    norm = [float(torch.dot(up - weights, up - weights)) ** 0.5 for up in ups]
    scale = 3 * np.median(norm[:4]) / norm[2]
    mean = torch.zeros(1000)
    for up, share in zip(ups, (0.3, 0.1, 0.4 * scale, 0.2), strict=False):
        mean.add_(up, alpha=share)
    mean.add_(weights, alpha=0.4 * (1 - scale))
    assert torch.equal(average(weights, ups, np.array([3, 1, 4, 2, 5]), 3.0).weights, mean)


def test_nobody_usable():
    for ups, sizes in ((updates([float("nan"), 0.0]), [1]), (updates([1.0, 0.0]), [0]), ([], [])):
        assert average(W, ups, np.array(sizes, int), 3.0).weights is None


def test_all_updates_zero():
    result = average(W, updates([0.0, 0.0], [0.0, 0.0]), np.array([1, 1]), clip_factor=3.0)
    assert torch.equal(result.weights, W)
    assert not result.clipped.any()


def test_one_update_that_moves_among_ones_that_stand_still_is_not_clipped_to_nothing():
    result = average(W, updates([0.0, 0.0], [0.0, 0.0], [1.0, 0.0]), np.array([1, 1, 1]), clip_factor=3.0)
    torch.testing.assert_close(result.weights, W + torch.tensor([1.0, 0.0]) / 3)

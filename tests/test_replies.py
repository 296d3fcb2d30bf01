import math

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord
from forged_replies import FORGED, GOOD, Sent, fill, good, outsider, pickles, with_error, with_metadata, with_metrics
from test_strategy import answer, configure, make_dataset, make_grid, make_strategy, unit

from fedtune.client.flat_model import FlatModel
from fedtune.errors import InputError
from fedtune.server.flower_compat import pack, stamp
from fedtune.server.replies import training_ranges, update_in
from fedtune_clients.models import logistic

FORGER = 1  # the position in the cohort of the client whose replies are forged


@pytest.fixture(scope="module")
def grid():
    return make_grid(make_dataset())


@pytest.fixture(scope="module")
def initial():
    torch.manual_seed(0)
    return FlatModel(logistic(make_dataset().spec)).flat.clone()


def stamped(messages):
    """The messages with ids, as a grid gives them."""
    for index, message in enumerate(messages):
        stamp(message, f"message {index}")
    return messages


def round_with(grid, initial, forgeries, **settings):
    """A round with replies that are forged, by position in the cohort: its bits, the outcome, the reasons."""
    strategy = make_strategy(settings={"optimizer": "adam", **settings}, baseline="client")
    messages = stamped(configure(strategy, grid, initial))
    replies = []
    for index, message in enumerate(messages):
        weights = unit(index, initial)
        others = [other for other in messages if other is not message]
        if index in forgeries:
            replies += forgeries[index](Sent(message, others, weights.numpy()))
        else:
            replies.append(answer(message, index, weights, error_before=0.5, loss_before=0.5))
    arrays, _ = strategy.aggregate_train(1, replies)
    held = {"weights": arrays["weights"].numpy(), **strategy.to_arrays()}
    bits = {name: (str(array.dtype), array.tobytes()) for name, array in held.items()}
    return bits, repr(strategy.outcome._replace(failures=[])), strategy.outcome.failures


def silent(sent):
    return []


def test_a_good_reply_counts(grid, initial):
    lost = round_with(grid, initial, {FORGER: silent})
    bits, outcome, failures = round_with(grid, initial, {FORGER: lambda sent: [good(sent)]})
    assert failures == []
    assert "failed=0" in outcome
    assert bits["weights"] != lost[0]["weights"]
    assert bits["policy.log_theta"] != lost[0]["policy.log_theta"]


def test_there_are_more_than_a_hundred_forgeries():
    assert len(FORGED) > 100


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_reply_is_a_lost_client_and_changes_nothing_else(name, grid, initial):
    bits, outcome, failures = round_with(grid, initial, {FORGER: silent})
    assert "failed=1" in outcome
    assert failures == []
    forged = round_with(grid, initial, {FORGER: FORGED[name]})
    assert forged[:2] == (bits, outcome)
    assert forged[2]
    assert all(isinstance(reason, str) and 0 < len(reason) <= 1000 for reason in forged[2])


@pytest.mark.parametrize("name", ["error_before", "loss_before"])
@pytest.mark.parametrize("value", [..., "0.5", True, [0.5], -1e308, -1, -math.inf, 1e39])
def test_a_value_before_training_is_checked_if_it_was_asked_for(name, value, grid, initial):
    lost = round_with(grid, initial, {FORGER: silent})
    assert round_with(grid, initial, {FORGER: with_metrics(**{name: value})})[:2] == lost[:2]


def test_two_forgers_do_not_add_up(grid, initial):
    """Two counts of 9e18 overflow a sum of 64 bits, which made all shares 0."""
    forgers = (0, FORGER)
    lost = round_with(grid, initial, dict.fromkeys(forgers, silent))
    forgery = with_metrics(num_train=9 * 10**18, num_validation=9 * 10**18)
    assert round_with(grid, initial, dict.fromkeys(forgers, forgery))[:2] == lost[:2]


@pytest.mark.parametrize("name", ["num_train", "num_validation"])
def test_the_cap_is_a_setting(name, grid, initial):
    def failures(count):
        return round_with(grid, initial, {FORGER: with_metrics(**{name: count})}, max_examples=50)[2]

    assert failures(50) == []
    (reason,) = failures(51)
    low = {"num_train": 1, "num_validation": 0}[name]
    assert reason.startswith("the reply of node ")
    assert reason.endswith(f" is bad: {name} must be a whole number in {low}..50, got 51")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("error: -1e+308", "the reply of node {node} is bad: error must be a number in 0..1, got -1e+308"),
        (
            "num_train: text",
            "the reply of node {node} is bad: num_train must be a whole number in 1..1000000000, got str",
        ),
        ("no arrays", "the reply of node {node} is bad: it must hold the records 'arrays', 'metrics', got 'metrics'"),
        (
            "garbage",
            "the reply of node {node} is bad: the record 'arrays' must hold the float32 array 'weights' of shape "
            "(18,), got bytes that can't be read: ValueError",
        ),
        ("two replies", "node {node} must reply once, got 2 replies"),
        (
            "a reply to an unknown message",
            "node {node} must reply to the message that it was sent, got a reply to 'unknown'",
        ),
        ("an error", "the battery is empty"),
        ("an error without a reason", "failed and gave no reason"),
        ("an error with a strange code", "node {node}: no"),
    ],
)
def test_the_reason_names_the_node_and_what_is_wrong(name, said, grid, initial):
    nodes = []

    def forge(sent):
        nodes.append(sent.message.metadata.dst_node_id)
        return FORGED[name](sent)

    assert round_with(grid, initial, {FORGER: forge})[2] == [said.format(node=nodes[0])]


def test_pickles_are_never_loaded(tmp_path, grid, initial):
    folder = tmp_path / "made by a pickle"
    for forge in pickles(folder).values():
        assert len(round_with(grid, initial, {FORGER: forge})[2]) == 1
    assert not folder.exists()


# What a client of fedtune can report.


@pytest.mark.parametrize(
    ("objective", "metrics"),
    [
        ("classification", {"error": 0.0}),
        ("classification", {"error": 1}),
        ("classification", {"num_validation": 0}),
        ("classification", {"num_train": 10**9}),
        ("classification", {"loss": math.nan}),  # infinite logits
        ("classification", {"loss": math.inf}),
        ("next_token", {"error": math.nan, "loss": math.nan}),  # all positions of an example are ignored
        ("regression", {"error": 1e9, "loss": 1e9}),
        ("regression", {"error": math.inf, "loss": math.inf}),  # squares that overflow
        ("regression", {"error": math.nan, "error_before": math.nan, "loss_before": math.nan}),
    ],
)
def test_a_model_that_diverged_is_reported(objective, metrics, grid, initial):
    sent = Sent(configure(make_strategy(), grid, initial)[FORGER], [], initial.numpy())
    (reply,) = with_metrics(**metrics)(sent)
    update = update_in(reply, len(initial), training_ranges(objective, 10**9, error_before=True))
    assert repr(update.metrics) == repr({name: (GOOD | metrics)[name] for name in update.metrics})
    assert update.metrics.keys() == GOOD.keys()
    assert torch.equal(update.weights, initial)


@pytest.mark.parametrize("objective", ["classification", "next_token", "regression"])
@pytest.mark.parametrize("error", [-0.1, -math.inf, 1e39])
def test_no_objective_has_such_errors(objective, error, grid, initial):
    sent = Sent(configure(make_strategy(), grid, initial)[FORGER], [], initial.numpy())
    (reply,) = with_metrics(error=error)(sent)
    with pytest.raises(InputError, match=r"^error must be a number in 0\.\."):
        update_in(reply, len(initial), training_ranges(objective, 10**9, error_before=False))


def test_more_metrics_than_asked_for_do_not_matter(grid, initial):
    more = with_metrics(train_loss=0.1, epochs=[1, 2])
    expected = round_with(grid, initial, {FORGER: lambda sent: [good(sent)]})
    assert round_with(grid, initial, {FORGER: more}) == expected


# Evaluation.

EVALUATION = {
    "num_validation": 3,
    "validation_error": 0.25,
    "validation_loss": 0.5,
    "num_test": 4,
    "test_error": 0.75,
    "test_loss": 1.5,
}


def evaluated(**changed):
    metrics = {name: value for name, value in (EVALUATION | changed).items() if value is not ...}
    return lambda sent: [good(sent, arrays=None, metrics=fill(MetricRecord(), metrics))]


NOT_EVALUATED = {
    **{
        f"{name}: {value!r}": evaluated(**{name: value})
        for name in EVALUATION
        for value in (..., "0.5", True, [1], -1, 10**400, math.nan, math.inf, -math.inf)
    },
    **{f"{name}: 0": evaluated(**{name: 0}) for name in ("num_validation", "num_test")},
    **{f"{name}: 2": evaluated(**{name: 2}) for name in ("validation_error", "test_error")},
    **{f"{name}: 1e18": evaluated(**{name: 10**18}) for name in ("num_validation", "num_test")},
    "weights too": lambda sent: [good(sent, metrics=MetricRecord(EVALUATION))],
    "no metrics": lambda sent: [good(sent, arrays=None, metrics=None)],
    "another node": with_metadata(lambda sent: {"src_node_id": outsider(sent)}),
    "two replies": lambda sent: evaluated()(sent) * 2,
    "a reply and an error": lambda sent: [*evaluated()(sent), *with_error(1000, "no")(sent)],
    "an error": with_error(1000, "no"),
}


def evaluation_with(grid, initial, forge):
    strategy = make_strategy()
    messages = stamped(list(strategy.configure_evaluate(1, pack(initial.numpy()), ConfigRecord(), grid)))
    replies = []
    for index, message in enumerate(messages):
        others = [other for other in messages if other is not message]
        sent = Sent(message, others, initial.numpy())
        replies += forge(sent) if index == FORGER else evaluated(num_test=5 + index, test_error=index / 10)(sent)
    return dict(strategy.aggregate_evaluate(1, replies)), strategy.evaluation_failures


@pytest.mark.parametrize("name", NOT_EVALUATED)
def test_a_forged_evaluation_is_left_out(name, grid, initial):
    expected, _ = evaluation_with(grid, initial, silent)
    assert evaluation_with(grid, initial, evaluated())[0] != expected
    actual, failures = evaluation_with(grid, initial, NOT_EVALUATED[name])
    assert actual == expected
    assert failures


def test_an_evaluation_without_a_good_reply_is_none(grid, initial):
    strategy = make_strategy()
    messages = stamped(list(strategy.configure_evaluate(1, pack(initial.numpy()), ConfigRecord(), grid)))
    replies = [evaluated(num_test=0)(Sent(message, [], initial.numpy()))[0] for message in messages]
    assert strategy.aggregate_evaluate(1, replies) is None
    assert len(strategy.evaluation_failures) == len(messages)

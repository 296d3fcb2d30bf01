import itertools
import json
import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

from fedtune import rng
from fedtune.client.examples import StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.client.measure import measure_alone
from fedtune.client.work import generator
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.errors import InputError
from fedtune.executors.machine import MachineSettings
from fedtune.executors.serial import SerialExecutor
from fedtune.server import messages as protocol
from fedtune.server import optimizers
from fedtune.server.flower_compat import pack
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import ServerSettings
from fedtune.simulation.grid import FIRST_NODE_ID, ExecutorGrid
from fedtune.tuning import fedex
from fedtune.tuning.config_pool import make_pool
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune.tuning.policy import entropy
from fedtune.tuning.trial import Trial
from fedtune_clients import local_sgd
from fedtune_clients.models import logistic

SEED = 11
COHORT = 4
SERVER = {name: hyperparameter.default for name, hyperparameter in optimizers.HYPERPARAMETERS.items()}
CONFIG = {"learning_rate": 0.2, "momentum": 0.5, "batch_size": 8, "epochs": 2}
POOL = ((CONFIG, {**CONFIG, "learning_rate": 0.02}, {**CONFIG, "batch_size": 3}),)


def make_dataset():
    """Eight clients of different sizes, 3 classes, noisy labels so that errors lie between 0 and 1."""
    generator = np.random.default_rng(0)
    clients = {}
    for client, size in enumerate([30, 60, 45, 80, 35, 70, 55, 40]):
        x = generator.normal(size=(size, 5)).astype(np.float32)
        noisy = x[:, :3] + generator.normal(size=(size, 3))
        clients[f"c{client}"] = (x, noisy.argmax(1))
    return FederatedDataset.from_clients(clients, name="made up", num_classes=3)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset()


@pytest.fixture(scope="module")
def initial(dataset):
    torch.manual_seed(0)
    return FlatModel(logistic(dataset.spec)).flat.clone()


def make_grid(dataset):
    return ExecutorGrid(SerialExecutor(MachineSettings({"name": "logistic"}, "local_sgd", "cpu"), dataset), 8)


@pytest.fixture
def grid(dataset):
    return make_grid(dataset)


def make_strategy(pool=POOL, number=0, server=(), settings=(), cohort_size=COHORT, seed=SEED, **fedex_settings):
    return FedTuneStrategy(
        Trial(number, {**SERVER, **dict(server)}, pool),
        ServerSettings(**dict(settings)),
        FedExPolicy(pool, FedExSettings(**fedex_settings), num_classes=3),
        cohort_size=cohort_size,
        seed=seed,
    )


def train_rounds(strategy, grid, weights, num_rounds, first=1):
    """The weights after rounds driven by hand, and each round's metrics."""
    arrays, seen = pack(weights.numpy()), []
    for server_round in range(first, first + num_rounds):
        replies = grid.send_and_receive(strategy.configure_train(server_round, arrays, ConfigRecord(), grid))
        arrays, metrics = strategy.aggregate_train(server_round, replies)
        seen.append(dict(metrics))
    return torch.from_numpy(arrays["weights"].numpy()), seen


def configure(strategy, grid, weights, server_round=1):
    return list(strategy.configure_train(server_round, pack(weights.numpy()), ConfigRecord(), grid))


def cohort_of(server_round, seed=SEED, cohort_size=COHORT):
    chosen = rng.stream(seed, "cohort", server_round).choice(8, cohort_size, replace=False)
    return sorted(int(client) for client in chosen)


def client_seed(server_round, client, number=0):
    return rng.derived_seed(SEED, "client", number, server_round, client)


def clients(messages):
    return [message.metadata.dst_node_id - FIRST_NODE_ID for message in messages]


def configs(messages):
    """The hyperparameters in each message."""
    return [json.loads(message.content.config_records["config"]["hyperparameters"]) for message in messages]


def seeds(messages):
    return [message.content.config_records["config"]["seed"] for message in messages]


# One configuration is plain federated averaging.


def plain_fedavg(dataset, weights, config, num_rounds):
    """Algorithm 1 of McMahan et al. (2017) in a plain loop, one client after the other."""
    model = FlatModel(logistic(dataset.spec))
    for server_round in range(1, num_rounds + 1):
        trained, sizes = [], []
        for client in cohort_of(server_round):
            examples = StoredExamples(*dataset.examples(client, "train"), dataset.spec, "cpu").all()
            generator = np.random.Generator(np.random.PCG64(client_seed(server_round, client)))
            trained.append(local_sgd.train(model, weights, examples, config, generator).clone())
            sizes.append(len(examples.y))
        weights = torch.zeros_like(weights)
        for client_weights, size in zip(trained, sizes, strict=True):
            weights.add_(client_weights, alpha=size / sum(sizes))
    return weights


def test_a_pool_of_one_is_federated_averaging_to_the_bit(dataset, grid, initial):
    expected = plain_fedavg(dataset, initial, CONFIG, 4)
    manual, metrics = train_rounds(make_strategy(pool=((CONFIG,),)), grid, initial, 4)
    assert torch.equal(manual, expected)
    assert not any(seen["clipped"] or seen["dropped"] or seen["lost"] for seen in metrics)
    assert all(math.isnan(seen["entropy"]) for seen in metrics)


@pytest.mark.parametrize("form", ["flat", "product"])
def test_fedex_with_a_pool_of_one_is_federated_averaging_to_the_bit(dataset, grid, initial, form):
    settings = {"pool_size": 1, "form": form}
    pool = make_pool(FedExSettings(**settings), CONFIG, {}, rng.stream(SEED, "pool", 0))
    weights, _ = train_rounds(make_strategy(pool=pool, **settings), grid, initial, 4)
    assert torch.equal(weights, plain_fedavg(dataset, initial, CONFIG, 4))


# The draws, and what they move.


def test_two_rounds_by_hand(dataset, grid, initial):
    strategy, settings = make_strategy(), FedExSettings()
    model = FlatModel(logistic(dataset.spec))
    state, weights = fedex.init(POOL), initial
    for server_round in (1, 2):
        messages = configure(strategy, grid, weights, server_round)
        drawn = fedex.draw(state, settings, rng.stream(SEED, "policy", 0, server_round), COHORT)
        cohort = cohort_of(server_round)
        assert clients(messages) == cohort
        assert seeds(messages) == [client_seed(server_round, client) for client in cohort]
        assert configs(messages) == [POOL[0][index] for index in drawn[:, 0]]

        mean = torch.zeros_like(weights)
        error, num_validation = [], dataset.num_examples("validation")[cohort]
        num_train = dataset.num_examples("train")[cohort]
        for client, index, size in zip(cohort, drawn[:, 0], num_train, strict=True):
            config, seed = POOL[0][index], client_seed(server_round, client)
            examples = StoredExamples(*dataset.examples(client, "train"), dataset.spec, "cpu").all()
            trained = local_sgd.train(model, weights, examples, config, generator(seed))
            mean.add_(trained, alpha=size / num_train.sum())
            error.append(measure_alone(model, trained, dataset, [(client, "validation")])[0][0])
        arrays, metrics = strategy.aggregate_train(server_round, grid.send_and_receive(messages))
        weights, state = mean, fedex.update(state, drawn, np.array(error), num_validation, settings, 1.0)

        assert np.array_equal(arrays["weights"].numpy(), weights.numpy())
        assert np.array_equal(strategy.policy.state.log_theta[0], state.log_theta[0])
        assert np.array_equal(strategy.policy.state.gradient_norm, state.gradient_norm)
        assert strategy.policy.state[2:] == state[2:]
        assert metrics["error"] == pytest.approx(num_validation @ error / num_validation.sum())
        assert metrics["entropy"] == entropy(fedex.probabilities(state, settings))
    assert not np.allclose(state.log_theta[0], fedex.init(POOL).log_theta[0])


def test_a_drawn_configuration_shifts_neither_cohort_nor_client_seeds(grid, initial):
    rounds = range(1, 6)
    alone, many = make_strategy(pool=((CONFIG,),)), make_strategy()
    sharp = make_strategy()
    sharp.policy.state = sharp.policy.state._replace(log_theta=(np.array([-9.0, -9.0, math.log1p(-2 * math.exp(-9))]),))
    sent = [[configure(strategy, grid, initial, t) for t in rounds] for strategy in (alone, many, sharp)]
    for one, other, third in zip(*sent, strict=True):
        assert clients(one) == clients(other) == clients(third)
        assert seeds(one) == seeds(other) == seeds(third)
    assert [configs(messages) for messages in sent[1]] != [configs(messages) for messages in sent[2]]


def test_the_cohort_is_the_same_for_every_trial_and_depends_on_the_round_only(grid, initial):
    strategies = [
        make_strategy(),
        make_strategy(number=7, pool=((CONFIG,),)),
        make_strategy(number=3, settings={"optimizer": "adam"}, step_size="off", signal="loss"),
    ]
    cohorts = [[clients(configure(strategy, grid, initial, t)) for t in (3, 1, 2, 1)] for strategy in strategies]
    assert cohorts[0] == [cohort_of(t) for t in (3, 1, 2, 1)] == cohorts[1] == cohorts[2]
    assert cohorts[0][0] != cohorts[0][1] != cohorts[0][2]


def test_a_cohort_that_is_given_is_asked_instead_of_a_drawn_one(grid, initial):
    arrays, strategy = pack(initial.numpy()), make_strategy()
    messages = strategy.configure_cohort(1, [0, 3, 7], arrays, ConfigRecord(), grid)
    assert clients(messages) == [0, 3, 7]
    assert seeds(messages) == [client_seed(1, client) for client in (0, 3, 7)]
    strategy.aggregate_train(1, grid.send_and_receive(messages))
    assert (strategy.outcome.cohort, strategy.outcome.failed, strategy.outcome.failures) == (3, 0, [])


def test_every_client_of_every_round_and_trial_has_a_seed_of_its_own(grid, initial):
    strategies = [make_strategy(number=number) for number in range(3)]
    drawn = [seed for s in strategies for t in range(1, 6) for seed in seeds(configure(s, grid, initial, t))]
    assert len(set(drawn)) == len(drawn) == 3 * 5 * COHORT


def test_a_cohort_larger_than_the_federation(grid, initial):
    with pytest.raises(InputError, match=r"^cohort_size must be at most the number of clients, 8, got 9$"):
        configure(make_strategy(cohort_size=9), grid, initial)
    assert clients(configure(make_strategy(cohort_size=8), grid, initial)) == list(range(8))


def test_step_size_off_leaves_theta(grid, initial):
    strategy = make_strategy(step_size="off")
    weights, metrics = train_rounds(strategy, grid, initial, 3)
    assert not torch.equal(weights, initial)
    assert np.array_equal(strategy.policy.state.log_theta[0], np.full(3, -math.log(3)))
    assert [seen["entropy"] for seen in metrics] == pytest.approx([math.log(3)] * 3)


@pytest.mark.parametrize("signal", ["error", "loss"])
def test_the_client_baseline_is_the_signal_before_training(dataset, grid, initial, signal):
    options = {"baseline": "client", "signal": signal}
    strategy = make_strategy(**options)
    messages = configure(strategy, grid, initial)
    assert all(message.content.config_records["config"]["error_before"] is True for message in messages)
    replies = grid.send_and_receive(messages)
    strategy.aggregate_train(1, replies)
    reported = [reply.content.metric_records["metrics"] for reply in replies]
    after, before = (np.array([m[name] for m in reported]) for name in (signal, f"{signal}_before"))
    drawn = fedex.draw(fedex.init(POOL), FedExSettings(), rng.stream(SEED, "policy", 0, 1), COHORT)
    num_validation = dataset.num_examples("validation")[cohort_of(1)]
    worst = {"error": 1.0, "loss": 2 * math.log(3)}[signal]
    expected = fedex.update(fedex.init(POOL), drawn, after, num_validation, FedExSettings(**options), worst, before)
    assert np.array_equal(strategy.policy.state.log_theta[0], expected.log_theta[0])
    assert not any(
        message.content.config_records["config"]["error_before"]
        for message in configure(make_strategy(), grid, initial)
    )


def test_the_server_optimiser_acts_on_the_mean_and_keeps_its_moments(grid, initial):
    server = {"learning_rate": 0.05, "decay": 0.1}
    strategy = make_strategy(server=server, settings={"optimizer": "yogi"})
    plain, state, weights = make_strategy(), optimizers.init(initial), initial
    for server_round in (1, 2):
        plain.policy.state = strategy.policy.state  # so that both draw the same configurations
        mean, _ = train_rounds(plain, grid, weights, 1, first=server_round)
        actual, _ = train_rounds(strategy, grid, weights, 1, first=server_round)
        weights, state = optimizers.update("yogi", state, weights, mean, {**SERVER, **server}, server_round)
        assert torch.equal(actual, weights)


# What goes wrong.

NUM_TRAIN = [10, 20, 30, 40]
NUM_VALIDATION = [1, 2, 3, 4]
ERRORS = [0.25, 0.5, 0.0, 1.0]


def answer(message, index, weights, **metrics):
    reported = {"num_train": NUM_TRAIN[index], "num_validation": NUM_VALIDATION[index], "error": ERRORS[index]}
    content = {"arrays": pack(weights.numpy()), "metrics": MetricRecord({**reported, "loss": 0.5, **metrics})}
    return Message(RecordDict(content), reply_to=message)


def unit(index, initial):
    """Weights one away from the initial ones, each client in a direction of its own."""
    step = torch.zeros_like(initial)
    step[index] = 1.0
    return initial + step


def aggregate(grid, initial, change, **options):
    """The strategy, new weights and metrics of a round whose replies `change` replaces by index."""
    strategy = make_strategy(step_size="constant", **options)
    messages = configure(strategy, grid, initial)
    replies = [
        change[index](message) if index in change else answer(message, index, unit(index, initial))
        for index, message in enumerate(messages)
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    return strategy, torch.from_numpy(arrays["weights"].numpy()), dict(metrics)


def theta_after(heard, error, settings, worst=1.0):
    """Log theta as fedex.update has it for the clients that were heard."""
    drawn = fedex.draw(fedex.init(POOL), settings, rng.stream(SEED, "policy", 0, 1), COHORT)
    num_validation = np.array(NUM_VALIDATION)[heard]
    return fedex.update(fedex.init(POOL), drawn[heard], np.array(error), num_validation, settings, worst).log_theta[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("signal", "worst"), [("error", 1.0), ("loss", 2 * math.log(3))])
def test_an_update_that_is_not_finite_is_rejected_counted_and_the_worst_for_theta(grid, initial, bad, signal, worst):
    def broken(message):  # one weight is enough, and its metrics say that all is well
        weights = unit(2, initial)
        weights[-1] = bad
        return answer(message, 2, weights)

    strategy, weights, metrics = aggregate(grid, initial, {2: broken}, signal=signal)
    assert (metrics["cohort"], metrics["lost"], metrics["dropped"], metrics["clipped"]) == (4, 0, 1, 0)
    share = torch.tensor([10, 20, 0, 40]) / 70
    torch.testing.assert_close((weights - initial)[:4], share, atol=1e-6, rtol=0)
    reported = {"error": [0.25, 0.5, worst, 1.0], "loss": [0.5, 0.5, worst, 0.5]}[signal]
    expected = theta_after([0, 1, 2, 3], reported, strategy.policy.settings, worst)
    assert np.array_equal(strategy.policy.state.log_theta[0], expected)
    assert not np.array_equal(expected, theta_after([0, 1, 3], np.delete(reported, 2), strategy.policy.settings, worst))


@pytest.mark.parametrize("size", [1e3, 1e30])
def test_an_exploded_update_is_clipped_counted_and_keeps_its_error(grid, initial, size):
    def exploded(message):
        return answer(message, 1, initial + size * (unit(1, initial) - initial))

    strategy, weights, metrics = aggregate(grid, initial, {1: exploded}, settings={"clip_factor": 3.0})
    assert (metrics["lost"], metrics["dropped"], metrics["clipped"]) == (0, 0, 1)
    change = torch.tensor([10, 20 * 3.0, 30, 40]) / 100  # its norm is three times the median of 1
    torch.testing.assert_close((weights - initial)[:4], change, atol=1e-5, rtol=0)
    expected = theta_after([0, 1, 2, 3], ERRORS, strategy.policy.settings)
    assert np.array_equal(strategy.policy.state.log_theta[0], expected)


def failed(message):
    return Message(Error(1000, "the battery is empty"), reply_to=message)


def test_a_client_that_answers_with_an_error_has_failed_and_is_counted(grid, initial):
    strategy, weights, metrics = aggregate(grid, initial, {0: failed})
    assert (metrics["cohort"], metrics["lost"], metrics["dropped"]) == (4, 1, 0)
    assert strategy.outcome.failures == ["the battery is empty"]
    torch.testing.assert_close((weights - initial)[:4], torch.tensor([0, 20, 30, 40]) / 90, atol=1e-6, rtol=0)
    assert np.array_equal(
        strategy.policy.state.log_theta[0], theta_after([1, 2, 3], ERRORS[1:], strategy.policy.settings)
    )
    assert metrics["error"] == pytest.approx((2 * 0.5 + 3 * 0.0 + 4 * 1.0) / 9)


@pytest.mark.parametrize("case", ["nobody answers", "all answer with an error", "all are NaN"])
def test_a_round_without_a_usable_update_changes_nothing(grid, initial, case):
    strategy = make_strategy(settings={"optimizer": "adam"})
    first, _ = train_rounds(strategy, grid, initial, 1)
    theta, moments = fedex.to_arrays(strategy.policy.state), [m.clone() for m in strategy.optimizer_state]
    messages = configure(strategy, grid, first, 2)
    replies = {
        "nobody answers": [],
        "all answer with an error": [failed(message) for message in messages],
        "all are NaN": [answer(m, i, torch.full_like(first, math.nan)) for i, m in enumerate(messages)],
    }[case]
    arrays, metrics = strategy.aggregate_train(2, replies)
    assert np.array_equal(arrays["weights"].numpy(), first.numpy())
    assert all(np.array_equal(theta[name], array) for name, array in fedex.to_arrays(strategy.policy.state).items())
    assert all(torch.equal(old, new) for old, new in zip(moments, strategy.optimizer_state, strict=True))
    assert (metrics["lost"], metrics["dropped"]) == ((0, 4) if case == "all are NaN" else (4, 0))
    assert math.isnan(metrics["error"]) == (case != "all are NaN")
    train_rounds(strategy, grid, first, 1, first=3)
    assert strategy.policy.state.rounds == theta["rounds"][0] + 1  # the next one goes on as if nothing had been


def test_fewer_usable_updates_than_the_aggregation_needs_change_nothing_and_are_counted(grid, initial):
    replies = {0: failed, 1: lambda message: answer(message, 1, torch.full_like(initial, math.nan))}
    median = {"aggregation": "median"}  # of three updates or more
    strategy, _, _ = aggregate(grid, initial, {0: failed}, settings=median)
    assert not np.array_equal(strategy.policy.state.log_theta[0], fedex.init(POOL).log_theta[0])
    strategy, weights, metrics = aggregate(grid, initial, replies, settings=median)
    assert torch.equal(weights, initial)
    assert np.array_equal(strategy.policy.state.log_theta[0], fedex.init(POOL).log_theta[0])
    assert (metrics["cohort"], metrics["lost"], metrics["dropped"], metrics["clipped"]) == (4, 1, 3, 0)


def test_the_order_of_the_replies_changes_no_bit(grid, initial):
    def outcome(order):
        strategy = make_strategy(baseline="leave_one_out")
        replies = grid.send_and_receive(configure(strategy, grid, initial))
        arrays, metrics = strategy.aggregate_train(1, [replies[index] for index in order])
        return arrays["weights"].numpy().tobytes(), strategy.policy.state.log_theta[0].tobytes(), dict(metrics)

    expected = outcome(range(COHORT))
    assert all(outcome(order) == expected for order in itertools.permutations(range(COHORT)))


def test_test_labels_decide_nothing(dataset, grid, initial):
    def run(part):
        """Weights, theta and test error after rounds on data whose labels in one part are exchanged."""
        changed = make_dataset()
        for client in range(changed.num_clients):
            y = changed.examples(client, part)[1]
            y[:] = (y + 1) % 3
        strategy, grid = make_strategy(), make_grid(changed)
        weights, _ = train_rounds(strategy, grid, initial, 3)
        replies = grid.send_and_receive(strategy.configure_evaluate(3, pack(weights.numpy()), ConfigRecord(), grid))
        return weights, strategy.policy.state.log_theta[0], strategy.aggregate_evaluate(3, replies)["test_error"]

    strategy = make_strategy()
    weights, _ = train_rounds(strategy, grid, initial, 3)
    theta = strategy.policy.state.log_theta[0]
    evaluated = grid.send_and_receive(strategy.configure_evaluate(3, pack(weights.numpy()), ConfigRecord(), grid))
    test_error = strategy.aggregate_evaluate(3, evaluated)["test_error"]
    assert np.array_equal(run("test")[0].numpy(), weights.numpy())
    assert np.array_equal(run("test")[1], theta)
    assert run("test")[2] != test_error  # so the labels were really exchanged
    assert not np.array_equal(run("validation")[1], theta)
    assert not np.array_equal(run("train")[0].numpy(), weights.numpy())


# Evaluation in Flower's own loop.


def test_every_node_is_asked_to_evaluate_the_weights(grid, initial):
    arrays = pack(initial.numpy())
    messages = list(make_strategy().configure_evaluate(1, arrays, ConfigRecord(), grid))
    assert clients(messages) == list(range(8))
    assert {message.metadata.message_type for message in messages} == {MessageType.EVALUATE}
    assert all(torch.equal(protocol.weights(message), initial) for message in messages)


def test_evaluation_may_be_left_out_between_rounds(grid, initial):
    strategy = FedTuneStrategy(
        Trial(0, SERVER, POOL),
        ServerSettings(),
        FedExPolicy(POOL, FedExSettings(), num_classes=3),
        cohort_size=2,
        seed=0,
        evaluate_every=3,
    )
    arrays = pack(initial.numpy())
    asked = [len(list(strategy.configure_evaluate(t, arrays, ConfigRecord(), grid))) for t in range(1, 7)]
    assert asked == [0, 0, 8, 0, 0, 8]


def test_evaluations_are_weighted_by_examples_in_any_order(grid, initial):
    strategy = make_strategy()
    messages = list(strategy.configure_evaluate(1, pack(initial.numpy()), ConfigRecord(), grid))
    validation, test, sizes = [0.1, 0.3, 0.7], [0.2, 0.4, 0.9], [(1, 4), (2, 1), (3, 1)]
    replies = [
        Message(
            RecordDict(
                {
                    "metrics": MetricRecord(
                        {
                            "num_validation": n_validation,
                            "validation_error": v,
                            "validation_loss": 2 * v,
                            "num_test": n_test,
                            "test_error": t,
                            "test_loss": 3 * t,
                        }
                    )
                }
            ),
            reply_to=message,
        )
        for message, v, t, (n_validation, n_test) in zip(messages[:3], validation, test, sizes, strict=True)
    ]
    results = [
        dict(strategy.aggregate_evaluate(1, [*order, failed(messages[3])])) for order in itertools.permutations(replies)
    ]
    validation_error = (1 * 0.1 + 2 * 0.3 + 3 * 0.7) / 6
    test_error = (4 * 0.2 + 1 * 0.4 + 1 * 0.9) / 6
    expected = {"validation_error": validation_error, "validation_loss": 2 * validation_error}
    assert results[0] == pytest.approx(expected | {"test_error": test_error, "test_loss": 3 * test_error})
    assert all(result == results[0] for result in results)
    assert strategy.evaluation_failures == ["the battery is empty"]
    assert strategy.aggregate_evaluate(1, [failed(messages[0])]) is None

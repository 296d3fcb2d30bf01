"""Devices: which clients take part in a round, how long it takes, and what happens to slow and failed attempts."""

import math

import numpy as np
import pytest
from killed_runs import Killed, kill_at_round

import fedtune
from fedtune import rng
from fedtune.errors import InputError
from fedtune.server.strategy import FedTuneStrategy
from fedtune.settings import ServerSettings, resolve
from fedtune.simulation.device_distributions import distributions
from fedtune.simulation.devices import Devices, mean_epochs, shuffled
from fedtune.tuning.fedex import FedExPolicy, FedExSettings
from fedtune.tuning.trial import Job, Trial

BYTES = 4000  # of the weights


def devices(num_train=(10,) * 50, cohort_size=5, seed=3, **table):
    settings = resolve([{"data": {"name": "digits"}, "cohort_size": cohort_size, "devices": table}])
    return Devices(settings, seed, np.array(num_train), BYTES)


def trial_of(*epochs):
    return Trial(0, {}, (tuple({"epochs": number} for number in epochs),))


def test_without_a_table_a_round_takes_one_and_meets_the_strategys_own_cohort():
    trial = trial_of(1)
    strategy = FedTuneStrategy(
        trial, ServerSettings(), FedExPolicy(trial.pool, FedExSettings(), 10), cohort_size=5, seed=3
    )
    for server_round in range(1, 20):
        plan = devices().plan(trial, server_round)
        assert plan.cohort == strategy._cohort(server_round, 50)
        assert plan[1:] == (1.0, 5, 0, 0, 0)


def test_a_round_takes_what_its_slowest_client_takes():
    num_train = np.arange(1, 51)
    fleet = devices(num_train, round_time=2.0, seconds_per_example=0.5, download_speed=1000, upload_speed=400)
    for server_round in range(1, 20):
        plan = fleet.plan(trial_of(1, 2, 6), server_round)
        largest = max(num_train[client] for client in plan.cohort)
        assert plan.duration == pytest.approx(2 + BYTES / 1000 + 0.5 * largest * (1 + 2 + 6) / 3 + BYTES / 400)


def test_over_selection_waits_for_the_fastest():
    num_train = np.arange(1, 51)
    fleet = devices(num_train, seconds_per_example=1.0, over_selection=0.6)
    for server_round in range(1, 20):
        plan = fleet.plan(trial_of(1), server_round)
        asked = rng.stream(3, "cohort", server_round).choice(50, 8, replace=False)  # 5 * 1.6
        assert plan.cohort == sorted(asked.tolist())[:5]  # a larger number has more examples
        assert plan.duration == 1 + num_train[plan.cohort[-1]]
        assert (plan.asked, plan.stragglers, plan.dropouts) == (8, 3, 0)


def test_a_deadline_leaves_out_who_is_late():
    num_train = np.arange(1, 51)
    fleet = devices(num_train, seconds_per_example=1.0, deadline=30.0)
    for server_round in range(1, 40):
        plan = fleet.plan(trial_of(1), server_round)
        asked = rng.stream(3, "cohort", server_round).choice(50, 5, replace=False)
        assert plan.cohort == sorted(client for client in asked.tolist() if client + 1 <= 30)
        assert plan.stragglers == 5 - len(plan.cohort)
        assert plan.duration == 1 + (30 if plan.stragglers else num_train[plan.cohort[-1]])


def literal_plan(fleet, trial, server_round, cohort_size, round_time, deadline, bytes_):
    """A round as it goes, one client after another in the order of their answers; who is asked is taken as given."""
    clients, left, unavailable = fleet._ask(server_round)
    answers = []
    for client, gone in zip(clients.tolist(), left.tolist(), strict=True):
        device = fleet._device(client)
        training = device.seconds_per_example * fleet._num_train[client] * mean_epochs(trial)
        if not gone:
            answers.append((bytes_ / device.download_speed + training + bytes_ / device.upload_speed, client))
    cohort, ends = [], deadline
    for time, client in sorted(answers):
        if time <= deadline and len(cohort) < cohort_size:
            cohort.append(client)
            if len(cohort) in (cohort_size, len(clients)):  # enough, or nobody is left to wait for
                ends = time
    if ends == math.inf:
        ends = max([time for time, _ in answers], default=0.0)
    if len(clients) == 0:
        ends = 0.0
    late = len(answers) - len(cohort)
    return sorted(cohort), pytest.approx(round_time + ends), len(clients), late, int(left.sum()), unavailable


@pytest.mark.parametrize("deadline", [math.inf, 6.0])
@pytest.mark.parametrize("over_selection", [0.0, 0.6])
@pytest.mark.parametrize("num_clients", [6, 50])
def test_a_round_with_everything_at_once(num_clients, over_selection, deadline):
    """Deadline and over-selection, drop-outs and absences, speeds and bandwidths; few clients may be too few."""
    num_train = np.random.default_rng(0).integers(1, 40, num_clients)
    table = {
        "seconds_per_example": {"log_normal": [0.1, 1.0]},
        "download_speed": {"log_uniform": [1e3, 1e5]},
        "upload_speed": {"uniform": [1e3, 1e4]},
        "availability": {"uniform": [0.1, 0.6]},
        "drop_out": 0.1,
        "over_selection": over_selection,
        "round_time": 0.5,
        "deadline": deadline,
    }
    fleet, seen = devices(num_train, **table), set()
    for server_round in range(1, 60):
        plan = fleet.plan(trial_of(1, 2), server_round)
        assert plan == literal_plan(fleet, trial_of(1, 2), server_round, 5, 0.5, deadline, BYTES)
        seen.add((len(plan.cohort) == 5, plan.asked < 5, plan.stragglers > 0, plan.dropouts > 0))
    assert len(seen) > 1  # the rounds differ in kind


def test_nobody_waits_for_the_deadline_once_all_who_were_asked_have_answered():
    """Of two clients for a cohort of five, or where only some can be asked."""
    fleet = devices((10, 20, 30), cohort_size=3, seconds_per_example=1.0, availability=0.5, deadline=100.0)
    plans = [fleet.plan(trial_of(1), server_round) for server_round in range(1, 40)]
    assert {len(plan.cohort) for plan in plans} == {0, 1, 2, 3}
    assert all(plan.duration == 1 + max([10 * (client + 1) for client in plan.cohort], default=0) for plan in plans)


def test_clients_drop_out_and_are_not_available_as_often_as_said():
    """Each count is binomial: 5 standard deviations are passed once in 1.7 million runs."""
    fleet = devices(cohort_size=20, drop_out=0.3, availability=0.8)
    plans = [fleet.plan(trial_of(1), server_round) for server_round in range(1, 101)]
    assert all(plan.asked == 20 for plan in plans)
    assert all(len(plan.cohort) == 20 - plan.dropouts for plan in plans)
    left = sum(plan.dropouts for plan in plans)
    assert abs(left - 2000 * 0.3) < 5 * math.sqrt(2000 * 0.3 * 0.7)
    drawn = 2000 + sum(plan.unavailable for plan in plans)
    assert abs(2000 - drawn * 0.8) < 5 * math.sqrt(drawn * 0.8 * 0.2)


def test_with_too_few_available_the_server_asks_fewer():
    plan = devices((1,) * 6, cohort_size=6, availability=0.5).plan(trial_of(1), 1)
    assert plan.asked + plan.unavailable == 6
    assert 0 < plan.asked < 6


def test_who_leaves_makes_nobody_wait():
    fleet = devices((10, 1000), cohort_size=2, seconds_per_example=1.0, drop_out=0.5)
    seen = {tuple(plan.cohort): plan.duration for plan in (fleet.plan(trial_of(1), n) for n in range(1, 60))}
    assert seen == {(): 1.0, (0,): 11.0, (1,): 1001.0, (0, 1): 1001.0}


@pytest.mark.parametrize(
    "form", [{"log_normal": [0.5, 1.0]}, {"uniform": [0.2, 0.9]}, {"log_uniform": [0.2, 0.9]}, {"choice": [0.2, 0.9]}]
)
def test_each_client_has_a_device_of_its_own_that_stays(form):
    fleet, again = devices(seconds_per_example=form), devices(seconds_per_example=form)
    speeds = [fleet._device(client).seconds_per_example for client in range(50)]
    assert speeds == [again._device(client).seconds_per_example for client in reversed(range(50))][::-1]
    assert len(set(speeds)) == (2 if "choice" in form else 50)
    assert all(speed > 0 for speed in speeds)


@pytest.mark.parametrize("drop_probability", [0.0, 0.3])
def test_the_fate_of_an_attempt_comes_from_a_stream_of_its_own(drop_probability):
    fleet = devices(np.arange(1, 51), seconds_per_example=0.1, straggler_std=0.5, drop_probability=drop_probability)
    trial, fates = trial_of(1, 2), []
    for number in range(20):
        draws = rng.stream(3, "attempt", trial.number, 9, number)
        slowdown = 1 + 0.5 * abs(draws.standard_normal())
        finish_times, now = [], 0.0
        for server_round in range(6, 10):
            now += fleet.plan(trial, server_round).duration
            finish_times.append(slowdown * now)
        fate = fleet.attempt_fate(Job(trial, 0, 9), number, 5)
        assert fate.finish_times.tolist() == pytest.approx(finish_times)
        survives = 1 - draws.random() <= (1 - drop_probability) ** finish_times[-1]
        assert (fate.fails_after is None) == survives
        fates.append(survives)
    assert all(fates) == (drop_probability == 0)


def test_log_normal_has_its_median_and_sigma():
    """1,000 logarithms: mean and standard deviation within 5 standard errors (false alarms under 1 in a million)."""
    fleet = devices((1,) * 1000, download_speed={"log_normal": [1e6, 0.7]})
    logs = np.log([fleet._device(client).download_speed for client in range(1000)])
    assert abs(logs.mean() - math.log(1e6)) < 5 * 0.7 / math.sqrt(1000)
    assert abs(logs.std() - 0.7) < 5 * 0.7 / math.sqrt(2000)


def test_lazy_shuffle_is_a_uniform_permutation():
    """All 24 orders of 4, 24,000 draws: chi-square with 23 degrees of freedom, above 70 once in a million."""
    draws = np.random.default_rng(0)
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(24_000):
        order = tuple(shuffled(4, draws))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 70


def test_mean_epochs_of_a_product_of_factors():
    assert mean_epochs(Trial(0, {}, (({"learning_rate": 0.1},), ({"epochs": 2}, {"epochs": 5})))) == 3.5
    assert mean_epochs(Trial(0, {}, (({"learning_rate": 0.1},),))) == 1.0


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"availability": 0.0}, "devices.availability must be a finite number > 0 and <= 1, got 0.0"),
        (
            {"availability": {"uniform": [0.5, 1.5]}},
            "devices.availability must be a finite number > 0 and <= 1, got 1.5",
        ),
        ({"availability": {"log_normal": [0.5, 1]}}, "which has no upper end"),
        ({"download_speed": 0.0}, "devices.download_speed must be a finite number > 0, got 0.0"),
        ({"upload_speed": {"choice": [1.0, -1.0]}}, "devices.upload_speed must be a finite number > 0, got -1.0"),
        ({"seconds_per_example": -1.0}, "devices.seconds_per_example must be a finite number >= 0, got -1.0"),
        ({"seconds_per_example": {"log_normal": [1]}}, r"log_normal must be \[median, sigma\], got \[1\]"),
        ({"seconds_per_example": {"normal": [1, 2]}}, "unknown domain of devices.seconds_per_example 'normal'"),
    ],
)
def test_impossible_devices_are_one_clear_line(table, message):
    with pytest.raises(InputError, match=message):
        distributions(resolve([{"data": {"name": "digits"}, "devices": table}]).devices)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("deadline", 0.0, "devices.deadline must be greater than 0, got 0.0"),
        ("drop_out", 1.0, "devices.drop_out must be less than 1, got 1.0"),
        ("on_drop", "forget", "devices.on_drop must be 'retry', 'lose' or 'worst', got 'forget'"),
        ("speed", 1.0, "unknown setting 'devices.speed'"),
    ],
)
def test_impossible_settings_are_one_clear_line(key, value, message):
    with pytest.raises(InputError, match=message):
        resolve([{"data": {"name": "digits"}, "devices": {key: value}}])


# Whole studies.

SMALL = {"max_rounds": 9, "total_rounds": 36, "tuners": ["manual", "asha", "fedex"], "executor": "serial"}
SLOW_PHONES = {
    "seconds_per_example": {"log_normal": [0.01, 1.0]},
    "download_speed": {"log_uniform": [1e5, 1e7]},
    "upload_speed": 2e5,
    "availability": {"uniform": [0.5, 1.0]},
    "drop_out": 0.1,
    "over_selection": 0.3,
    "deadline": 1.0,
    "straggler_std": 0.5,
    "drop_probability": 0.02,
}


@pytest.fixture(scope="module")
def phones(tmp_path_factory):
    return fedtune.compare("digits", out=tmp_path_factory.mktemp("devices") / "phones", devices=SLOW_PHONES, **SMALL)


def test_devices_shape_rounds_and_are_counted(phones):
    rounds, results = phones.rounds, phones.results.set_index("tuner")
    assert (rounds["asked"] == rounds["cohort"] + rounds["late"] + rounds["left"]).all()
    assert rounds[["late", "left", "unavailable"]].sum().min() > 0
    weights = rounds["bytes"] / (rounds["asked"] + rounds["client_updates"])
    assert weights.nunique() == 1
    for name, study in rounds.groupby("tuner"):
        assert study["late"].sum() == results.loc[name, "late"]
        assert study["left"].sum() == results.loc[name, "left"]
        assert study["virtual_time"].max() <= results.loc[name, "virtual_time"] + 1e-9


def test_every_trial_meets_the_same_devices(phones):
    for _, same_round in phones.rounds.groupby("round"):
        assert same_round["asked"].nunique() == same_round["left"].nunique() == same_round["unavailable"].nunique() == 1


def test_the_pool_gives_the_same_bytes(phones, tmp_path):
    settings = {**SMALL, "executor": "pool", "workers": 2}
    again = fedtune.compare("digits", out=tmp_path / "pool", devices=SLOW_PHONES, **settings)
    for name in ("results.csv", "rounds.parquet", "trials.parquet"):
        assert (phones.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_a_run_with_drops_goes_on_after_a_stop(tmp_path):
    settings = {**SMALL, "tuners": ["asha"], "devices": {"drop_probability": 0.2}}
    whole = fedtune.compare("digits", out=tmp_path / "whole", **settings)
    assert whole.results["dropped_jobs"].item() > 0

    with pytest.raises(Killed):
        fedtune.compare("digits", out=tmp_path / "run", listener=kill_at_round(17), **settings)
    resumed = fedtune.resume(tmp_path / "run", executor="serial")
    assert (whole.folder / "results.csv").read_bytes() == (resumed.folder / "results.csv").read_bytes()


def test_a_retried_job_trains_what_it_would_have_trained(tmp_path):
    """Without other trials beside it, drops cost time and nothing else."""
    settings = {**SMALL, "tuners": ["manual"]}
    calm = fedtune.compare("digits", out=tmp_path / "calm", **settings).results.iloc[0]
    rough = fedtune.compare("digits", out=tmp_path / "rough", devices={"drop_probability": 0.1}, **settings)
    rough = rough.results.iloc[0]
    assert rough["dropped_jobs"] > 0
    assert rough["virtual_time"] > calm["virtual_time"] + rough["wasted_rounds"]
    same = ["rounds", "test_error", "validation_error", "test_error_personalised", "bytes"]
    assert rough[same].equals(calm[same])


@pytest.mark.parametrize("on_drop", ["retry", "lose", "worst"])
@pytest.mark.parametrize("tuner", ["random", "asha", "sha", "hyperband", "pbt", "bohb", "elimination"])
def test_every_tuner_ends_whatever_becomes_of_dropped_jobs(tmp_path, tuner, on_drop):
    options = {"elimination": {"num_configs": 4, "rounds_per_halving": 2}}.get(tuner, {})
    table = {"drop_probability": 0.1, "on_drop": on_drop}
    cheap = {"cohort_size": 2, "evaluation": {"every": 3, "clients": 5}}
    settings = {**SMALL, **cheap, "total_rounds": 63, "tuners": [tuner], "tuner": {tuner: options}}
    result = fedtune.compare("digits", out=tmp_path / "run", devices=table, **settings).results.iloc[0]
    assert result["dropped_jobs"] > 0
    assert result["rounds"] <= 63
    assert 0 <= result["test_error"] <= 1


def test_a_round_in_which_nobody_is_in_time_leaves_everything_as_it_was(tmp_path):
    """The initial weights' error, for every policy."""
    tuners = ["manual", "fedex", "elimination", "rsws"]
    small = {"elimination": {"num_configs": 4, "rounds_per_halving": 2}, "rsws": {"num_configs": 4}}
    table = {"seconds_per_example": 1.0, "deadline": 0.5}
    settings = {**SMALL, "tuners": tuners, "tuner": small, "max_rounds": 4, "total_rounds": 8}
    run = fedtune.compare("digits", out=tmp_path / "run", devices=table, **settings)
    assert (run.rounds["late"] == run.rounds["asked"]).all()
    assert (run.rounds["bytes"] > 0).all()
    assert (run.results["client_updates"] == 0).all()
    assert run.results["test_error_last"].nunique() == 1
    assert run.results["virtual_time"].tolist() == [8 * 1.5] * 4


def test_hopeless_drops_are_refused_before_the_run(tmp_path):
    with pytest.raises(
        InputError, match=r"a job of 27 rounds a chance of 0.001 to end, got 0.5, which leaves it 7e-09"
    ):
        fedtune.compare("digits", out=tmp_path / "run", devices={"drop_probability": 0.5}, **SMALL)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        pytest.param({"devices": {"seconds_per_example": 0.05}}, "10 rounds", id="slow clients"),
        pytest.param({"devices": {"upload_speed": 1000.0}}, "10 rounds", id="slow uploads"),
        pytest.param({"client": {"epochs": 100}, "devices": {"seconds_per_example": 5e-4}}, "10 rounds", id="epochs"),
        pytest.param(
            {"space": {"client": {"epochs": {"integer": [1, 100]}}}, "devices": {"seconds_per_example": 5e-4}},
            "10 rounds",
            id="epochs that are searched",
        ),
        pytest.param(
            {"tuners": ["random"], "max_rounds": 5, "devices": {"seconds_per_example": 0.1}}, "5 rounds", id="a search"
        ),
    ],
)
def test_hopeless_drops_count_what_the_clients_take(tmp_path, layers, message):
    devices = {"drop_probability": 0.2, **layers.pop("devices")}
    settings = {**SMALL, "tuners": ["manual"], "max_rounds": 10, "total_rounds": 10, **layers}
    with pytest.raises(InputError, match=f"a job of {message} a chance of 0.001 to end, got 0.2, which leaves it"):
        fedtune.compare("digits", out=tmp_path / "run", devices=devices, **settings)
    assert not (tmp_path / "run").exists()


def test_a_study_that_loses_every_job_says_so(tmp_path):
    table = {"drop_probability": 0.999, "on_drop": "lose"}
    with pytest.raises(InputError, match=r"all \d+ jobs of tuner random, seed 0, failed$"):
        fedtune.compare("digits", out=tmp_path / "run", devices=table, **{**SMALL, "tuners": ["random"]})


@pytest.mark.parametrize("on_drop", ["retry", "lose", "worst"])
def test_a_study_with_drops_is_rebuilt_from_its_journal(tmp_path, on_drop):
    table = {"drop_probability": 0.15, "straggler_std": 1.0, "on_drop": on_drop}
    settings = {**SMALL, "tuners": ["asha", "sha", "elimination"]}
    options = {"elimination": {"num_configs": 4, "rounds_per_halving": 2}}
    run = fedtune.compare("digits", out=tmp_path / "run", devices=table, tuner=options, **settings)
    assert (run.results["dropped_jobs"] > 0).all()
    studies = fedtune.replay(tmp_path / "run")
    assert [study.rounds for study in studies] == run.results["rounds"].tolist()
    assert all(study.finished and study.under_way == 0 for study in studies)

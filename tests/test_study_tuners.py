import pytest

from fedtune import rng
from fedtune.hyperparameters import resolve_hyperparameters
from fedtune.settings import resolve
from fedtune.study_tuners import make_draw, study_tuner, tuner_settings
from fedtune.tuning.config_pool import make_pool
from fedtune.tuning.domains import LogUniform, PowerOfTwo
from fedtune.tuning.fedex import FedExSettings
from fedtune.tuning.tuners import TUNERS
from fedtune_clients.local_sgd import HYPERPARAMETERS

TABLE = {
    "data": {"name": "digits"},
    "client": {"learning_rate": 0.05, "epochs": 2},
    "server": {"learning_rate": 0.5, "clip_factor": 0.0},
    "space": {
        "client": {"learning_rate": {"log_uniform": [1e-3, 1.0]}, "batch_size": {"power_of_two": [8, 128]}},
        "server": {"momentum": {"choice": [0.0, 0.9]}, "learning_rate": {"log_uniform": [0.1, 10.0]}},
    },
}
FIXED_CLIENT = {name: hp.default for name, hp in HYPERPARAMETERS.items()} | {"learning_rate": 0.05, "epochs": 2}
FIXED_SERVER = {"learning_rate": 0.5, "momentum": 0.0, "decay": 0.0, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3}


def draw_of(tuner, seed=4, *, fixed_first=False, **options):
    settings = resolve([TABLE, {"tuners": [tuner], "tuner": {tuner: options}, "fixed_first": fixed_first}])
    return make_draw(tuner_settings(tuner, settings), seed, resolve_hyperparameters(settings))


def test_manual_is_the_fixed_values():
    trial = draw_of("manual")(0)
    assert (trial.number, trial.server, trial.pool) == (0, FIXED_SERVER, ((FIXED_CLIENT,),))


def test_fedex_weighs_a_pool_around_the_fixed_values():
    trial = draw_of("fedex", pool_size=5, perturbation=0.2)(0)
    settings = FedExSettings(pool_size=5, perturbation=0.2)
    domains = {"learning_rate": LogUniform(1e-3, 1.0), "batch_size": PowerOfTwo(8, 128)}
    assert trial.server == FIXED_SERVER
    assert trial.pool == make_pool(settings, FIXED_CLIENT, domains, rng.stream(4, "pool", 0))
    assert trial.pool[0][0] == FIXED_CLIENT
    assert trial.num_configs == 5


def test_every_trial_of_a_search_perturbs_on_its_own():
    settings, domains = FedExSettings(), {"learning_rate": LogUniform(1e-3, 1.0), "batch_size": PowerOfTwo(8, 128)}
    for number in (0, 3):
        pool = draw_of("asha+fedex")(number).pool
        assert pool == make_pool(settings, pool[0][0], domains, rng.stream(4, "pool", number))


def test_a_product_has_a_factor_for_each_searched_hyperparameter():
    trial = draw_of("fedex", form="product", pool_size=3)(0)
    assert [set(factor[0]) for factor in trial.pool[1:]] == [{"batch_size"}, {"learning_rate"}]


def test_a_search_draws_what_is_searched_and_keeps_the_rest():
    trials = [draw_of("random")(number) for number in range(30)]
    for trial in trials:
        ((client,),) = trial.pool
        assert LogUniform(1e-3, 1.0).contains(client["learning_rate"])
        assert PowerOfTwo(8, 128).contains(client["batch_size"])
        assert client == FIXED_CLIENT | {name: client[name] for name in ("learning_rate", "batch_size")}
        assert trial.server == FIXED_SERVER | {name: trial.server[name] for name in ("learning_rate", "momentum")}
    assert [trial.number for trial in trials] == list(range(30))
    assert len({trial.pool[0][0]["learning_rate"] for trial in trials}) == 30
    assert len({trial.server["learning_rate"] for trial in trials}) == 30
    # Two options, 30 draws: the chance that one never comes up is 2 / 2^30.
    assert {trial.server["momentum"] for trial in trials} == {0.0, 0.9}


@pytest.mark.parametrize("number", [0, 7])
def test_trial_n_has_the_same_centre_under_every_search(number):
    trials = [draw_of(tuner)(number) for tuner in ("random", "asha", "random+fedex", "asha+fedex")]
    assert len({(tuple(trial.server.items()), tuple(trial.pool[0][0].items())) for trial in trials}) == 1
    assert [trial.num_configs for trial in trials] == [1, 1, 9, 9]
    assert trials[2] == trials[3]


@pytest.mark.parametrize("tuner", [name for name, kind in TUNERS.items() if kind.searches])
def test_trial_0_has_the_fixed_values_and_no_other_trial_changes(tuner):
    """The fixed batch size, 10, is no power of two and so outside its domain; the server's momentum is a default."""
    first, drawn = draw_of(tuner, fixed_first=True), draw_of(tuner)
    assert first(0).server == FIXED_SERVER
    assert first(0).centre == FIXED_CLIENT != drawn(0).centre
    if tuner.endswith("+fedex"):
        assert first(0) == draw_of("fedex")(0)
    for number in (1, 2, 7):
        assert first(number) == drawn(number)


@pytest.mark.parametrize(("tuner", "options"), [("bohb", {}), ("pbt", {"interval": 1}), ("pbt+fedex", {"interval": 1})])
def test_fixed_values_outside_their_domains_are_brought_inside_where_a_search_goes_on_from_them(tuner, options):
    """Trial 0 is the best at every rung. BOHB's model learns from it, and members of PBT copy it."""
    outside = {"learning_rate": 5.0, "batch_size": 10, "momentum": 0.3}
    table = {"client": {"learning_rate": 5.0, "batch_size": 10}, "server": {"momentum": 0.3}, "fixed_first": True}
    settings = resolve([TABLE, table, {"tuners": [tuner], "tuner": {tuner: options}, "total_rounds": 810}])
    found = resolve_hyperparameters(settings)
    made = study_tuner(tuner_settings(tuner, settings), 4, found)
    trials = {}
    for _ in range(400):
        job = made.ask()
        trials[job.trial.number] = job.trial
        made.tell(job, 0.1 if job.trial.number == 0 else 0.5 + 0.001 * job.trial.number)
    first = {**trials[0].centre, "momentum": trials[0].server["momentum"]}
    assert first | outside == first
    assert tuner == "bohb" or any(trial.parent == 0 for trial in trials.values())
    for trial in [trials[number] for number in sorted(trials)[1:]]:
        for config in trial.pool[0]:
            assert all(domain.contains(config[name]) for name, domain in found.space.client.items())
        assert all(domain.contains(trial.server[name]) for name, domain in found.space.server.items())


def test_a_trial_depends_on_seed_and_number_only():
    draw = draw_of("random+fedex")
    in_order = [draw(number) for number in (0, 1, 2)]
    again = draw_of("random+fedex")
    assert [again(number) for number in (2, 0, 1)] == [in_order[2], in_order[0], in_order[1]]
    assert draw_of("random+fedex", seed=5)(1) != in_order[1]

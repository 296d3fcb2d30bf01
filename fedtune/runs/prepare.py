"""Every check of a comparison that needs no training."""

from pathlib import Path

import torch

from fedtune import plugins
from fedtune.client.examples import StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.client.objectives import check_outputs
from fedtune.data.checks import find_problems
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.data.problems import errors_of, first_of
from fedtune.errors import InputError, NoKernelError
from fedtune.executors.choice import check_workers
from fedtune.executors.engine import choose_engine
from fedtune.hyperparameters import Hyperparameters, resolve_hyperparameters
from fedtune.initial_weights import initial_weights
from fedtune.runs.comparison import Comparison
from fedtune.runs.recorded import other_kernel_advice
from fedtune.settings import Settings
from fedtune.simulation.device_distributions import distributions
from fedtune.simulation.devices import Devices, check_jobs_can_end
from fedtune.study_tuners import resolve_tuners
from fedtune.tuning.domains import Choice
from fedtune.tuning.space import Number
from fedtune.tuning.tuners import tuner_kind


def prepare(settings: Settings) -> Comparison:
    """The comparison, after every check that needs no training. Raises InputError, one line; writes nothing.

    Its settings say in which engine its clients train: not "auto".
    """
    hyperparameters = resolve_hyperparameters(settings)
    check_device(settings)
    tuners = resolve_tuners(settings, hyperparameters.space)
    distributions(settings.devices)  # checks the table [devices]
    dataset = plugins.load_dataset(settings.data)
    problems = find_problems(dataset, quick=True)
    if errors := errors_of(problems):
        raise InputError(f"data set {settings.data['name']}: {first_of(errors)}")
    if settings.cohort_size > dataset.num_clients:
        raise InputError(
            f"cohort_size must be at most the number of clients, {dataset.num_clients}, got {settings.cohort_size}"
        )
    if unknown := [client for client in settings.lost_clients if client not in dataset.client_ids]:
        raise InputError(f"a lost client must be the id of a client of {settings.data['name']}, got {unknown[0]!r}")
    engine = choose_engine(settings, checked_model(settings, dataset), dataset.spec)
    check_jobs(settings, dataset, hyperparameters)
    settings = settings.model_copy(update={"engine": engine.name})
    return Comparison(settings, dataset, hyperparameters, tuners, engine, first_of(problems) if problems else None)


def prepare_again(settings: Settings, folder: Path) -> Comparison:
    """Like `prepare`, for the run in a folder, which goes on. If its kernel is not here, the error says what to do."""
    try:
        return prepare(settings)
    except NoKernelError as error:
        raise InputError(f"{error}; {other_kernel_advice(folder)}") from None


def checked_model(settings: Settings, dataset: FederatedDataset) -> FlatModel:
    """The model, on the CPU.

    Raises InputError unless it can be made, takes the data set's examples and returns what they need.
    """
    spec, name = dataset.spec, settings.model["name"]
    stored_x, stored_y = dataset.examples(0, "train")
    x, y = StoredExamples(stored_x[:2], stored_y[:2], spec, "cpu").all()
    weights = initial_weights(settings, spec, settings.seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = FlatModel(plugins.make_model(settings.model, spec), "cpu", spec.objective)
        model.module.eval()
        try:
            outputs = model.outputs(weights, x)
            check_outputs(spec.objective, outputs, y, spec.num_outputs)
        except InputError as error:
            raise InputError(f"model {name!r} does not fit data set {dataset.name!r}: {error}") from None
        except Exception as error:  # a model is anybody's code
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"model {name!r} can't take an example of data set {dataset.name!r}: {reason}") from None
    return model


def check_jobs(settings: Settings, dataset: FederatedDataset, hyperparameters: Hyperparameters) -> None:
    """Raises InputError unless a job that is retried has a chance to end on the devices of every seed."""
    max_rounds, drop_probability = settings.max_rounds, settings.devices.drop_probability
    if drop_probability == 0:
        return
    if any(not tuner_kind(name).searches for name in settings.tuners):
        longest_job = max(max_rounds, settings.total_rounds - max_rounds)
    elif settings.devices.on_drop == "retry":
        longest_job = max_rounds
    else:
        return
    epochs = most_epochs(hyperparameters)
    num_train = dataset.num_examples("train")
    for seed in range(settings.seed, settings.seed + settings.seeds):
        weight_bytes = initial_weights(settings, dataset.spec, seed).nbytes
        check_jobs_can_end(Devices(settings, seed, num_train, weight_bytes), drop_probability, longest_job, epochs)


def most_epochs(hyperparameters: Hyperparameters) -> Number:
    """The most local epochs with which a client may be asked to train; 1 if its client program has no epochs."""
    fixed, domain = hyperparameters.client.get("epochs", 1), hyperparameters.space.client.get("epochs")
    if domain is None:
        return fixed
    return max(fixed, *domain.options) if isinstance(domain, Choice) else max(fixed, domain.high)


def check_device(settings: Settings) -> None:
    """Raises InputError unless torch can use the device."""
    try:
        torch.empty(1, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device must be one that torch can use here, got {settings.device!r}: {reason}") from None
    if settings.executor == "pool" and settings.device != "cpu":
        raise InputError(f"executor 'pool' must be used with device 'cpu', got device {settings.device!r}")
    if settings.watch.limit is not None and (settings.device != "cpu" or settings.executor not in ("auto", "pool")):
        where = f"executor {settings.executor!r} on {settings.device!r}"
        raise InputError(f"watch.limit must be used with executor 'pool', which can end a client, got {where}")
    check_workers(settings)

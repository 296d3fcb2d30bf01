"""A run's trials in an Optuna storage, so that `optuna-dashboard` shows them live. It listens and decides nothing."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from fedtune.errors import InputError
from fedtune.tuning.domains import Choice, Domain, Integer, LogUniform, PowerOfTwo, Uniform
from fedtune.tuning.space import SearchSpace

try:
    import optuna
except ModuleNotFoundError as error:
    raise InputError(f"--optuna needs the package optuna (pip install 'optuna>=4'): {error}") from None
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial


@dataclass
class MirroredTrial:
    """A trial as the storage holds it; `values` are its scores by rounds."""

    storage_id: int
    finished: bool = False
    values: dict[int, float] = field(default_factory=dict)
    failed_attempts: int = 0  # at its jobs


class OptunaMirror:
    """A listener that passes every event to `listener` and writes the trials into the storage at `url`.

    For each study of the run there is an Optuna study, `<run>/<tuner>-seed<n>`, which is minimised. A trial's scores
    are its intermediate values, by rounds. All trials, also paused ones, are RUNNING until the study ends. Then a trial
    is COMPLETE with its last score, or FAIL if that score is NaN or missing. Each hyperparameter that is searched is an
    Optuna parameter; if the trial has a pool, the parameter is the value at the pool's centre. The user attribute
    `config` holds all values, and `fedtune_trial` the trial's number.

    Optuna can't continue a finished trial. If a run is extended, the storage gets only the new trials.

    If the storage already holds a study of this run, it is continued if it was `decided_by` the same settings; its
    trials are found by `fedtune_trial`. Otherwise InputError is raised, and also if the storage can't be opened. If the
    storage fails later, `listener` gets one warning, and nothing more is written to the storage.
    """

    def __init__(
        self, url: str, run: str, decided_by: str, space: SearchSpace, listener: Callable[[dict[str, Any]], None]
    ) -> None:
        self._run = run
        self._decided_by = decided_by
        self._domains = {f"client.{name}": domain for name, domain in space.client.items()}
        self._domains |= {f"server.{name}": domain for name, domain in space.server.items()}
        self._listener = listener
        self._failed = False
        self._studies: dict[tuple[str, int], int] = {}
        self._trials: dict[tuple[str, int], dict[int, MirroredTrial]] = {}
        shown = re.sub(r":[^:/@]*@", ":***@", url)  # hides a password
        try:
            self._storage = RDBStorage(url)
            studies = self._storage.get_all_studies()
        except Exception as error:  # the exception's type depends on the database's driver
            raise InputError(
                f"--optuna must be the URL of a database that opens, such as sqlite:///trials.db, got {shown!r}: "
                f"{_reason(error)}"
            ) from None
        for study in studies:
            ours = study.study_name.startswith(f"{run}/")
            if ours and study.user_attrs.get("fedtune_settings", decided_by) != decided_by:
                self._close()
                raise InputError(
                    f"--optuna must hold no study of another run of this name, got {study.study_name} in {shown!r}: "
                    "give another storage, or another --out"
                )

    def __enter__(self) -> "OptunaMirror":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, event: dict[str, Any]) -> None:
        """Passes the event on to the listener, and writes what it says of a trial into the storage."""
        self._listener(event)
        if self._failed:
            return
        try:
            self._mirror(event)
        except Exception as error:  # no failure of the mirror may stop the run
            self._failed = True
            message = f"the Optuna storage failed, nothing more of this run is written to it: {_reason(error)}"
            self._listener({"event": "warning", "message": message})

    def _mirror(self, event: Mapping[str, Any]) -> None:
        match event["event"]:
            case "plan":
                for study in event["studies"]:
                    self._find_or_make_study(study["tuner"], study["seed"])
            case "ask":
                self._ask(event)
            case "tell":
                self._tell(event)
            case "drop":
                self._drop(event)
            case "study_end":
                self._end(event)

    def _find_or_make_study(self, tuner: str, seed: int) -> None:
        name = f"{self._run}/{tuner}-seed{seed}"
        try:
            study_id = self._storage.get_study_id_from_name(name)
        except KeyError:
            with _quiet():
                study_id = self._storage.create_new_study([StudyDirection.MINIMIZE], name)
        self._storage.set_study_user_attr(study_id, "fedtune_settings", self._decided_by)
        self._studies[tuner, seed] = study_id
        self._trials[tuner, seed] = {
            trial.user_attrs["fedtune_trial"]: MirroredTrial(
                self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number),
                trial.state.is_finished(),
                trial.intermediate_values,
            )
            for trial in self._storage.get_all_trials(study_id)
        }

    def _ask(self, event: Mapping[str, Any]) -> None:
        study, number = (event["tuner"], event["seed"]), event["trial"]
        if number not in self._trials[study]:
            storage_id = self._storage.create_new_trial(self._studies[study], self._as_optuna_trial(event))
            self._trials[study][number] = MirroredTrial(storage_id)

    def _as_optuna_trial(self, event: Mapping[str, Any]) -> FrozenTrial:
        centre = {f"client.{name}": value for factor in event["pool"] for name, value in factor[0].items()}
        values = centre | {f"server.{name}": value for name, value in event["server"].items()}
        # A fixed value may lie outside the domain that is searched; Optuna would refuse it as a parameter.
        searched = {name: domain for name, domain in self._domains.items() if domain.contains(values[name])}
        return create_trial(
            state=TrialState.RUNNING,
            params={name: values[name] for name in searched},
            distributions={name: distribution(domain) for name, domain in searched.items()},
            user_attrs={
                "fedtune_trial": event["trial"],
                "config": {"server": event["server"], "pool": event["pool"]},
            },
        )

    def _tell(self, event: Mapping[str, Any]) -> None:
        trial, rounds, score = self._trial(event), event["rounds"], event["score"]
        if not trial.finished and str(trial.values.get(rounds)) != str(score):  # as text, NaN equals itself
            self._storage.set_trial_intermediate_value(trial.storage_id, rounds, score)
            trial.values[rounds] = score

    def _drop(self, event: Mapping[str, Any]) -> None:
        trial = self._trial(event)
        trial.failed_attempts += 1
        if not trial.finished:
            self._storage.set_trial_user_attr(trial.storage_id, "dropped_jobs", trial.failed_attempts)

    def _end(self, event: Mapping[str, Any]) -> None:
        for trial in self._trials[event["tuner"], event["seed"]].values():
            score = trial.values[max(trial.values)] if trial.values else float("nan")
            failed = score != score
            if not trial.finished:
                self._storage.set_trial_state_values(
                    trial.storage_id,
                    TrialState.FAIL if failed else TrialState.COMPLETE,
                    None if failed else [score],
                )

    def _trial(self, event: Mapping[str, Any]) -> MirroredTrial:
        return self._trials[event["tuner"], event["seed"]][event["trial"]]

    def _close(self) -> None:
        self._storage.engine.dispose()


def distribution(domain: Domain) -> BaseDistribution:
    """The Optuna distribution for a domain; powers of two become whole numbers on a log scale."""
    match domain:
        case Uniform():
            return FloatDistribution(domain.low, domain.high)
        case LogUniform():
            return FloatDistribution(domain.low, domain.high, log=True)
        case Integer():
            return IntDistribution(domain.low, domain.high)
        case PowerOfTwo():
            return IntDistribution(domain.low, domain.high, log=True)
        case Choice():
            return CategoricalDistribution(domain.options)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences Optuna's line about a new study, which would be printed over the run's progress."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)


def _reason(error: Exception) -> str:
    """What went wrong, in one line: the database's own message if there is one."""
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {cause}".partition("\n")[0]

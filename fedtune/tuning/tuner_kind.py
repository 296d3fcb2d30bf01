"""The description of a tuner: how it is made, what can be set, and how it behaves.

The rest of the program uses a tuner only through its `TunerKind`. `TunerKind.parse` turns a [tuner.NAME] table into
`TunerSettings`, which make the tuner and the pool and the policy of each trial. A new tuner is added to
`fedtune.tuning.tuners`; tuners are not plug-ins. Its description is, for example:

    from fedtune.tuning import TunerKind

    KIND = TunerKind(
        make=lambda trials, budget, **options: MyTuner(trials.draw, budget.max_rounds, **options),
        options={"num_configs": int},
    )
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedtune.errors import InputError, UnknownNameError
from fedtune.tuning.policy_kinds import ONE_CONFIGURATION, PolicyKind, PolicySettings
from fedtune.tuning.space import SearchSpace, checked_number
from fedtune.tuning.trial import Compose, Draw, Trial, Tuner


class Budget(NamedTuple):
    """What a tuner may spend: rounds of one trial, and rounds of all trials together."""

    max_rounds: int
    total_rounds: int


@dataclass(frozen=True)
class TrialSource:
    """Where a tuner takes its trials from.

    `draw(n)` is trial number n. In a search it has random values; a tuner that trains one federation gets the fixed
    values of the settings.
    `compose(n, server, client)` is trial number n with values of `space` that the tuner has chosen itself.
    """

    draw: Draw
    compose: Compose
    space: SearchSpace
    seed: int


@dataclass(frozen=True)
class TunerKind:
    """A tuner, described for the rest of the program.

    `make(trials, budget, **options)` is the tuner, given a `TrialSource`, a `Budget`, and options of the right types.
    It must raise InputError if a value is out of its bounds, and must not draw a trial before the first `ask`: it is
    also called to check the options before a run.
    """

    make: Callable[..., Tuner]
    options: Mapping[str, type] = field(default_factory=dict)  # the tuner's own, each an int, float, bool or str
    policy: PolicyKind = ONE_CONFIGURATION  # what happens inside each trial, with options of its own
    searches: bool = True  # False: the tuner trains one federation, with the fixed values of the settings
    forgets_jobs: bool = False  # the tuner needs no report of a failed job that is not retried
    extendable: bool = False  # it draws `num_configs` configurations and is an `Extendable`: the number can be raised
    # Whether a trial that has had max_rounds rounds is never asked for again, given the options.
    ends_at_max_rounds: Callable[[Mapping[str, Any]], bool] = lambda options: True

    def parse(self, name: str, table: Mapping[str, Any], budget: Budget) -> "TunerSettings":
        """The settings in the table [tuner.NAME]. Raises InputError if one is not allowed."""
        checked = self.checked_options(name, table)
        own = {option: value for option, value in checked.items() if option in self.options}
        inside = {option: value for option, value in checked.items() if option in self.policy.options}
        return TunerSettings(name, self, own, self.policy.make(budget.max_rounds, **inside), budget)

    def checked_options(self, name: str, table: Mapping[str, Any]) -> dict[str, Any]:
        """The options in the table as values of their types; bounds are not checked here.

        Raises UnknownNameError for an option that the tuner doesn't have, and InputError for a wrong type.
        """
        known = {**self.options, **self.policy.options}
        for option in table:
            if option not in known:
                raise UnknownNameError(f"option of tuner {name}", option, known or ["none"])
        return {option: _checked(known[option], option, value) for option, value in table.items()}


@dataclass(frozen=True)
class TunerSettings:
    """One tuner of a run: its kind, its checked options, and its budget."""

    name: str
    kind: TunerKind
    options: Mapping[str, Any]  # the tuner's own
    policy: PolicySettings
    budget: Budget

    @property
    def ends_at_max_rounds(self) -> bool:
        """Whether a trial that has had max_rounds rounds is never asked for again."""
        return self.kind.ends_at_max_rounds(self.options)

    def make_tuner(self, trials: TrialSource) -> Tuner:
        """The tuner before its first ask. Raises InputError if an option is out of its bounds."""
        return self.kind.make(trials, self.budget, **self.options)

    def check(self, space: SearchSpace) -> None:
        """Raises InputError unless the tuner can be made for this space."""
        self.make_tuner(TrialSource(_no_trial, _no_trial, space, seed=0))


def _no_trial(number: int, *values: object) -> Trial:
    raise AssertionError("a tuner must not draw a trial before its first ask")


def _checked(kind: type, name: str, value: Any) -> Any:
    if kind is bool and not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, got {value!r}")
    return checked_number(name, value, integer=kind is int) if kind in (int, float) else kind(value)

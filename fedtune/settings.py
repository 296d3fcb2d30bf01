"""What a user can set, in TOML. An unknown key or an impossible value is one clear line.

Settings come in layers. A later layer overrides an earlier one: the defaults below, the settings that the data set
ships, a file, the command line. `fedtune.overlay` lays them over each other.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedtune.errors import InputError, UnknownNameError
from fedtune.overlay import FIXED, lay_over, merge

DEFAULT_CLIENT = "local_sgd"
NOT_IN_DIGEST = {
    "tuners",
    "seeds",
    "seed",
    "workers",
    "executor",
    "parallel_studies",
    "shares",
    "total_rounds",
    "extensions",
    "lost_clients",
    "watch",
}
# Settings that older runs lack. With these values they are not in the digest, so that older runs can be resumed.
LATER: dict[str, Any] = {
    "engine": "torch",
    "fixed_first": False,
    "server.max_examples": 10**9,
    "server.aggregation": "mean",
    "server.trim": 0.1,
    "server.byzantine": 1,
}

Count = Annotated[int, Field(ge=1, strict=True)]


class Table(BaseModel):
    """A TOML table in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ServerSettings(Table):
    """`[server]`: the server's optimiser, its guard against exploded updates, and how it aggregates the updates.

    `optimizer` is sgd, adam or yogi (Reddi et al. 2021, algorithm 2). `decay` is the fraction by which the learning
    rate shrinks each round. `learning_rate`, `momentum` and `decay` can be searched in `[space.server]`. An update is
    clipped to `clip_factor` times the cohort's median norm; 0 turns clipping off. A client that says it has more than
    `max_examples` examples in a part counts as lost.

    `aggregation` says what the server makes of the clipped updates. `mean` weighs clients by their training examples;
    the others are robust against a minority of arbitrary updates, and every client counts the same. `trimmed_mean`
    leaves out the fraction `trim` of the largest and of the smallest values of each weight. `krum` and `multi_krum`
    expect that at most `byzantine` clients of a round are arbitrary.
    """

    optimizer: Literal["sgd", "adam", "yogi"] = "sgd"
    learning_rate: float = Field(1.0, gt=0, allow_inf_nan=False)
    momentum: float = Field(0.0, ge=0, lt=1)
    decay: float = Field(0.0, ge=0, lt=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    tau: float = Field(1e-3, gt=0, allow_inf_nan=False)
    clip_factor: float = Field(3.0, ge=0, allow_inf_nan=False)
    max_examples: int = Field(10**9, ge=1, le=10**12, strict=True)  # float64 holds sums of such counts exactly
    aggregation: Literal["mean", "median", "trimmed_mean", "krum", "multi_krum"] = "mean"
    trim: float = Field(0.1, ge=0.001, lt=0.5)
    byzantine: Count = 1

    @property
    def fewest_updates(self) -> int:
        """The fewest usable updates of a round with which the aggregation can outvote one arbitrary update.

        For krum and multi_krum it is the fewest with which they can outvote `byzantine` arbitrary updates.
        """
        return {
            "mean": 1,
            "median": 3,
            "trimmed_mean": math.ceil(round(1 / self.trim, 9)),
            "krum": 2 * self.byzantine + 3,
            "multi_krum": 2 * self.byzantine + 3,
        }[self.aggregation]

    def num_trimmed(self, num_updates: int) -> int:
        """How many of the largest and how many of the smallest values the trimmed mean leaves out."""
        return math.floor(round(self.trim * num_updates, 9))  # 0.29 * 100 is a little less than 29


def _domain_or_word(value: Any) -> Any:
    if value != FIXED and not isinstance(value, Mapping):
        raise ValueError(f'must be a domain, such as {{uniform = [0.0, 0.5]}}, or "{FIXED}"')
    return value


DomainOrWord = Annotated[dict[str, Any] | Literal["fixed"], BeforeValidator(_domain_or_word)]


class SpaceSettings(Table):
    """`[space.client]` and `[space.server]`: what is searched, as `learning_rate = {log_uniform = [1e-4, 1.0]}`.

    They are laid over the search space that the data set or the client program ships, one hyperparameter at a time.
    With the word "fixed" in place of a domain, a hyperparameter is not searched. `only` names all that is searched, as
    ["client.learning_rate", "server.learning_rate"]. A hyperparameter with a value in the user's `[client]` or
    `[server]` is searched only if the user also gives its domain, or names it in `only`.
    """

    client: dict[str, DomainOrWord] = {}
    server: dict[str, DomainOrWord] = {}
    only: list[str] | None = Field(None, exclude=True)  # resolved settings have the word "fixed" instead


class EvaluationSettings(Table):
    """`[evaluation]`: the global model is evaluated every `every` rounds and at the end of each job.

    It is evaluated on `clients` clients, or on all if there are fewer. By default `every` is a twentieth of
    `max_rounds`, rounded up, and `clients` is "all". Every trial of a study is evaluated on the same clients.
    """

    every: Count | None = None
    clients: Annotated[Count | None, BeforeValidator(lambda clients: None if clients == "all" else clients)] = None


Quantity = Annotated[float, Field(strict=True)] | dict[str, Any]


class DevicesSettings(Table):
    """`[devices]`: what the clients' machines and the network do to rounds and jobs, in virtual time.

    A round takes `round_time`, and then the time that its clients need to download the weights, to train
    (`seconds_per_example` for each example and epoch) and to upload. Speeds are bytes a second. A number holds for
    every client; a distribution such as {log_normal = [median, sigma]} or {uniform = [low, high]} gives each client its
    own number. In a round, a client can be asked with probability `availability`. A client that was asked drops out
    with probability `drop_out`. The server asks more clients than `cohort_size`, by the fraction `over_selection`, and
    waits until `deadline` at most.

    A job takes 1 + |z| times as long; z is normal with standard deviation `straggler_std`. An attempt at a job fails
    with probability `drop_probability` in each unit of time. `on_drop` decides what then happens to the job: it is
    tried again (`retry`), forgotten (`lose`), or reported with the worst error (`worst`).
    """

    round_time: float = Field(1.0, ge=0, allow_inf_nan=False)
    seconds_per_example: Quantity = 0.0
    download_speed: Quantity = float("inf")
    upload_speed: Quantity = float("inf")
    availability: Quantity = 1.0
    drop_out: float = Field(0.0, ge=0, lt=1)
    deadline: float = Field(float("inf"), gt=0)
    over_selection: float = Field(0.0, ge=0, allow_inf_nan=False)
    straggler_std: float = Field(0.0, ge=0, allow_inf_nan=False)
    drop_probability: float = Field(0.0, ge=0, lt=1)
    on_drop: Literal["retry", "lose", "worst"] = "retry"


class WatchSettings(Table):
    """`[watch]`: what happens, in real time, if a client's task does not end.

    After `warn_after` seconds a warning names the client, and again each time that the seconds have doubled; 0 turns
    the warnings off. A task that takes `limit` seconds stops the run, which can be resumed (`at_limit` "stop"), or the
    run goes on without its client, as if it was resumed with --lose-client ("lose"). There is no limit by default. A
    limit needs the pool: in one process a client can't be ended.
    """

    warn_after: float = Field(60.0, ge=0, allow_inf_nan=False)
    limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    at_limit: Literal["stop", "lose"] = "stop"


class ExtensionSettings(Table):
    """`[[extensions]]`: how a finished study was extended: more configurations, a larger budget, or both."""

    num_configs: Count | None = None
    total_rounds: Count


class Settings(Table):
    """Everything that decides a run. `workers`, `executor` and `device` say where it is computed.

    With `fixed_first`, trial 0 of every search has the fixed values of `[client]` and `[server]`. The tuners within one
    federation, such as `fedex`, always start from these values. `compare` sets it (`fedtune.layers`).

    So many studies as `parallel_studies` says are computed at once; that changes no number. A study gets workers in
    proportion to its tuner's number in `shares` (1 if the tuner has none), but no more than it can use. With
    `precision` bf16, clients train with torch's autocast to bfloat16, which changes the numbers. Weights, means of
    weights and all errors stay float32.

    With `engine` "auto", clients train in the compiled kernel of their client program if that is possible here, else in
    torch; "compiled" requires the kernel, and "torch" does without it. The results of the two differ by rounding. A run
    decides once, and its settings.toml says "torch" or "compiled".

    The clients whose ids are in `lost_clients` fail in every round that is trained from now on, and in every evaluation
    after local training.
    """

    tuners: list[str] = ["manual", "random", "asha", "fedex"]
    seeds: int = Field(1, ge=1, le=10_000, strict=True)
    seed: int = Field(0, ge=0, lt=2**62, strict=True)
    max_rounds: Count = 81
    total_rounds: Count = 405
    cohort_size: Count = 10
    parallel_trials: Count = 4
    fixed_first: bool = Field(False, strict=True)
    parallel_studies: Count = 1
    shares: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    workers: int = Field(0, ge=0, le=1024, strict=True)
    device: str = "cpu"
    executor: Literal["auto", "serial", "pool", "batched"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    engine: Literal["auto", "torch", "compiled"] = "auto"
    data: dict[str, Any]
    model: dict[str, Any] = {"name": "mlp"}
    client: dict[str, Any] = {}
    server: ServerSettings = ServerSettings()
    space: SpaceSettings = SpaceSettings()
    tuner: dict[str, dict[str, Any]] = {}
    evaluation: EvaluationSettings = EvaluationSettings()
    devices: DevicesSettings = DevicesSettings()
    watch: WatchSettings = WatchSettings()
    extensions: list[ExtensionSettings] = []
    lost_clients: list[str] = []

    @field_validator("data", "model")
    @classmethod
    def _has_a_name(cls, table: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(table.get("name"), str):
            raise ValueError("needs a name")
        return table

    @field_validator("client")
    @classmethod
    def _has_a_name_that_is_text(cls, table: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(table.get("name", ""), str):
            raise ValueError("must have a name that is text, if it has one")
        return table

    @field_validator("tuners")
    @classmethod
    def _each_tuner_once(cls, tuners: list[str]) -> list[str]:
        if not tuners or len(set(tuners)) < len(tuners):
            raise ValueError("must name one tuner or more, each once")
        return tuners

    @model_validator(mode="after")
    def _budget_pays_for_one_trial(self) -> "Settings":
        if self.total_rounds < self.max_rounds:
            raise ValueError(
                f"total_rounds must be at least max_rounds ({self.max_rounds}), got {self.total_rounds}: "
                "a tuner may spend no less than one configuration needs"
            )
        totals = [self.total_rounds, *(extension.total_rounds for extension in self.extensions)]
        if totals != sorted(totals):
            raise ValueError(f"total_rounds must not fall from one extension to the next, got {totals}")
        return self

    @model_validator(mode="after")
    def _cohort_suffices_for_its_aggregation(self) -> "Settings":
        server = self.server
        if self.cohort_size < server.fewest_updates:
            options = {"trimmed_mean": "trim", "krum": "byzantine", "multi_krum": "byzantine"}
            option = options.get(server.aggregation)
            with_option = f" with server.{option} {getattr(server, option)}" if option else ""
            raise ValueError(
                f"cohort_size must be at least {server.fewest_updates} for server.aggregation {server.aggregation!r}"
                f"{with_option}, got {self.cohort_size}"
            )
        return self

    @property
    def last_total_rounds(self) -> int:
        """The rounds that a tuner may have spent at the end of all extensions."""
        return self.extensions[-1].total_rounds if self.extensions else self.total_rounds

    @property
    def studies(self) -> list[tuple[str, int]]:
        """Each study's tuner and seed, seed by seed."""
        return [(tuner, seed) for seed in range(self.seed, self.seed + self.seeds) for tuner in self.tuners]

    @property
    def batches_clients(self) -> bool:
        """Whether clients train in one tensor program: its numbers differ from other executors' numbers by rounding."""
        return self.executor == "batched" or (self.executor == "auto" and self.device != "cpu")

    @property
    def evaluate_every(self) -> int:
        """Rounds between evaluations of the global model."""
        return self.evaluation.every or -(-self.max_rounds // 20)


def resolve(layers: Iterable[Mapping[str, Any]], shipped: Iterable[Mapping[str, Any]] = ()) -> Settings:
    """The settings of the merged layers, checked. Raises InputError, one line.

    `layers` are the user's, and `shipped` the layers below them: what the data set and the client program bring.
    """
    below, given = merge(shipped), merge(layers)
    try:
        settings = Settings.model_validate(merge([below, given]))
    except ValidationError as error:
        raise input_error(error, Settings, "setting") from None
    return settings.model_copy(update={"space": SpaceSettings.model_validate(lay_over(below, given))})


def input_error(error: ValidationError, model: type[BaseModel], kind: str) -> InputError:
    """The first of the errors, in one line; `kind` is the word for a field of the model, such as "setting"."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    name = ".".join(location)
    if first["type"] == "extra_forbidden":
        table: Any = model
        for part in location[:-1]:
            table = table.model_fields[part].annotation
        prefix = "".join(part + "." for part in location[:-1])
        return UnknownNameError(kind, name, [prefix + field for field in table.model_fields])
    if first["type"] == "missing":
        return InputError(f"the {kind} {name} is missing")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    message = (
        message.partition(" or instance of ")[0].replace("valid dictionary", "table").replace("valid list", "list")
    )
    if not location:
        return InputError(message)
    return InputError(f"{name} {message.replace('should', 'must')}, got {first['input']!r}")


def deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide a study's numbers, as they are written to JSON; its budget does not count."""
    fields = settings.model_dump(mode="json", exclude=NOT_IN_DIGEST)
    for name, default in LATER.items():
        table, _, key = name.rpartition(".")
        held = fields[table] if table else fields
        if held[key] == default:
            del held[key]
    if settings.batches_clients:
        fields["batched"] = True
    return fields


def digest(settings: Settings) -> str:
    """A fingerprint of the settings that decide a study's numbers."""
    return hashlib.sha256(json.dumps(deciding(settings), sort_keys=True).encode()).hexdigest()[:16]


def client_program_name(settings: Settings) -> str:
    """The name of the client program, an installed one or a file."""
    return str(settings.client.get("name", DEFAULT_CLIENT))

"""The server's strategy: federated averaging, a server optimiser, and a policy over a pool of client configurations.

Algorithm 7 (FedEx) with Flower's two halves of a round: `configure_train` does lines 2 to 4, the clients lines 5 and 6,
`aggregate_train` lines 8 to 10 (see `fedtune.tuning.fedex`). Elimination and its like take FedEx's place as another
policy. A pool of one configuration is plain federated averaging.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedtune import rng
from fedtune.errors import InputError
from fedtune.server import fedavg, optimizers
from fedtune.server import messages as protocol
from fedtune.server.flower_compat import fill, pack
from fedtune.settings import ServerSettings
from fedtune.tuning import fedex
from fedtune.tuning.policy import Policy
from fedtune.tuning.trial import Trial


@dataclass(frozen=True)
class RoundPlan:
    """What the server remembers of a round between sending and aggregating."""

    server_round: int
    weights: torch.Tensor
    nodes: list[int]  # in client order
    drawn: np.ndarray  # (client, factor): the configuration of each


class FedTuneStrategy(Strategy):
    """FedAvg with a server optimiser, for one trial whose configurations a policy hands out.

    All randomness comes from streams keyed by `seed`.
    `nodes` are the nodes in client order; None means by ascending node id. `cohort_of` gives a round's clients,
    ascending; None draws `cohort_size` of them. Every `evaluate_every` rounds Flower's own
    loop has all of them evaluate the weights. Between rounds the whole state is `optimizer_state` and the policy's;
    the weights travel as Flower's ArrayRecord, one flat float32 array called "weights".
    """

    def __init__(
        self,
        trial: Trial,
        settings: ServerSettings,
        policy: Policy,
        *,
        cohort_size: int,
        seed: int,
        nodes: Sequence[int] | None = None,
        evaluate_every: int = 1,
        cohort_of: Callable[[int], list[int]] | None = None,
    ) -> None:
        self.trial = trial
        self.settings = settings
        self.policy = policy
        self.cohort_size = cohort_size
        self.seed = seed
        self.optimizer_state: optimizers.OptimizerState | None = None
        self._nodes = nodes
        self._evaluate_every = evaluate_every
        self._cohort_of = cohort_of
        self._plan: RoundPlan | None = None
        self.lost_reasons: list[str] = []  # what the last round's lost clients said

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages: the shared weights, and for each client its own configuration and seed."""
        all_nodes = self._nodes_in_client_order(grid)
        clients = self._cohort_of(server_round) if self._cohort_of else self._cohort(server_round, len(all_nodes))
        nodes = [all_nodes[client] for client in clients]
        drawn = self.policy.draw(rng.stream(self.seed, "policy", self.trial.number, server_round), len(nodes))  # 4
        self._plan = RoundPlan(server_round, torch.from_numpy(arrays["weights"].numpy()), nodes, drawn)
        return [
            Message(
                fill(
                    RecordDict(), {"arrays": arrays, "config": self._client_config(config, server_round, client, row)}
                ),
                dst_node_id=node,
                message_type=MessageType.TRAIN,
            )  # 3
            for client, node, row in zip(clients, nodes, drawn, strict=True)
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new weights and the round's numbers; without a usable update the weights stay as they were."""
        plan = self._plan
        assert plan is not None
        assert plan.server_round == server_round
        replies = list(replies)
        self.lost_reasons = sorted(reply.error.reason or "" for reply in replies if reply.has_error())
        answers = _in_order(replies, plan.nodes)
        metrics = [protocol.metrics(reply) for reply in answers.values()]
        updates = [protocol.weights(reply) for reply in answers.values()]
        num_train = _column(metrics, "num_train").astype(np.int64)
        mean = fedavg.average(plan.weights, updates, num_train, self.settings.clip_factor)
        weights = plan.weights
        if mean.weights is not None:
            state = self.optimizer_state or optimizers.init(plan.weights)
            weights, self.optimizer_state = optimizers.update(
                self.settings.optimizer, state, plan.weights, mean.weights, self.trial.server, server_round
            )  # 8
        self._update_policy(plan, list(answers), metrics, mean.dropped)  # 9, 10
        entropy = fedex.entropy(self.policy.probabilities()) if self.trial.num_configs > 1 else float("nan")
        return pack(weights.numpy()), MetricRecord(
            {
                "cohort": len(plan.nodes),
                "lost": len(plan.nodes) - len(answers),
                "dropped": int(mean.dropped.sum()),
                "clipped": int(mean.clipped.sum()),
                "error": _mean(metrics, "error"),
                "loss": _mean(metrics, "loss"),
                "entropy": entropy,
            }
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages that ask every node for the errors of the global weights on its validation and test parts."""
        if server_round % self._evaluate_every != 0:
            return []
        content = RecordDict({"arrays": arrays, "config": config})
        return [
            Message(content, dst_node_id=node, message_type=MessageType.EVALUATE)
            for node in self._nodes_in_client_order(grid)
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' errors and losses, weighted by their numbers of examples; None if nobody answered."""
        replies = list(replies)
        nodes = self._nodes or sorted(reply.metadata.src_node_id for reply in replies)
        metrics = [protocol.metrics(reply) for reply in _in_order(replies, nodes).values()]
        if not metrics:
            return None
        return MetricRecord(
            {
                name: float(np.average(_column(metrics, name), weights=_column(metrics, f"num_{part}")))
                for part in ("validation", "test")
                for name in (f"{part}_error", f"{part}_loss")
            }
        )

    def summary(self) -> None:
        """Nothing: the run folder's settings.toml says it all."""

    def _nodes_in_client_order(self, grid: Grid) -> Sequence[int]:
        if self._nodes is not None:
            return self._nodes
        nodes = grid.get_node_ids()
        return nodes if isinstance(nodes, range) else sorted(nodes)

    def _cohort(self, server_round: int, num_clients: int) -> list[int]:
        if self.cohort_size > num_clients:
            raise InputError(
                f"cohort_size must be at most the number of clients, {num_clients}, got {self.cohort_size}"
            )
        # Keyed by the round alone: every trial and every tuner meets the same cohorts.
        chosen = rng.stream(self.seed, "cohort", server_round).choice(num_clients, self.cohort_size, replace=False)
        return sorted(chosen.tolist())

    def _client_config(self, config: ConfigRecord, server_round: int, client: int, drawn: np.ndarray) -> ConfigRecord:
        return protocol.train_config(
            config,
            fedex.expand(self.policy.pool, drawn),
            rng.derived_seed(self.seed, "client", self.trial.number, server_round, client),
            error_before=self.policy.needs_error_before,
        )

    def _update_policy(
        self, plan: RoundPlan, answered: list[int], metrics: list[MetricRecord], dropped: np.ndarray
    ) -> None:
        """Tells the policy of the whole cohort: a dropped update has the error NaN, a lost client no examples."""
        signal = self.policy.signal
        error, before = np.full(len(plan.nodes), np.nan), np.full(len(plan.nodes), np.nan)
        num_validation = np.zeros(len(plan.nodes), np.int64)
        error[answered] = np.where(dropped, np.nan, _column(metrics, signal))
        num_validation[answered] = _column(metrics, "num_validation")
        if self.policy.needs_error_before:
            before[answered] = _column(metrics, f"{signal}_before")
        self.policy.update(plan.drawn, error, num_validation, before if self.policy.needs_error_before else None)


def _in_order(replies: Iterable[Message], nodes: Sequence[int]) -> dict[int, Message]:
    """The replies with content by their node's position in `nodes`, ascending: sums do not depend on who was first."""
    position = {node: index for index, node in enumerate(nodes)}
    answers = {position[reply.metadata.src_node_id]: reply for reply in replies if reply.has_content()}
    return {index: answers[index] for index in sorted(answers)}


def _column(metrics: list[MetricRecord], name: str) -> np.ndarray:
    return np.array([float(record[name]) for record in metrics])  # type: ignore[arg-type]


def _mean(metrics: list[MetricRecord], name: str) -> float:
    """The mean by validation examples over the clients whose value is finite; NaN if there is none."""
    values, sizes = _column(metrics, name), _column(metrics, "num_validation")
    finite = np.isfinite(values)
    return float(np.average(values[finite], weights=sizes[finite])) if sizes[finite].sum() > 0 else float("nan")

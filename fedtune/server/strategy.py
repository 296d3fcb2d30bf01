"""The server's strategy: federated averaging, a server optimiser, and a policy over a pool of client configurations.

This is algorithm 7 (FedEx, see `fedtune.tuning.fedex`) in Flower's two halves of a round: `configure_train` does lines
2 to 4. The clients train (line 5), and report their weights and their errors F_k. `aggregate_train` does line 8, and
the policy's `update` does lines 6, 9 and 10: the server computes the gradients of line 6 from the errors. Elimination
and other policies can take the place of FedEx. A pool of one configuration is plain federated averaging.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedtune import rng
from fedtune.client.tasks import Metrics
from fedtune.errors import InputError
from fedtune.server import messages as protocol
from fedtune.server import optimizers
from fedtune.server.aggregation import aggregate
from fedtune.server.flower_compat import addressed, fill, pack
from fedtune.server.metrics import column, evaluation_means, finite_mean
from fedtune.server.replies import evaluation_ranges, good_answers, metrics_in, training_ranges, update_in
from fedtune.settings import ServerSettings
from fedtune.tuning.policy import Policy, entropy, expand, with_prefix
from fedtune.tuning.trial import Trial


class SentRound(NamedTuple):
    """What the server remembers of a round between sending the messages and aggregating the replies."""

    server_round: int
    weights: torch.Tensor
    nodes: list[int | None]  # the cohort's, in client order
    drawn: np.ndarray  # (client, factor): the configuration of each client
    messages: list[Metadata]  # of those that were sent


class RoundOutcome(NamedTuple):
    """What happened in a round to the clients that were sent messages."""

    cohort: int  # clients that were sent a message
    failed: int  # clients without a reply, with a bad one, or whose program raised
    rejected: int  # updates that did not count
    clipped: int  # updates that were scaled down
    error: float  # mean validation error after local training, over the clients whose error is finite; NaN if none is
    loss: float  # likewise
    entropy: float  # of theta, in nats; NaN if the pool has one configuration
    failures: list[str]  # what the failed clients reported, and what was wrong with bad replies, sorted


class FedTuneStrategy(Strategy):
    """FedAvg with a server optimiser, for one trial; a policy chooses each client's configuration.

    All randomness comes from streams keyed by `seed`. `nodes` are the nodes in client order; None means by ascending
    node id, and a client whose node is None is always lost. Flower calls `configure_train`, which draws a cohort of
    `cohort_size` clients; a simulation, which knows the cohort, calls `configure_cohort`. On real nodes all of them
    evaluate the weights every `evaluate_every` rounds. Every reply is checked, see `fedtune.server.replies`; the data
    set's `objective` decides which errors are possible. `outcome` says what happened in the last round, and
    `evaluation_failures` what was wrong with replies to the last evaluation. Between rounds the whole state is
    `optimizer_state` and the policy's state. The weights travel as Flower's ArrayRecord, one flat float32 array called
    "weights".
    """

    def __init__(
        self,
        trial: Trial,
        settings: ServerSettings,
        policy: Policy,
        *,
        cohort_size: int,
        seed: int,
        nodes: Sequence[int | None] | None = None,
        evaluate_every: int = 1,
        objective: str = "classification",
    ) -> None:
        self.trial = trial
        self.settings = settings
        self.policy = policy
        self.cohort_size = cohort_size
        self.seed = seed
        self.optimizer_state: optimizers.OptimizerState | None = None
        self._nodes = nodes
        self._evaluate_every = evaluate_every
        self._objective = objective
        self._sent: SentRound | None = None
        self._evaluating: list[Metadata] = []  # of the messages of the last evaluation
        self.outcome: RoundOutcome | None = None  # of the last round
        self.evaluation_failures: list[str] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The messages to a cohort that is drawn at random."""
        cohort = self._cohort(server_round, len(self._nodes_in_client_order(grid)))
        return self.configure_cohort(server_round, cohort, arrays, config, grid)

    def configure_cohort(
        self, server_round: int, cohort: Sequence[int], arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """The messages to the clients of the cohort, ascending: the weights, and each one's configuration and seed."""
        all_nodes = self._nodes_in_client_order(grid)
        nodes = [all_nodes[client] for client in cohort]
        drawn = self.policy.draw(rng.stream(self.seed, "policy", self.trial.number, server_round), len(nodes))  # 4
        configs = self._client_configs(config, server_round, cohort, drawn)
        messages: list[Message] = []
        for node, client_config in zip(nodes, configs, strict=True):
            if node is None:
                continue
            content = fill(RecordDict(), {"arrays": arrays, "config": client_config})
            messages.append(
                addressed(messages[0], content, node)
                if messages
                else Message(content, dst_node_id=node, message_type=MessageType.TRAIN)
            )  # 3
        weights, metadata = torch.from_numpy(arrays["weights"].numpy()), [message.metadata for message in messages]
        self._sent = SentRound(server_round, weights, nodes, drawn, metadata)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new weights and the round's numbers; without a usable update the weights stay as they were."""
        sent = self._sent
        assert sent is not None
        assert sent.server_round == server_round
        # Read the good replies in client order: so sums do not depend on which reply came first.
        ranges = training_ranges(
            self._objective, self.settings.max_examples, error_before=self.policy.needs_error_before
        )
        num_weights = len(sent.weights)
        answers, failures = good_answers(replies, sent.messages, lambda reply: update_in(reply, num_weights, ranges))
        answered = [index for index, node in enumerate(sent.nodes) if node in answers]
        metrics = [update.metrics for update in answers.values()]
        updates = [update.weights for update in answers.values()]
        # Move the weights and the policy.
        mean = aggregate(sent.weights, updates, column(metrics, "num_train"), self.settings)
        weights = sent.weights
        if mean.weights is not None:
            state = self.optimizer_state or optimizers.init(sent.weights)
            weights, self.optimizer_state = optimizers.update(
                self.settings.optimizer, state, sent.weights, mean.weights, self.trial.server, server_round
            )  # 8
        self._update_policy(sent, answered, metrics, mean.rejected)  # 9, 10
        # Say what happened.
        self.outcome = RoundOutcome(
            cohort=len(sent.nodes),
            failed=len(sent.nodes) - len(answers),
            rejected=int(mean.rejected.sum()),
            clipped=int(mean.clipped.sum()),
            error=finite_mean(metrics, "error"),
            loss=finite_mean(metrics, "loss"),
            entropy=entropy(self.policy.probabilities()) if self.trial.num_configs > 1 else float("nan"),
            failures=sorted(failures),
        )
        return pack(weights.numpy()), _as_metrics(self.outcome)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages that ask every node for the global weights' errors on its validation and test parts."""
        due = server_round % self._evaluate_every == 0
        content = RecordDict({"arrays": arrays, "config": config})
        messages = [
            Message(content, dst_node_id=node, message_type=MessageType.EVALUATE)
            for node in (self._nodes_in_client_order(grid) if due else [])
            if node is not None
        ]
        self._evaluating = [message.metadata for message in messages]
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' errors and losses, weighted by their numbers of examples; None if there is no good reply."""
        ranges = evaluation_ranges(self._objective, self.settings.max_examples)
        answers, failures = good_answers(replies, self._evaluating, lambda reply: metrics_in(reply, ranges))
        self.evaluation_failures = sorted(failures)
        return MetricRecord({**evaluation_means(list(answers.values()))}) if answers else None

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state between rounds, as a checkpoint holds it."""
        moments = self.optimizer_state._asdict() if self.optimizer_state else {}
        return {
            **{f"optimizer.{name}": moment.numpy() for name, moment in moments.items()},
            **{f"policy.{name}": array for name, array in self.policy.to_arrays().items()},
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continues from the state in a checkpoint, bit for bit. A part that it lacks stays as it is."""
        if moments := with_prefix(arrays, "optimizer."):
            tensors = {name: torch.from_numpy(moment) for name, moment in moments.items()}
            self.optimizer_state = optimizers.OptimizerState(**tensors)
        if policy := with_prefix(arrays, "policy."):
            self.policy.restore(policy)

    def summary(self) -> None:
        """Logs nothing, though Flower asks for it: the run folder's settings.toml has all settings."""

    def _nodes_in_client_order(self, grid: Grid) -> Sequence[int | None]:
        if self._nodes is not None:
            return self._nodes
        nodes = grid.get_node_ids()
        return nodes if isinstance(nodes, range) else sorted(nodes)

    def _cohort(self, server_round: int, num_clients: int) -> list[int]:
        if self.cohort_size > num_clients:
            raise InputError(
                f"cohort_size must be at most the number of clients, {num_clients}, got {self.cohort_size}"
            )
        # Keyed by the round only, so that every trial and every tuner has the same cohorts.
        chosen = rng.stream(self.seed, "cohort", server_round).choice(num_clients, self.cohort_size, replace=False)
        return sorted(chosen.tolist())

    def _client_configs(
        self, config: ConfigRecord, server_round: int, cohort: Sequence[int], drawn: np.ndarray
    ) -> list[ConfigRecord]:
        """The record "config" of each client's message."""
        seeds = rng.derived_seeds(self.seed, "client", self.trial.number, server_round, last_keys=cohort)
        first: dict[tuple[int, ...], ConfigRecord] = {}  # of the clients that drew the same configuration
        configs = []
        for row, seed in zip(map(tuple, drawn.tolist()), seeds, strict=True):
            if row in first:
                configs.append(protocol.with_seed(first[row], seed))
                continue
            first[row] = protocol.train_config(
                config, expand(self.policy.pool, np.array(row)), seed, error_before=self.policy.needs_error_before
            )
            configs.append(first[row])
        return configs

    def _update_policy(
        self, sent: SentRound, answered: list[int], metrics: list[Metrics], rejected: np.ndarray
    ) -> None:
        """Reports the whole cohort to the policy: a rejected update has the error NaN, a failed client no examples."""
        signal = self.policy.signal
        error, before = np.full(len(sent.nodes), np.nan), np.full(len(sent.nodes), np.nan)
        num_validation = np.zeros(len(sent.nodes))
        error[answered] = np.where(rejected, np.nan, column(metrics, signal))
        num_validation[answered] = column(metrics, "num_validation")
        if self.policy.needs_error_before:
            before[answered] = column(metrics, f"{signal}_before")
        self.policy.update(sent.drawn, error, num_validation, before if self.policy.needs_error_before else None)


def _as_metrics(outcome: RoundOutcome) -> MetricRecord:
    """The outcome as Flower logs it, under the names of the columns of rounds.parquet."""
    return MetricRecord(
        {
            "cohort": outcome.cohort,
            "lost": outcome.failed,
            "dropped": outcome.rejected,
            "clipped": outcome.clipped,
            "error": outcome.error,
            "loss": outcome.loss,
            "entropy": outcome.entropy,
        }
    )

"""One federation in training: the body of a trial.

`advance` and `personalise` are generators that yield the executor's ticket they wait for, so that a study can keep many
federations in flight at once and the executor always has work of several to choose from.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord
from jaxtyping import Float, Int

from fedtune import rng
from fedtune.client.tasks import Executor, Failure, Metrics, PersonaliseTask
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.server.flower_compat import pack
from fedtune.server.optimizers import OptimizerState
from fedtune.server.strategy import FedTuneStrategy
from fedtune.simulation.devices import RoundPlan
from fedtune.simulation.evaluation import Evaluation, combine, evaluation_tasks, flatten
from fedtune.simulation.grid import ExecutorGrid
from fedtune.simulation.records import RoundRecord
from fedtune.tuning import fedex
from fedtune.tuning.space import Config
from fedtune.tuning.trial import Pool


class Federation:
    """The weights, the server's state and the round of one trial.

    `plan_of` says of a round who takes part; `on_round` is called after each one.
    """

    def __init__(
        self,
        strategy: FedTuneStrategy,
        weights: Float[torch.Tensor, "weight"],
        dataset: FederatedDataset,
        executor: Executor,
        evaluation_clients: Int[np.ndarray, "client"],
        plan_of: Callable[[int], RoundPlan],
        on_round: Callable[["Federation", RoundRecord], None],
    ) -> None:
        self.strategy = strategy
        self.trial = strategy.trial
        self.weights = weights
        self.round = 0
        self.grid = ExecutorGrid(executor, dataset.num_clients)
        self._dataset = dataset
        self._executor = executor
        self._clients = evaluation_clients
        self._plan_of = plan_of
        self._on_round = on_round

    def advance(self, to_round: int, evaluate_every: int) -> Iterator[int]:
        """Trains until `to_round` rounds are done; evaluates every `evaluate_every` rounds and after the last."""
        while self.round < to_round:
            self.round += 1
            arrays = pack(self.weights.numpy())
            message_ids = self.grid.push_messages(
                self.strategy.configure_train(self.round, arrays, ConfigRecord(), self.grid)
            )
            if message_ids:  # nobody is asked where no client is in time
                yield self.grid.ticket(message_ids)
            replies = self.grid.pull_messages(message_ids)
            new_arrays, metrics = self.strategy.aggregate_train(self.round, replies)
            assert new_arrays is not None
            assert metrics is not None
            self.weights = torch.from_numpy(new_arrays["weights"].numpy())
            evaluation = None
            if self.round % evaluate_every == 0 or self.round == to_round:
                ticket = self._executor.submit(
                    self.weights, evaluation_tasks(self._dataset, self._clients), self.grid.order
                )
                yield ticket
                evaluation = combine(flatten(self._take(ticket)))
            self._record(dict(metrics), evaluation)
        self.grid.release()

    def personalise(self, config_of: Callable[[int], Config], into: list[Evaluation]) -> Iterator[int]:
        """Appends the evaluation after local training with `config_of(client)`, each client from the global weights.

        A client whose program raises counts as wrong on every example.
        """
        tasks = [
            PersonaliseTask(
                client,
                config_of(client),
                rng.derived_seed(self.strategy.seed, "personalise", self.trial.number, self.round, client),
            )
            for client in self._clients.tolist()
        ]
        ticket = self._executor.submit(self.weights, tasks, self.grid.order)
        yield ticket
        results = zip(tasks, self._take(ticket), strict=True)
        into.append(
            combine(
                [
                    self._all_wrong(task.client) if isinstance(result, Failure) else flatten([result])[0]
                    for task, result in results
                ]
            )
        )

    def sampled_config(self, client: int) -> Config:
        """The configuration that a client draws from theta for its own personalisation (Algorithm 7's result)."""
        draws = rng.stream(self.strategy.seed, "personalise", self.trial.number, self.round, client)
        return fedex.expand(self.strategy.policy.pool, self.strategy.policy.draw(draws, 1)[0])

    def best_config(self) -> Config:
        """The configuration with the largest probability."""
        return fedex.expand(self.strategy.policy.pool, np.array(self.strategy.policy.best()))

    def pool(self) -> Pool:
        """What theta weighs now."""
        return self.strategy.policy.pool

    def theta(self) -> tuple[Float[np.ndarray, "_"], ...]:
        """The distribution over the pool, one array a factor."""
        return self.strategy.policy.probabilities()

    def arrays(self) -> dict[str, np.ndarray]:
        """The state to checkpoint."""
        moments = self.strategy.optimizer_state
        return {
            "round": np.array(self.round),
            "weights": self.weights.numpy(),
            **({f"optimizer.{name}": moment.numpy() for name, moment in moments._asdict().items()} if moments else {}),
            **{f"policy.{name}": array for name, array in self.strategy.policy.to_arrays().items()},
        }

    def heritage(self) -> dict[str, np.ndarray]:
        """The state that a copy of this trial starts from: all but the policy's, which is of this trial's own pool."""
        return {name: array for name, array in self.arrays().items() if not name.startswith("policy.")}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from a checkpoint."""
        self.round = int(arrays["round"])
        self.weights = torch.from_numpy(arrays["weights"])
        moments = _with_prefix(arrays, "optimizer.")
        if moments:
            self.strategy.optimizer_state = OptimizerState(**{n: torch.from_numpy(a) for n, a in moments.items()})
        if policy := _with_prefix(arrays, "policy."):
            self.strategy.policy.restore(policy)

    def _take(self, ticket: int) -> list[Any]:
        results = self._executor.collect(ticket)
        self._executor.release(ticket)
        return results

    def _record(self, metrics: dict[str, Any], evaluation: Evaluation | None) -> None:
        answered = metrics["cohort"] - metrics["lost"]
        plan = self._plan_of(self.round)
        record = RoundRecord(
            round=self.round,
            asked=plan.asked,
            late=plan.late,
            left=plan.left,
            unavailable=plan.unavailable,
            client_updates=answered,
            bytes=self.weights.nbytes * (plan.asked + answered),
            evaluation=evaluation,
            **metrics,
        )
        self._on_round(self, record)

    def _all_wrong(self, client: int) -> Metrics:
        _, validation, test = (self._dataset.ranges[client, :, 1] - self._dataset.ranges[client, :, 0]).tolist()
        error, loss = (fedex.worst_error(signal, self._dataset.spec.num_classes) for signal in ("error", "loss"))
        return {
            **{"num_validation": validation, "validation_error": error, "validation_loss": loss},
            **{"num_test": test, "test_error": error, "test_loss": loss},
        }


def _with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}

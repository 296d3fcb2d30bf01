"""One federation in training: the body of a trial.

A generator here yields the executor's ticket that it waits for, and is resumed once that ticket is finished. So a study
can keep many federations in flight at once, and the executor always has work of several to choose from.
"""

from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord
from jaxtyping import Float, Int

from fedtune import rng
from fedtune.client.tasks import Executor, Failure, Metrics, PersonaliseTask, Ticket
from fedtune.data.federated_dataset import FederatedDataset
from fedtune.server.flower_compat import pack
from fedtune.server.strategy import FedTuneStrategy, RoundOutcome
from fedtune.simulation.devices import Devices, RoundPlan
from fedtune.simulation.evaluation import combine, evaluation_tasks, flatten
from fedtune.simulation.grid import ExecutorGrid
from fedtune.simulation.records import Evaluation, RoundRecord
from fedtune.tuning.feedback import worst_error
from fedtune.tuning.policy import expand
from fedtune.tuning.space import Config
from fedtune.tuning.trial import Pool


class Federation:
    """The weights, the server's state and the round of one trial.

    `on_round` is called after each round. If the executor has work of several federations, it does the work of the one
    with the smallest `order` first. `lost_in` gives the numbers of the lost clients in a round; they fail. `study` is
    the beginning of a place in the run, for messages.
    """

    def __init__(
        self,
        strategy: FedTuneStrategy,
        weights: Float[torch.Tensor, "weight"],
        dataset: FederatedDataset,
        executor: Executor,
        evaluation_clients: Int[np.ndarray, "client"],
        devices: Devices,
        on_round: Callable[["Federation", RoundRecord], None],
        order: float = 0.0,
        lost_in: Callable[[int], Collection[int]] = lambda server_round: (),
        study: str = "",
    ) -> None:
        self.strategy = strategy
        self.trial = strategy.trial
        self.weights = weights
        self.round = 0
        self._grid = ExecutorGrid(executor, dataset.num_clients, order)
        self._dataset = dataset
        self._executor = executor
        self._clients = evaluation_clients
        self._devices = devices
        self._on_round = on_round
        self._order = order
        self._lost_in = lost_in
        self._study = study

    def advance(self, to_round: int, evaluate_every: int) -> Iterator[Ticket]:
        """Trains until `to_round` rounds are done; evaluates every `evaluate_every` rounds and after the last.

        A round is evaluated and recorded while the clients of the next round train.
        """
        last_round: Iterator[Ticket] = iter(())  # what is left to do of it
        for server_round in range(self.round + 1, to_round + 1):
            # Let the clients train that the devices let take part.
            plan = self._devices.plan(self.trial, server_round)
            arrays = pack(self.weights.numpy())
            self._grid.lost_clients, self._grid.place = self._lost_in(server_round), self._place(server_round)
            message_ids = self._grid.push_messages(
                self.strategy.configure_cohort(server_round, plan.cohort, arrays, ConfigRecord(), self._grid)
            )
            trained = self._grid.ticket(message_ids)
            yield from last_round
            if trained is not None:  # without a client in time there is nothing to wait for
                yield trained
            # Aggregate their replies.
            new_arrays, _ = self.strategy.aggregate_train(server_round, self._grid.pull_messages(message_ids))
            assert new_arrays is not None
            self.weights = torch.from_numpy(new_arrays["weights"].numpy())
            self.round = server_round
            # Evaluate the new weights.
            evaluating = None
            if server_round % evaluate_every == 0 or server_round == to_round:
                tasks = evaluation_tasks(self._dataset, self._clients)
                evaluating = self._executor.submit(self.weights, tasks, self._order, self._place(server_round))
            last_round = self._end_round(plan, evaluating)
        yield from last_round
        self._grid.release()

    def _end_round(self, plan: RoundPlan, evaluating: Ticket | None) -> Iterator[Ticket]:
        """Waits for the evaluation of the round, if there is one, and records the round."""
        evaluation = None
        if evaluating is not None:
            yield evaluating
            evaluation = combine(flatten(self._take(evaluating)))
        outcome = self.strategy.outcome
        assert outcome is not None
        self._on_round(self, self._record(plan, outcome, evaluation))

    def personalise(
        self, config_of: Callable[[int], Config], lost: Collection[int] = ()
    ) -> Generator[Ticket, None, Evaluation]:
        """Returns the evaluation after local training with `config_of(client)`, each client from the global weights.

        A client whose program raises, or which is among `lost`, counts as wrong on every example.
        """
        tasks = [
            PersonaliseTask(
                client,
                config_of(client),
                rng.derived_seed(self.strategy.seed, "personalise", self.trial.number, self.round, client),
            )
            for client in self._clients.tolist()
            if client not in lost
        ]
        ticket = self._executor.submit(
            self.weights, tasks, self._order, f"{self._place(self.round)}, after local training"
        )
        yield ticket
        metrics = {client: self._all_wrong(client) for client in self._clients.tolist()}
        for task, result in zip(tasks, self._take(ticket), strict=True):
            if not isinstance(result, Failure):
                (metrics[task.client],) = flatten([result])
        return combine(list(metrics.values()))

    def sampled_config(self, client: int) -> Config:
        """The configuration that a client draws from theta for its personalisation (the result of algorithm 7)."""
        draws = rng.stream(self.strategy.seed, "personalise", self.trial.number, self.round, client)
        return expand(self.strategy.policy.pool, self.strategy.policy.draw(draws, 1)[0])

    def best_config(self) -> Config:
        """The configuration with the largest probability."""
        return expand(self.strategy.policy.pool, np.array(self.strategy.policy.best()))

    def pool(self) -> Pool:
        """The pool of client configurations now; theta is the distribution over it."""
        return self.strategy.policy.pool

    def theta(self) -> tuple[Float[np.ndarray, "_"], ...]:
        """The distribution over the pool: one array for each factor."""
        return self.strategy.policy.probabilities()

    def arrays(self) -> dict[str, np.ndarray]:
        """The state to checkpoint."""
        return {"round": np.array(self.round), "weights": self.weights.numpy(), **self.strategy.to_arrays()}

    def inherited_state(self) -> dict[str, np.ndarray]:
        """The state that a copy of this trial starts from. It lacks the policy's state, which is for this pool."""
        return {name: array for name, array in self.arrays().items() if not name.startswith("policy.")}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continues from a checkpoint, or from the state inherited from another trial."""
        self.round = int(arrays["round"])
        self.weights = torch.from_numpy(arrays["weights"])
        self.strategy.restore(arrays)

    def _place(self, server_round: int) -> str:
        """The trial and the round, for messages about a client."""
        return f"{self._study}trial {self.trial.number}, round {server_round}"

    def _take(self, ticket: Ticket) -> list[Any]:
        results = self._executor.collect(ticket)
        self._executor.release(ticket)
        return results

    def _record(self, plan: RoundPlan, outcome: RoundOutcome, evaluation: Evaluation | None) -> RoundRecord:
        answered = outcome.cohort - outcome.failed
        return RoundRecord(
            round=self.round,
            asked=plan.asked,
            stragglers=plan.stragglers,
            dropouts=plan.dropouts,
            unavailable=plan.unavailable,
            cohort=outcome.cohort,
            failed=outcome.failed,
            rejected=outcome.rejected,
            clipped=outcome.clipped,
            client_updates=answered,
            bytes=self.weights.nbytes * (plan.asked + answered),
            error=outcome.error,
            loss=outcome.loss,
            entropy=outcome.entropy,
            evaluation=evaluation,
        )

    def _all_wrong(self, client: int) -> Metrics:
        """The metrics of a client whose predictions are all wrong."""
        starts, stops = self._dataset.ranges[client].T
        _, num_validation, num_test = (stops - starts).tolist()
        num_classes = self._dataset.spec.num_classes
        error, loss = worst_error("error", num_classes), worst_error("loss", num_classes)
        return {
            "num_validation": num_validation,
            "validation_error": error,
            "validation_loss": loss,
            "num_test": num_test,
            "test_error": error,
            "test_loss": loss,
        }

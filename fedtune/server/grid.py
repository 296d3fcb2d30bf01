"""Flower grids that live in this process: one over an executor, and a plain one that calls a ClientApp for each
message.

A node's id is its client's index + FIRST_NODE_ID: fixed, where Flower's own are random in each run.
"""

from collections.abc import Callable, Iterable

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune.server.flower_compat import empty_run, ensure_task_identity, pack, stamp
from fedtune.tasks import EvaluateTask, Executor, Failure, PersonaliseTask, Result, Task, TrainTask, Update

CLIENT_ERROR = 1000  # the code in the reply of a client whose program raised; above Flower's own
FIRST_NODE_ID = 2  # 1 is the server


class LocalGrid(Grid):
    """What the in-process grids share: fixed node ids, one run, no deprecated way to make a message."""

    def __init__(self, num_clients: int) -> None:
        ensure_task_identity()
        self._run = empty_run()
        self._num_clients = num_clients

    def set_run(self, run: Run) -> None:
        """Remembers the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that messages belong to."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message, in the way that Flower deprecated but still asks a Grid to offer."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """All nodes, in client order; a range, so that a million clients cost nothing."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._num_clients)


class ExecutorGrid(LocalGrid):
    """The grid of a simulation: a push hands the clients' work to an executor, which several grids may share.

    All messages of one push carry the same weights. What a pull returned holds views that stay valid until the next
    push.
    """

    def __init__(self, executor: Executor, num_clients: int) -> None:
        super().__init__(num_clients)
        self._executor = executor
        self._sent: dict[int, list[Message]] = {}  # by ticket
        self._replies: dict[str, Message] = {}  # by the id of the message that they answer
        self._collected: list[int] = []
        self.order = 0.0  # which grid's work goes first in the shared executor

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """The messages' ids; their work is under way."""
        sent = list(messages)
        self.release()
        if not sent:
            return []
        weights = torch.from_numpy(sent[0].content.array_records["arrays"]["weights"].numpy())
        ticket = self._executor.submit(weights, [_task(message) for message in sent], self.order)
        for index, message in enumerate(sent):
            stamp(message, f"{ticket}-{index}")
        self._sent[ticket] = sent
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to those messages whose push is wholly done; does not wait."""
        for ticket in [ticket for ticket in self._sent if self._executor.finished(ticket)]:
            for message, result in zip(self._sent.pop(ticket), self._executor.collect(ticket), strict=True):
                self._replies[message.metadata.message_id] = _reply(message, result)
            self._collected.append(ticket)
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies to all messages. `timeout` has no meaning here: nobody is slow in real time."""
        message_ids = self.push_messages(messages)
        while message_ids and not self._executor.finished(self.ticket(message_ids)):
            self._executor.step()
        return self.pull_messages(message_ids)

    def ticket(self, message_ids: list[str]) -> int:
        """The executor's ticket of the push that returned these ids."""
        return int(message_ids[0].partition("-")[0])

    def release(self) -> None:
        """Gives back the memory of the updates that came back."""
        for ticket in self._collected:
            self._executor.release(ticket)
        self._collected.clear()


class ClientAppGrid(LocalGrid):
    """The plain grid: calls the real ClientApp for each message in turn. The reference for the other one."""

    def __init__(self, client_app: ClientApp, context: Callable[[int], Context], num_clients: int) -> None:
        super().__init__(num_clients)
        self._client_app = client_app
        self._context = context
        self._replies: dict[str, Message] = {}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """The messages' ids; the replies are there at once."""
        message_ids = []
        for message in messages:
            message_ids.append(str(len(self._replies)))
            stamp(message, message_ids[-1])
            context = self._context(message.metadata.dst_node_id - FIRST_NODE_ID)
            self._replies[message_ids[-1]] = self._client_app(message, context)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to those messages."""
        return [self._replies[message_id] for message_id in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """The replies to all messages."""
        return self.pull_messages(self.push_messages(messages))


def hyperparameters(config: ConfigRecord) -> dict[str, float]:
    """The client's configuration in a message: the entries named `client.`, without that."""
    prefix = "client."
    return {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}  # type: ignore[misc]


def _task(message: Message) -> Task:
    client = message.metadata.dst_node_id - FIRST_NODE_ID
    config = message.content.config_records["config"]
    if message.metadata.message_type == "evaluate":
        if not config["personalise"]:
            return EvaluateTask((client,))
        return PersonaliseTask(client, hyperparameters(config), _seed(config))
    return TrainTask(client, hyperparameters(config), _seed(config), bool(config["error_before"]))


def _seed(config: ConfigRecord) -> int:
    seed = config["seed"]
    assert isinstance(seed, int)
    return seed


def _reply(message: Message, result: Result) -> Message:
    if isinstance(result, Failure):
        return Message(Error(CLIENT_ERROR, result.message), reply_to=message)
    if isinstance(result, Update):
        content = RecordDict({"arrays": pack(result.weights.numpy()), "metrics": MetricRecord({**result.metrics})})
        return Message(content, reply_to=message)
    return Message(RecordDict({"metrics": MetricRecord({**result[0]})}), reply_to=message)

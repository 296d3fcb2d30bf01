"""Flower grids that live in this process: one over an executor, and a plain one that calls a ClientApp for each
message.

A node's id is its client's number + FIRST_NODE_ID: fixed, where Flower's own are random in each run.
"""

import itertools
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune.server import messages as protocol
from fedtune.server.flower_compat import empty_run, ensure_task_identity, stamp
from fedtune.tasks import EvaluateTask, Executor, Failure, PersonaliseTask, Result, Task, TrainTask, Update

CLIENT_ERROR = 1000  # the code in the reply of a client whose program raised; above Flower's own
FIRST_NODE_ID = 2  # 1 is the server


class LocalGrid(Grid):
    """What the in-process grids share: fixed node ids, one run, replies that wait until they are pulled."""

    def __init__(self, num_clients: int) -> None:
        ensure_task_identity()
        self._run = empty_run()
        self._num_clients = num_clients
        self._next_id = itertools.count()
        self._replies: dict[str, Message] = {}  # by the id of the message that they answer

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

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to those messages that are there, each of them once; does not wait."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def _stamp(self, messages: list[Message]) -> list[str]:
        """The ids that the messages now have."""
        for message in messages:
            stamp(message, str(next(self._next_id)))
        return [message.metadata.message_id for message in messages]


class ExecutorGrid(LocalGrid):
    """The grid of a simulation: a push hands the clients' work to an executor, which several grids may share.

    All work of one push must be of one type, for the same weights. What a pull returned holds views that stay valid
    until the next push.
    """

    def __init__(self, executor: Executor, num_clients: int) -> None:
        super().__init__(num_clients)
        self._executor = executor
        self._under_way: dict[int, list[Message]] = {}  # by ticket
        self._tickets: dict[str, int] = {}  # of the messages whose replies were not pulled yet, by id
        self._collected: set[int] = set()
        self.order = 0.0  # which grid's work goes first in the shared executor

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """The messages' ids; their work is under way."""
        sent = list(messages)
        self.release()
        message_ids = self._stamp(sent)
        work = []
        for message in sent:
            if message.metadata.message_type == MessageType.QUERY:
                self._replies[message.metadata.message_id] = protocol.answer(message, {"client": _client(message)})
            else:
                work.append(message)
        if work:
            _check_alike(work)
            ticket = self._executor.submit(protocol.weights(work[0]), [_task(message) for message in work], self.order)
            self._under_way[ticket] = work
            self._tickets |= {message.metadata.message_id: ticket for message in work}
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to those messages whose push is wholly done, each of them once; does not wait."""
        for ticket in [ticket for ticket in self._under_way if self._executor.finished(ticket)]:
            for message, result in zip(self._under_way.pop(ticket), self._executor.collect(ticket), strict=True):
                self._replies[message.metadata.message_id] = _reply(message, result)
            self._collected.add(ticket)
        replies = super().pull_messages(message_ids)
        for reply in replies:
            self._tickets.pop(reply.metadata.reply_to_message_id, None)  # a query has none
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: int | float | None = None) -> list[Message]:
        """The replies to all messages. `timeout` has no meaning here: nobody is slow in real time."""
        message_ids = self.push_messages(messages)
        for ticket in {self._tickets[message_id] for message_id in message_ids if message_id in self._tickets}:
            while not self._executor.finished(ticket):
                self._executor.step()
        return self.pull_messages(message_ids)

    def ticket(self, message_ids: list[str]) -> int:
        """The executor's ticket of the push that returned these ids, until the replies are pulled."""
        return self._tickets[message_ids[0]]

    def release(self) -> None:
        """Gives back the memory of the updates whose replies were all pulled."""
        done = self._collected - set(self._tickets.values())
        for ticket in done:
            self._executor.release(ticket)
        self._collected -= done


class ClientAppGrid(LocalGrid):
    """The plain grid: calls the real ClientApp for each message in turn. The reference for the other one."""

    def __init__(self, client_app: ClientApp, context: Callable[[int], Context], num_clients: int) -> None:
        super().__init__(num_clients)
        self._client_app = client_app
        self._context = context  # of a client, by its number

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """The messages' ids; the replies are there at once."""
        sent = list(messages)
        message_ids = self._stamp(sent)
        self._replies |= {message.metadata.message_id: self._call(message) for message in sent}
        return message_ids

    def send_and_receive(self, messages: Iterable[Message], *, timeout: int | float | None = None) -> list[Message]:
        """The replies to all messages."""
        return self.pull_messages(self.push_messages(messages))

    def _call(self, message: Message) -> Message:
        try:
            return self._client_app(message, self._context(_client(message)))
        except Exception as error:  # as a SuperNode does: what an app raises is told to the server
            return _failure(message, f"{type(error).__name__}: {error}")


def _client(message: Message) -> int:
    return message.metadata.dst_node_id - FIRST_NODE_ID


def _check_alike(work: list[Message]) -> None:
    arrays = work[0].content["arrays"]
    if any(message.content["arrays"] is not arrays for message in work):
        raise ValueError("all messages of a push must carry the same ArrayRecord, got several")
    if len({message.metadata.message_type for message in work}) > 1:
        raise ValueError("all work of a push must be of one message type, got several")


def _task(message: Message) -> Task:
    client, message_type = _client(message), message.metadata.message_type
    if message_type == MessageType.TRAIN:
        error_before = protocol.wants(message, "error_before")
        return TrainTask(client, protocol.hyperparameters(message), protocol.seed(message), error_before)
    if message_type != MessageType.EVALUATE:
        raise ValueError(f"message type must be train, evaluate or query, got {message_type!r}")
    if protocol.wants(message, "personalise"):
        return PersonaliseTask(client, protocol.hyperparameters(message), protocol.seed(message))
    return EvaluateTask((client,))


def _reply(message: Message, result: Result) -> Message:
    if isinstance(result, Failure):
        return _failure(message, result.message)
    if isinstance(result, Update):
        return protocol.answer(message, result.metrics, result.weights.numpy())
    return protocol.answer(message, result[0])


def _failure(message: Message, reason: str) -> Message:
    return Message(Error(CLIENT_ERROR, reason), reply_to=message)

"""A Flower grid within this process: an executor does the clients' work.

A node's id is its client's number + FIRST_NODE_ID. So it is fixed; Flower's own node ids are random in each run.
"""

import itertools
from collections.abc import Collection, Iterable

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from fedtune.client.tasks import Executor, Failure, Ticket
from fedtune.server import messages as protocol
from fedtune.server.flower_compat import empty_run, ensure_task_identity, entries_of, stamp

FIRST_NODE_ID = 2  # 1 is the server


class ExecutorGrid(Grid):
    """The grid of a simulation: a push gives the clients' work to an executor, which several grids may share.

    All work of one push must be of one type and for the same weights. The replies that a pull returns hold views, which
    stay valid until the next push. The executor does the work of the grid with the smallest `order` first.

    `lost_clients` are the numbers of clients that answer with a failure to the messages of the next push. `place` says
    where in the run these messages belong.
    """

    def __init__(self, executor: Executor, num_clients: int, order: float = 0.0) -> None:
        ensure_task_identity()
        self._run = empty_run()
        self._num_clients = num_clients
        self._next_id = itertools.count()
        self._replies: dict[str, Message] = {}  # not pulled yet, by the id of the message that each one answers
        self._executor = executor
        self._under_way: dict[Ticket, dict[str, Message]] = {}  # the messages by their ids
        self._tickets: dict[str, Ticket] = {}  # by the id of each message whose reply was not pulled yet
        self._collected: set[Ticket] = set()
        self._order = order
        self.lost_clients: Collection[int] = ()
        self.place = ""

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
        """A message. Flower deprecated this method, but a Grid must still have it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> range:
        """All nodes, in client order: a range, so a million clients take no memory."""
        return range(FIRST_NODE_ID, FIRST_NODE_ID + self._num_clients)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Gives the messages' work to the executor, and returns the messages' ids."""
        sent = list(messages)
        self.release()
        message_ids = self._stamp(sent)
        work: dict[str, Message] = {}  # by message id
        tasks = []
        for message_id, message in zip(message_ids, sent, strict=True):
            metadata = message.metadata
            client = metadata.dst_node_id - FIRST_NODE_ID
            if metadata.message_type == MessageType.QUERY:
                self._replies[message_id] = protocol.answer(message, [{"client": client}])
            elif client in self.lost_clients:
                failure = Failure(f"client {client} is lost: the run goes on without it")
                self._replies[message_id] = protocol.answer(message, failure)
            else:
                work[message_id] = message
                tasks.append(protocol.task(message, client))
        if work:
            _check_alike(work.values())
            weights = protocol.weights(next(iter(work.values())))
            ticket = self._executor.submit(weights, tasks, self._order, self.place)
            self._under_way[ticket] = work
            self._tickets |= dict.fromkeys(work, ticket)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to messages whose push is completely done, each reply once. Does not wait for other pushes."""
        for ticket in [ticket for ticket in self._under_way if self._executor.finished(ticket)]:
            messages, results = self._under_way.pop(ticket), self._executor.collect(ticket)
            for (message_id, message), result in zip(messages.items(), results, strict=True):
                self._replies[message_id] = protocol.answer(message, result)
            self._collected.add(ticket)
        replies = []
        for message_id in message_ids:
            if message_id in self._replies:
                replies.append(self._replies.pop(message_id))
                self._tickets.pop(message_id, None)  # a query has none
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: int | float | None = None) -> list[Message]:
        """The replies to all messages. `timeout` is ignored: simulated clients are slow in virtual time only."""
        message_ids = self.push_messages(messages)
        for ticket in {self._tickets[message_id] for message_id in message_ids if message_id in self._tickets}:
            while not self._executor.finished(ticket):
                self._executor.step()
        return self.pull_messages(message_ids)

    def ticket(self, message_ids: list[str]) -> Ticket | None:
        """The executor's ticket of the push that returned these ids; only before their replies are pulled.

        None if the push gave the executor nothing to do.
        """
        return next((self._tickets[message_id] for message_id in message_ids if message_id in self._tickets), None)

    def release(self) -> None:
        """Lets the executor reuse the memory of pushes whose replies were all pulled."""
        done = self._collected - set(self._tickets.values())
        for ticket in done:
            self._executor.release(ticket)
        self._collected -= done

    def _stamp(self, messages: list[Message]) -> list[str]:
        """Gives the messages new ids, and returns them."""
        message_ids = [str(next(self._next_id)) for _ in messages]
        for message, message_id in zip(messages, message_ids, strict=True):
            stamp(message, message_id)
        return message_ids


def _check_alike(work: Collection[Message]) -> None:
    arrays = [entries_of(message.content)["arrays"] for message in work]
    if any(record is not arrays[0] for record in arrays):
        raise ValueError("all messages of a push must carry the same ArrayRecord, got several")
    if len({message.metadata.message_type for message in work}) > 1:
        raise ValueError("all work of a push must be of one message type, got several")

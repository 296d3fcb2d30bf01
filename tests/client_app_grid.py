"""The plain grid, which calls the real ClientApp for each message in turn: what `ExecutorGrid` must equal."""

from unittest.mock import Mock

from flwr.app import Error, Message

from fedtune.client.tasks import Executor
from fedtune.server.messages import CLIENT_ERROR
from fedtune.simulation.grid import FIRST_NODE_ID, ExecutorGrid


class ClientAppGrid(ExecutorGrid):
    def __init__(self, client_app, context, num_clients):
        super().__init__(Mock(Executor), num_clients)  # which is never asked for anything
        self._client_app = client_app
        self._context = context  # of a client, by its number

    def push_messages(self, messages):
        sent = list(messages)
        message_ids = self._stamp(sent)
        self._replies |= {message.metadata.message_id: self._call(message) for message in sent}
        return message_ids

    def _call(self, message):
        try:
            return self._client_app(message, self._context(message.metadata.dst_node_id - FIRST_NODE_ID))
        except Exception as error:  # as a SuperNode does: what an app raises is told to the server
            return Message(Error(CLIENT_ERROR, f"{type(error).__name__}: {error}"), reply_to=message)

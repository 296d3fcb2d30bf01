"""The Flower ClientApp: what a client does in Flower's own engine, or on a SuperNode that runs on a device.

It uses these settings of the run: [data], [model], `device`, `precision`, `engine` and the name in [client]. The node's
config says which client the node is ("partition-id"), unless the "config" of a message names another one ("client").
`fedtune.server.messages` describes the messages.
"""

import functools

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedtune import plugins
from fedtune.client.tasks import Failure
from fedtune.errors import InputError, NoKernelError
from fedtune.executors.machine import Machine, detached_copy, machine_settings
from fedtune.server import messages as protocol

app = ClientApp()


@app.train()
@app.evaluate()
def work(message: Message, context: Context) -> Message:
    """The reply to a training or evaluation message, computed by the same machine as in a simulation."""
    machine = _machine(context)
    if isinstance(machine, Failure):
        return protocol.answer(message, machine)
    task = protocol.task(message, _client(protocol.config_of(message), context, machine.dataset.num_clients))
    return protocol.answer(message, detached_copy(machine.compute(protocol.weights(message), task)))


@app.query()
def query(message: Message, context: Context) -> Message:
    """A reply that says which client this node is, as the metric "client"."""
    machine = _machine(context)
    if isinstance(machine, Failure):
        return protocol.answer(message, machine)
    return protocol.answer(message, [{"client": _client(ConfigRecord(), context, machine.dataset.num_clients)}])


def _machine(context: Context) -> Machine | Failure:
    """The machine of this node; a Failure if the run's settings require a kernel that this node does not have."""
    try:
        return _load(context.run_config.get("settings"))
    except NoKernelError as error:
        return Failure(
            f"node {context.node_id}: {error}; mend that on the node, or start a new run with engine = 'torch' in its "
            "settings"
        )


@functools.lru_cache(maxsize=1)
def _load(text: object) -> Machine:
    settings = protocol.run_settings(text)
    return Machine(machine_settings(settings), plugins.load_dataset(settings.data))


def _client(config: ConfigRecord, context: Context, num_clients: int) -> int:
    client = config.get("client", context.node_config.get("partition-id"))
    if not isinstance(client, int) or not 0 <= client < num_clients:
        raise InputError(f"the client must be a whole number in 0..{num_clients - 1}, got {client!r}")
    return client

"""The Flower ClientApp: what a client does in Flower's own engine, or on a SuperNode that runs on a device.

It uses these settings of the run: [data], [model], `device`, `precision` and the name in [client]. The node's config
says which client the node is ("partition-id"), unless the "config" of a message names another one ("client").
`fedtune.server.messages` describes the messages.
"""

import functools

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fedtune import plugins
from fedtune.errors import InputError
from fedtune.executors.machine import Machine, MachineSettings, detached_copy
from fedtune.server import messages as protocol
from fedtune.settings import client_program_name

app = ClientApp()


@app.train()
@app.evaluate()
def work(message: Message, context: Context) -> Message:
    """The reply to a training or evaluation message, computed by the same machine as in a simulation."""
    machine = _machine(context)
    task = protocol.task(message, _client(protocol.config_of(message), context, machine.dataset.num_clients))
    return protocol.answer(message, detached_copy(machine.compute(protocol.weights(message), task)))


@app.query()
def query(message: Message, context: Context) -> Message:
    """A reply that says which client this node is, as the metric "client"."""
    return protocol.answer(
        message, [{"client": _client(ConfigRecord(), context, _machine(context).dataset.num_clients)}]
    )


def _machine(context: Context) -> Machine:
    return _load(context.run_config.get("settings"))


@functools.lru_cache(maxsize=1)
def _load(text: object) -> Machine:
    settings = protocol.run_settings(text)
    machine = MachineSettings(settings.model, client_program_name(settings), settings.device, settings.precision)
    return Machine(machine, plugins.load_dataset(settings.data))


def _client(config: ConfigRecord, context: Context, num_clients: int) -> int:
    client = config.get("client", context.node_config.get("partition-id"))
    if not isinstance(client, int) or not 0 <= client < num_clients:
        raise InputError(f"the client must be a whole number in 0..{num_clients - 1}, got {client!r}")
    return client

"""The engine in which a run's clients train: torch, or the kernel that the client program compiles. See docs/speed.md.

`choose_engine` decides once for a run. Each machine of the run then compiles its model, or raises if it can't.
"""

from dataclasses import dataclass
from typing import Any, Literal

from fedtune import plugins
from fedtune.client.compiled_model import CompiledModel
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import NoKernelError
from fedtune.settings import Settings, client_program_name


@dataclass(frozen=True)
class Engine:
    """The engine of a run.

    `kernel` is the digest of its kernel, None if clients train in torch. `reason` says why they do, if the settings
    leave it open.
    """

    kernel: str | None = None
    reason: str = ""

    @property
    def name(self) -> Literal["torch", "compiled"]:
        """The engine as settings name it."""
        return "torch" if self.kernel is None else "compiled"

    def describe(self, place: str) -> str:
        """Where clients train, for a message; `place` is what the executor says, such as "in 2 worker processes"."""
        if self.kernel is not None:
            return f"in a compiled kernel, {place}"
        return f"in torch, {place}{self.reason and ': '}{self.reason}"


def choose_engine(settings: Settings, model: FlatModel, spec: DatasetSpec) -> Engine:
    """The engine of a run with these settings. Raises NoKernelError if they require a kernel that can't be had here."""
    if settings.engine == "torch":
        return Engine()
    if settings.batches_clients:
        compiled: CompiledModel | str = "the batched executor trains many clients in one tensor program"
    else:
        compiled = compile_model(client_program_name(settings), model, spec, settings.device, settings.precision)
    if not isinstance(compiled, str):
        return Engine(compiled.digest)
    if settings.engine == "compiled":
        raise NoKernelError(compiled)
    return Engine(reason=compiled)


def compile_model(client: str, model: FlatModel, spec: DatasetSpec, device: str, precision: str) -> CompiledModel | str:
    """The compiled form that the client program of that name gives the model, or why there is none here."""
    for name, value, needed in (("device", device, "cpu"), ("precision", precision, "fp32")):
        if value != needed:
            return f"a kernel needs {name} {needed!r}, got {value!r}"
    make: Any = getattr(plugins.load_client_program(client), "compile_model", None)
    if make is None:
        return f"the client program {client!r} has no compile_model"
    try:
        compiled = make(model, spec)
    except (Exception, SystemExit) as error:  # anybody may write a client program
        return " ".join(f"compile_model of {client!r} raised {type(error).__name__}: {error}".split())
    if not isinstance(compiled, CompiledModel | str):
        return f"compile_model of {client!r} must return a CompiledModel or a str, got {type(compiled).__name__}"
    return compiled

"""A model whose local SGD and whose measurement are done by the compiled kernel, kernel.c.

`compile_model` makes a table of a model's layers for the kernel, or says why it can't. The kernel trains a client for
an epoch in one call. docs/speed.md describes how this works.
"""

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fedtune.client import Config, Examples, FlatModel, StoredExamples
from fedtune.client.flat_model import EVALUATION_BATCH
from fedtune.data.spec import LABEL_DTYPES, DatasetSpec
from fedtune.errors import InputError
from fedtune_clients.kernel_library import Job, Library, load_library
from fedtune_clients.layer_table import DROPOUT, EMBEDDING, LAST_STEP, OBJECTIVES_OF_KERNEL, Layer, layer_table

SEQUENCES = 32  # that are measured at a time: more would not stay in a core's cache

STORED = {np.dtype(name): number for number, name in enumerate(("uint8", "float32", "int64"))}  # `enum stored`
REAL_TYPES = (np.dtype(np.uint8), np.dtype(np.float32))
TOKEN_TYPES = (np.dtype(np.uint8), np.dtype(np.int64))
BAD_LABEL, BAD_TOKEN = 4, 5  # `enum status` of kernel.c


def compile_model(model: FlatModel, spec: DatasetSpec) -> "CompiledModel | str":
    """The model in compiled form, or why it can't be compiled here. `spec` describes the examples that it will get."""
    if not model.flat.is_cpu:
        return f"the kernel works on a CPU, and the model is on {model.flat.device}"
    library = load_library()
    if isinstance(library, str):
        return library
    layers = layer_table(model, spec)
    return layers if isinstance(layers, str) else CompiledModel(model, layers, spec, library)


class CompiledModel:
    """See `fedtune.client.CompiledModel`. One thread at a time may use it, as it is with the model itself."""

    def __init__(self, model: FlatModel, layers: Sequence[Layer], spec: DatasetSpec, library: Library) -> None:
        self.digest = library.built_from
        self._model = model
        self._spec = spec
        self._library = library
        self._num_outputs = layers[-1].num_out
        self._num_tokens = layers[0].num_in
        rows = [(layer.kind, layer.num_in, layer.num_out, *layer.weights) for layer in layers]
        self._table = np.array(rows, np.int64)
        self._steps = spec.input_shape[0] if layers[0].kind == EMBEDDING else 1  # rows for each example
        # How many factors each dropout layer draws for an example: a stack of LSTMs draws them for all steps.
        last = next((place for place, layer in enumerate(layers) if layer.kind == LAST_STEP), 0)
        self._dropped = [
            layer.num_out * (self._steps if place < last else 1)
            for place, layer in enumerate(layers)
            if layer.kind == DROPOUT
        ]
        # How many numbers an example and its label have.
        self._sizes = math.prod(spec.input_shape), (1 if spec.objective == "classification" else spec.num_outputs)
        self._label_dtype = np.dtype(LABEL_DTYPES[spec.objective])
        self._memory, self._memory_size = torch.empty(0), 0
        self._generator = torch.Generator()
        self._job = Job(
            layers=self._table.ctypes.data,
            num_layers=len(layers),
            num_weights=model.num_weights,
            width=self._sizes[0],
            objective=OBJECTIVES_OF_KERNEL.index(spec.objective),
            sgemm=library.sgemm,
        )

    def train(
        self,
        weights: Float[Tensor, "weight"],
        examples: Examples | StoredExamples,
        config: Config,
        rng: np.random.Generator,
    ) -> Float[Tensor, "weight"]:
        """The weights after local SGD from `weights`, which are the model's weights from then on.

        `config` has a value for each hyperparameter of `fedtune_clients.hyperparameters`. Raises InputError if a label
        or a token is none that the model knows.
        """
        _use_one_thread()
        job, flat = self._job, self._model.flat
        self._model.load(weights)
        arrays = self._give_examples(examples)
        seed = int(rng.integers(2**63))
        velocity = torch.zeros_like(flat) if config["momentum"] > 0 else None
        sent = weights.clone() if config["proximal_mu"] > 0 else None
        job.weights, job.velocity, job.sent = flat.data_ptr(), _address(velocity), _address(sent)
        job.rate, job.momentum = config["learning_rate"], config["momentum"]
        job.weight_decay, job.proximal_mu = config["weight_decay"], config["proximal_mu"]
        job.dropout, job.kept = config["dropout"], None
        job.batch_size = batch_size = int(config["batch_size"])
        draws = config["dropout"] > 0 and bool(self._dropped)
        if draws:
            self._generator.manual_seed(seed)
        for _ in range(int(config["epochs"])):
            order = rng.permutation(examples.num_examples)
            if not draws:
                self._run(self._library.functions.kernel_train, order, arrays)
                continue
            for begin in range(0, len(order), batch_size):  # a batch at a time, since its factors take memory
                batch = order[begin : begin + batch_size]
                kept = self._draw(len(batch), 1 - float(config["dropout"]))
                job.kept = kept.data_ptr()
                self._run(self._library.functions.kernel_train, batch, arrays)
        return flat

    def measure(
        self, weights: Float[Tensor, "weight"], examples: StoredExamples
    ) -> tuple[Float32[np.ndarray, "example"], Float32[np.ndarray, "example"]]:
        """The losses and the errors of the weights, one of each for every example. The model then holds the weights."""
        _use_one_thread()
        self._model.load(weights)  # where memory begins can decide how a matrix product is computed
        arrays = self._give_examples(examples)
        losses, errors = np.empty((2, examples.num_examples), np.float32)
        job = self._job
        job.weights = self._model.flat.data_ptr()
        job.losses, job.errors = _start(losses), _start(errors)
        job.batch_size = EVALUATION_BATCH if self._steps == 1 else SEQUENCES
        job.velocity = job.sent = job.kept = None
        self._run(self._library.functions.kernel_measure, np.arange(examples.num_examples), arrays)
        return losses, errors

    def _give_examples(self, examples: Examples | StoredExamples) -> tuple[np.ndarray, np.ndarray]:
        """Puts the examples into the job. Returns their arrays, which must live until the job is done."""
        x, y, scale = _arrays(examples)
        job, spec = self._job, self._spec
        if x.dtype not in STORED or y.dtype != self._label_dtype or (x[:1].size, y[:1].size) != self._sizes:
            got = f"{x.dtype} of shape {x.shape[1:]} and {y.dtype} of shape {y.shape[1:]}"
            raise InputError(f"examples must have shapes {spec.input_shape} and {spec.target_shape}, got {got}")
        job.num_examples, job.scale = len(y), scale
        job.x, job.x_stored, job.x_stride = _start(x), STORED[x.dtype], x.strides[0]
        job.y = _start(y)
        return x, y

    def _draw(self, num_examples: int, retained: float) -> Tensor:
        """1 for each number that the dropout layers retain in a batch and 0 for the others, as torch draws them."""
        sizes = [num_examples * width for width in self._dropped]
        kept = torch.empty(sum(sizes))
        for part in torch.split(kept, sizes):
            part.bernoulli_(retained, generator=self._generator)
        return kept

    def _run(self, function: Callable[[Job], int], rows: np.ndarray, arrays: tuple[np.ndarray, np.ndarray]) -> None:
        job, functions = self._job, self._library.functions
        job.rows, job.num_rows = _start(rows), len(rows)
        size = functions.kernel_memory(job)
        if size > self._memory_size:
            self._memory, self._memory_size = torch.empty(size), size  # torch aligns it to 64 bytes
            job.memory, job.memory_size = self._memory.data_ptr(), size
        status = function(job)
        if status == BAD_LABEL:
            raise _out_of_range("labels", arrays[1], self._num_outputs)
        if status == BAD_TOKEN:
            raise _out_of_range("tokens", arrays[0], self._num_tokens)
        if status:
            raise RuntimeError(f"the kernel refuses its job: status {status}")


def _arrays(examples: Examples | StoredExamples) -> tuple[np.ndarray, np.ndarray, float]:
    """The inputs, the labels, and the factor for the inputs. The numbers of an example follow each other in memory."""
    if isinstance(examples, StoredExamples):
        x, y = examples.arrays
        types = TOKEN_TYPES if examples.spec.input_kind == "token" else REAL_TYPES
        if x.dtype in types and x[:1].flags.c_contiguous:
            return x, np.ascontiguousarray(y), examples.spec.scale
        examples = examples.all()
    return examples.x.contiguous().numpy(), examples.y.contiguous().numpy(), 1.0


def _start(array: np.ndarray) -> int:
    """The address of the first number."""
    address: int = array.__array_interface__["data"][0]  # twice as fast as array.ctypes.data
    return address


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _out_of_range(what: str, values: np.ndarray, count: int) -> InputError:
    """The error that names the first value which is not in 0..count - 1."""
    wrong = values[(values < 0) | (values >= count)].flat[0]
    return InputError(f"{what} must be in 0..{count - 1}, got {wrong}")


_THREAD = threading.local()


def _use_one_thread() -> None:
    """Makes torch's BLAS use one thread in this thread: with more of them, it would add in another order."""
    if not getattr(_THREAD, "uses_one", False):
        torch.set_num_threads(1)
        _THREAD.uses_one = True

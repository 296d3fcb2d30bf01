"""The machine's limit: how long a round takes if its useful arithmetic runs at the best rate of all cores together.

python limit.py MODEL PLANS      answers as an engine does, and does no round

The useful arithmetic of a client's training are the products that no exact implementation can leave out. A
multiplication and the addition after it count as two operations. Element-wise work (activations, the loss, the steps of
SGD) and the error on validation examples do not count.
"""

import functools
import itertools
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import work
from torch.nn.functional import conv2d

SECONDS = 0.1  # for each operation, all cores at once
CORES = len(os.sched_getaffinity(0))
IMAGE = 28
MLP_WIDTHS = IMAGE**2, 200, 200, work.IMAGE_CLASSES
CNN_DENSE = 512
PRODUCTS = 256, 384, 512, 768, 1024  # widths of square matrices
CONVOLUTIONS = (  # examples, channels, height and width, filters; 5 by 5, padded
    (20, 32, 14, 64),
    (100, 32, 14, 64),
    (20, 64, 14, 64),
    (20, 128, 14, 128),
)


class Operation(NamedTuple):
    """An operation whose rate is measured, and how many multiplications and additions it takes."""

    run: Callable[[], object]
    flop: int


def flop_of_round(model: str, cohort_size: int) -> int:
    """The multiplications and additions of the useful arithmetic of a round."""
    train = work.sizes(model).train
    return cohort_size * (train * flop_of_example(model) + math.ceil(train / work.BATCH_SIZE) * flop_of_step(model))


def flop_of_example(model: str) -> int:
    """What one example takes in one step, forwards and backwards."""
    if model == "cnn":
        side = IMAGE // 2  # after the first pool
        # The taps of a filter that lie on the padding count too, as is usual.
        first, second = 32 * 25 * IMAGE**2, 64 * 32 * 25 * side**2
        flat = 64 * (side // 2) ** 2
        dense = flat * CNN_DENSE + CNN_DENSE * work.IMAGE_CLASSES
        return 2 * (2 * first + 3 * second + 3 * dense)  # the images need no gradient
    if work.is_lstm(model):
        hidden, layers = work.MODELS[model]["hidden"], work.MODELS[model]["layers"]
        gates = 4 * hidden * hidden
        recurrent = layers * (work.WINDOW - 1) * gates  # the first state of each layer is 0
        between = (layers - 1) * work.WINDOW * gates
        return 2 * 3 * (recurrent + between + hidden * work.CHARACTERS)
    widths = MLP_WIDTHS if model == "mlp" else (MLP_WIDTHS[0], MLP_WIDTHS[-1])
    first, *others = (a * b for a, b in itertools.pairwise(widths))
    return 2 * (2 * first + 3 * sum(others))  # the images need no gradient


def flop_of_step(model: str) -> int:
    """What one step takes for all its examples together: what the first layer of an LSTM makes of each character."""
    if not work.is_lstm(model):
        return 0
    return 2 * 3 * work.CHARACTERS * work.EMBEDDING * 4 * work.MODELS[model]["hidden"]


@functools.cache
def operations(model: str) -> list[Operation]:
    """The operations of which the fastest counts: convolutions for the CNN, and matrix products for other models."""
    found = []
    if model != "cnn":
        for width in PRODUCTS:
            a, b, out = torch.randn(3, width, width).unbind()
            found.append(Operation(functools.partial(torch.mm, a, b, out=out), 2 * width**3))
        return found
    for examples, channels, side, filters in CONVOLUTIONS:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(examples, channels, side, side).contiguous(memory_format=memory_format)
            weight = torch.randn(filters, channels, 5, 5).contiguous(memory_format=memory_format)
            flop = 2 * examples * side**2 * channels * filters * 25
            found.append(Operation(functools.partial(conv2d, x, weight, padding=2), flop))
    return found


def use_barrier(barrier: object) -> None:
    """Gives a process the barrier at which it waits for the others."""
    global at_once
    at_once = barrier
    torch.set_num_threads(1)


def rates(model: str) -> list[float]:
    """The rate of each operation on this process's core in FLOP a second; all processes measure at once."""
    found = []
    with torch.inference_mode():
        for operation in operations(model):
            operation.run()
            at_once.wait()
            started, times = time.perf_counter(), 0
            while (seconds := time.perf_counter() - started) < SECONDS:
                operation.run()
                times += 1
            found.append(times * operation.flop / seconds)
    return found


def main(model: str) -> None:
    answers = work.take_stdout()
    context = multiprocessing.get_context("fork")
    with context.Pool(CORES, use_barrier, [context.Barrier(CORES)]) as processes:
        for line in sys.stdin:
            cohort_size, rounds, _ = line.split()
            of_processes = processes.map(rates, [model] * CORES, chunksize=1)
            best = max(map(sum, zip(*of_processes, strict=True)))
            print(f"{best / 1e9:.0f} GFLOP/s", file=sys.stderr)
            print(int(rounds) * flop_of_round(model, int(cohort_size)) / best, file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

"""A client program whose compiled models train in torch: for the tests of all that is around a kernel.

A copy of this file is a client program. The file `kernel` beside the copy holds the digest of its kernel, or, if there
is no kernel, a reason of several words.
"""

from pathlib import Path

import torch

from fedtune_clients import local_sgd

HYPERPARAMETERS, SPACE, train = local_sgd.HYPERPARAMETERS, local_sgd.SPACE, local_sgd.train
KERNEL = Path(__file__).with_name("kernel")


class CompiledModel:
    """Trains a millionth farther than torch does, so that a test can tell the two engines apart."""

    def __init__(self, model, digest):
        self.digest = digest
        self._model = model

    def train(self, weights, examples, config, rng):
        sent = weights.clone()
        self._model.compiled = None
        try:
            trained = train(self._model, weights, examples, config, rng)
        finally:
            self._model.compiled = self
        return trained.add_(trained - sent, alpha=1e-6)

    def measure(self, weights, examples):
        self._model.module.eval()
        x, y = examples.all()
        with torch.inference_mode():
            losses, errors = self._model.measure(self._model.outputs(weights, x), y)
        return losses.numpy(), errors.numpy()


def compile_model(model, spec):
    text = KERNEL.read_text()
    return text if " " in text else CompiledModel(model, text)


def written(folder, kernel="kernel-1"):
    """The path of a copy in this folder, which may be there already, as `client.name`."""
    folder.mkdir(exist_ok=True)
    path = folder / "program.py"
    path.write_text(Path(__file__).read_text())
    (folder / "kernel").write_text(kernel)
    return str(path)

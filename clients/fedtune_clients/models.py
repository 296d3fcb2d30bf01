"""The models that a client trains: each function makes one for a data set. README.md lists them.

Every model has `nn.Dropout` layers with p = 0. Local SGD sets p to the client's `dropout`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError


def logistic(spec: DatasetSpec) -> nn.Module:
    """Multinomial logistic regression; dropout on its input."""
    _check_real("logistic", spec)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(math.prod(spec.input_shape), spec.num_outputs))


def mlp(spec: DatasetSpec, *, hidden: Sequence[int] = (200, 200)) -> nn.Module:
    """A multilayer perceptron, by default the 2NN of McMahan et al. (2017); dropout after each hidden layer."""
    _check_real("mlp", spec)
    layers: list[nn.Module] = [nn.Flatten()]
    width = math.prod(spec.input_shape)
    for next_width in hidden:
        _check_width("model.hidden", next_width)
        layers += [nn.Linear(width, next_width), nn.ReLU(inplace=True), nn.Dropout(0.0)]
        width = next_width
    return nn.Sequential(*layers, nn.Linear(width, spec.num_outputs))


def cnn(spec: DatasetSpec, *, dense: int = 512) -> nn.Module:
    """The convolutional network of McMahan et al. (2017) and LEAF; dropout before the last layer."""
    _check_real("cnn", spec)
    _check_width("model.dense", dense)
    channels, height, width = _image_shape(spec.input_shape)
    # ReLU comes after the pool: the function is the same, since both are monotone, and the work is a quarter.
    return nn.Sequential(
        _ChannelsLast((channels, height, width)),
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), dense),
        nn.ReLU(inplace=True),
        nn.Dropout(0.0),
        nn.Linear(dense, spec.num_outputs),
    )


def lstm(spec: DatasetSpec, *, embedding: int = 8, hidden: int = 256, layers: int = 2) -> nn.Module:
    """The stacked LSTM of McMahan et al. (2017) and LEAF, which predicts the next token; dropout after each layer.

    Tokens are classes, 0 to num_classes - 1. Each layer has the two biases of torch; only their sum matters.
    """
    if spec.input_kind != "token" or len(spec.input_shape) != 1:
        raise InputError(
            f"the model lstm needs rows of tokens, got inputs of kind {spec.input_kind!r} and shape {spec.input_shape}"
        )
    for option, value in {"embedding": embedding, "hidden": hidden, "layers": layers}.items():
        _check_width(f"model.{option}", value)
    return StackedLSTM(spec.num_classes, embedding, hidden, layers)


class StackedLSTM(nn.Module):
    """What `lstm` makes. `fedtune_clients.layer_table` describes it to the compiled kernel."""

    row_by_row = True  # see fedtune.client.stacked

    def __init__(self, num_classes: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, embedding)
        widths = [embedding] + [hidden] * layers
        # One nn.LSTM for each layer: a stack of layers in one module would not use the client's dropout.
        self.layers = nn.ModuleList(nn.LSTM(*pair, batch_first=True) for pair in pairwise(widths))
        self.dropouts = nn.ModuleList(nn.Dropout(0.0) for _ in range(layers))
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the token that follows each row of tokens."""
        states = self.embedding(x)
        for layer, dropout in zip(self.layers[:-1], self.dropouts[:-1], strict=True):
            states = dropout(layer(states)[0])
        last = self.layers[-1](states)[0][:, -1]
        logits: Tensor = self.output(self.dropouts[-1](last))
        return logits


class _ChannelsLast(nn.Module):
    """Images in torch.channels_last, the memory format in which convolutions and pools are fastest on a CPU.

    It is written without `memory_format`, which torch.func.vmap does not know.
    """

    row_by_row = True

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        images = x.reshape(-1, *self.shape).movedim(1, -1)
        # Flatten the images first. If they have one channel, torch mistakes their strides for another memory format.
        return images.flatten(1).view(images.shape).movedim(-1, 1)


def _image_shape(input_shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(input_shape) not in (2, 3) or min(input_shape[-2:]) < 4:
        raise InputError(
            "the model cnn needs images of shape (height, width) or (channels, height, width), at least 4 by 4, "
            f"got {input_shape}"
        )
    channels, height, width = (1, *input_shape)[-3:]
    return channels, height, width


def _check_real(name: str, spec: DatasetSpec) -> None:
    if spec.input_kind != "real":
        raise InputError(f"the model {name} needs inputs of kind 'real', got {spec.input_kind!r}")


def _check_width(name: str, width: int) -> None:
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise InputError(f"{name} must be a whole number >= 1, got {width!r}")

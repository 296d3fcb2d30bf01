import numpy as np
import pytest
import torch
from torch import nn

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError


class Tied(nn.Module):
    """An embedding whose weight is the output layer's too, a frozen parameter and batch norm."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.shift = nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.output = nn.Linear(3, 5)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(self.norm(self.embedding(x).mean(1) + self.shift))


def test_the_flat_tensor_is_the_state_in_its_order_with_tied_weights_once():
    module = Tied()
    state = module.state_dict()
    integers, second_name = {"norm.num_batches_tracked"}, {"output.weight"}
    names = [name for name in state if name not in integers | second_name]
    expected = torch.cat([state[name].reshape(-1) for name in names])
    model = FlatModel(module)
    assert model.num_weights == len(model.flat) == 5 * 3 + 3 + 4 * 3 + 5
    assert torch.equal(model.flat, expected)
    trainable = [module.embedding.weight, module.norm.weight, module.norm.bias, module.output.bias]
    assert {id(parameter) for parameter in model.parameters} == {id(parameter) for parameter in trainable}


def test_what_is_written_to_the_flat_tensor_is_what_the_module_holds():
    model = FlatModel(Tied())
    model.load(torch.arange(float(model.num_weights)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters, model.slices(model.flat), strict=True))
    assert model.module.embedding.weight is model.module.output.weight
    model.flat.zero_()
    state = model.module.state_dict()
    assert all(not value.any() for value in state.values() if value.is_floating_point())


def test_slices_are_views():
    model = FlatModel(nn.Linear(3, 2))
    weights = torch.arange(8.0)
    weight, bias = model.slices(weights)
    assert torch.equal(weight, torch.tensor([[0.0, 1, 2], [3, 4, 5]]))
    bias.fill_(-1)
    assert torch.equal(weights, torch.tensor([0.0, 1, 2, 3, 4, 5, -1, -1]))


def test_another_module_loads_the_state_dict():
    model, other = FlatModel(Tied()), Tied()
    weights = torch.randn(model.num_weights)
    other.load_state_dict(model.state_dict(weights))
    assert torch.equal(FlatModel(other).flat, weights)


def test_loading_weights_resets_integer_buffers_which_lie_outside_the_flat_tensor():
    # With momentum=None batch norm averages over all batches it has counted: the count would reach the next client.
    model = FlatModel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, momentum=None)))
    weights = model.flat.clone()
    assert model.num_weights == 2 * 3 + 3 + 4 * 3
    results = []
    for _ in range(2):
        model.load(weights)
        model.module.train()
        model.module(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
        results.append(model.flat.clone())
    assert not torch.equal(results[0], weights)  # the running statistics are weights
    assert torch.equal(results[0], results[1])


def test_every_floating_point_type_becomes_float32():
    model = FlatModel(nn.Sequential(nn.Linear(2, 2).double(), nn.Linear(2, 2).half()))
    assert model.flat.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters} == {torch.float32}


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_model_with_lazy_layers_is_an_input_error():
    with pytest.raises(InputError, match="must know the size of every layer when it is made, got one with lazy layers"):
        FlatModel(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))


def test_a_model_with_nothing_to_train_is_an_input_error():
    with pytest.raises(InputError, match="at least one trainable parameter"):
        FlatModel(nn.Flatten())


def test_stored_bytes_become_scaled_float32():
    x = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    examples = StoredExamples(x, np.array([1, 0]), DatasetSpec((3, 4), "real", 2, 1 / 16), "cpu").all()
    assert examples.x.dtype == torch.float32
    assert examples.x.tolist() == (x / 16).tolist()
    assert examples.y.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("input_kind", ["real", "token"])
def test_examples_are_copies_and_read_only_arrays_make_no_warning(dtype, input_kind):
    x, y = np.ones((2, 3), dtype), np.zeros(2, np.int64)
    x.setflags(write=False)
    y.setflags(write=False)
    examples = StoredExamples(x, y, DatasetSpec((3,), input_kind, 2, 0.5), "cpu").all()
    examples.x.add_(1)
    examples.y.add_(1)
    assert examples.x.dtype == (torch.int64 if input_kind == "token" else torch.float32)
    assert x.tolist() == np.ones((2, 3)).tolist()
    assert y.tolist() == [0, 0]


def test_windows_over_a_text_become_tokens():
    text = np.frombuffer(b"abcdef", np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(text, 4)
    examples = StoredExamples(windows, np.zeros(3, np.int64), DatasetSpec((4,), "token", 2), "cpu").all()
    assert bytes(examples.x[2].tolist()) == b"cdef"


@pytest.mark.parametrize("input_kind", ["real", "token"])
@pytest.mark.parametrize("writeable", [True, False])
def test_taken_of_what_is_stored_is_taken_of_what_the_model_gets(input_kind, writeable):
    x, y = np.arange(12).reshape(4, 3).astype(np.float32 if input_kind == "real" else np.uint8), np.arange(4)
    x.setflags(write=writeable)
    spec, rows = DatasetSpec((3,), input_kind, 12, 0.5), torch.tensor([2, 0, 3])
    examples = StoredExamples(x, y, spec, "cpu").all()
    taken = StoredExamples(x, y, spec, "cpu").take(rows)
    for tensor, expected, all_of_them in zip(taken, examples.take(rows), examples, strict=True):
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)
        assert torch.equal(tensor, all_of_them[rows])
        tensor.zero_()
    assert (x.sum(), y.sum()) == (66, 6)


def linear_model(weight):
    model = FlatModel(nn.Linear(2, 3, bias=False))
    model.load(torch.tensor(weight).reshape(-1))
    return model


def test_loss_and_error_of_each_example():
    weight = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
    x, y = np.array([[2.0, 1.0], [0.5, 3.0], [1.0, 0.0]]), np.array([0, 0, 2])
    logits = x @ weight.T
    model = linear_model(weight.tolist())
    loss, error = (values.detach() for values in model.measure(model.module(torch.tensor(x).float()), torch.tensor(y)))
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(3), y]
    assert loss.numpy() == pytest.approx(expected, rel=1e-6)
    assert error.tolist() == (logits.argmax(1) != y).tolist() == [0, 1, 1]


def test_a_nan_logit_is_an_error_though_argmax_names_the_right_class():
    model = linear_model([[1.0, 0.0], [float("nan"), 0.0], [0.0, 0.0]])
    examples = Examples(torch.ones(3, 2), torch.tensor([0, 1, 2]))
    assert model.module(examples.x).argmax(1).tolist() == [1, 1, 1]
    loss, error = model.measure(model.module(examples.x), examples.y)
    assert error.tolist() == [1, 1, 1]
    assert loss.isnan().all()

import copy
import itertools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedtune.client.examples import Examples, StoredExamples
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.errors import InputError
from fedtune_clients.compiled import compile_model
from fedtune_clients.hyperparameters import complete
from fedtune_clients.kernel_library import Library, load_library
from fedtune_clients.local_sgd import client_update, train
from fedtune_clients.models import cnn, logistic, lstm, mlp

pytestmark = pytest.mark.skipif(isinstance(load_library(), str), reason=str(load_library()))

IMAGES = DatasetSpec((4, 9), "real", 5, scale=1 / 255)
TARGETS = DatasetSpec((36,), "real", 0, objective="regression", target_shape=(3,))
TEXT = DatasetSpec((6,), "token", 11)


def activations(spec):
    """Every kind of layer between narrow and wide ones, nested."""
    inner = nn.Sequential(nn.Linear(36, 20), nn.Tanh(), nn.Dropout(0.0), nn.Linear(20, 17, bias=False))
    return nn.Sequential(
        nn.Sigmoid(), nn.Flatten(), inner, nn.Sigmoid(), nn.ReLU(), nn.Dropout(0.0), nn.Linear(17, spec.num_outputs)
    )


MODELS = {
    "logistic": (logistic, IMAGES),
    "mlp": (lambda spec: mlp(spec, hidden=[40, 9]), IMAGES),
    "activations": (activations, IMAGES),
    "regression": (activations, TARGETS),
    "lstm": (lambda spec: lstm(spec, embedding=3, hidden=16, layers=1), TEXT),
    "stacked lstm": (lambda spec: lstm(spec, embedding=5, hidden=21, layers=3), TEXT),
}
every_model = pytest.mark.parametrize("name", MODELS)


def make_model(name, seed=0):
    torch.manual_seed(seed)
    make, spec = MODELS[name]
    return FlatModel(make(spec), objective=spec.objective), spec


def make_examples(spec, n=23, seed=0):
    rng = np.random.default_rng(seed)
    if spec.objective == "regression":
        x, y = rng.standard_normal((n, *spec.input_shape)), rng.standard_normal((n, *spec.target_shape))
        return StoredExamples(x.astype(np.float32), y.astype(np.float32), spec, "cpu")
    most = spec.num_classes if spec.input_kind == "token" else 256
    x = rng.integers(0, most, (n, *spec.input_shape)).astype(np.uint8)
    return StoredExamples(x, rng.integers(0, spec.num_classes, n), spec, "cpu")


def compiled(model, spec):
    result = compile_model(model, spec)
    assert not isinstance(result, str), result
    return result


def generator(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def way(trained, sent):
    """How far training went; the distances of two forms are relative to it."""
    distance = float((trained - sent).norm())
    assert distance > 0
    return distance


def trained_in_float64(model, weights, examples, config):
    """The weights that local SGD gives in float64, by autograd. Without dropout."""
    model.load(weights)
    module, rng, values = copy.deepcopy(model.module).double().train(), generator(), complete(config)
    rng.integers(2**63)
    sgd = torch.optim.SGD(module.parameters(), lr=values["learning_rate"], momentum=values["momentum"])
    x, y = examples.all()
    for _ in range(values["epochs"]):
        for batch in torch.from_numpy(rng.permutation(len(y))).split(values["batch_size"]):
            sgd.zero_grad()
            inputs = x[batch].double() if x.is_floating_point() else x[batch]
            outputs, labels = module(inputs), y[batch]
            loss = model.loss(outputs, labels.double() if labels.is_floating_point() else labels)
            loss.backward()
            sgd.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])


# 23 examples: batches of 5 leave 3 for the last one, batches of 40 are all the examples at once.
SIZES = itertools.cycle([{"epochs": 1, "batch_size": 5}, {"epochs": 2, "batch_size": 40}, {"batch_size": 2}])
CONFIGS = [
    {"momentum": momentum, "weight_decay": weight_decay, "proximal_mu": mu, "dropout": dropout} | next(SIZES)
    for momentum, weight_decay, mu, dropout in itertools.product((0.0, 0.9), (0.0, 0.01), (0.0, 0.3), (0.0, 0.4))
]


@every_model
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_training_is_that_of_torch(name, config):
    """With every hyperparameter, within 1e-5 of the way.

    The rate is as large as training bears: the shorter a step, the more the rounding of the weights matters.
    """
    model, spec = make_model(name)
    examples, sent = make_examples(spec), model.flat.clone()
    config = complete({"learning_rate": 0.05 if spec.objective == "regression" else 0.5} | config)
    expected = client_update(model, sent, examples.all(), config, generator()).clone()
    trained = compiled(model, spec).train(sent, examples, config, generator()).clone()
    assert (trained - expected).norm() < 1e-5 * way(expected, sent)


@every_model
@pytest.mark.parametrize("num_examples", [1, 2, 3, 50])
def test_clients_of_any_size(name, num_examples):
    model, spec = make_model(name)
    examples, sent = make_examples(spec, num_examples), model.flat.clone()
    config = complete({"learning_rate": 0.5, "batch_size": 8, "epochs": 2})
    expected = client_update(model, sent, examples.all(), config, generator()).clone()
    trained = compiled(model, spec).train(sent, examples, config, generator()).clone()
    assert (trained - expected).norm() < 1e-5 * way(expected, sent)


@every_model
@pytest.mark.parametrize("learning_rate", [0.01, 1.0])
def test_it_is_as_near_to_float64_as_torch_is(name, learning_rate):
    """At a small rate the rounding of the weights is more than 1e-5 of the way that training goes, in torch too."""
    model, spec = make_model(name)
    examples, sent = make_examples(spec, 60), model.flat.clone()
    config = complete({"learning_rate": learning_rate, "epochs": 2})
    exact = trained_in_float64(model, sent, examples, config)
    in_torch = train(model, sent, examples.all(), config, generator()).clone()
    trained = compiled(model, spec).train(sent, examples, config, generator()).clone()
    distance = way(exact, sent)
    error_of_torch = float((in_torch - exact).norm()) / distance
    assert float((trained - exact).norm()) / distance < max(1e-5, 2 * error_of_torch)


@pytest.mark.parametrize("name", ["logistic", "mlp", "stacked lstm", "regression"])
def test_weights_that_diverge_do_so_as_in_torch(name):
    model, spec = make_model(name)
    examples, sent = make_examples(spec), model.flat.clone()
    config = complete({"learning_rate": 1e38, "epochs": 3, "momentum": 0.9})
    expected = client_update(model, sent, examples.all(), config, generator()).clone()
    trained = compiled(model, spec).train(sent, examples, config, generator()).clone()
    assert not expected.isfinite().all()
    assert not trained.isfinite().all()


@every_model
def test_nan_stays_nan(name):
    model, spec = make_model(name)
    examples, sent = make_examples(spec), model.flat.clone()
    sent[-1] = torch.nan  # of the last layer's bias
    form = compiled(model, spec)
    losses, errors = form.measure(sent, examples)
    assert np.isnan(losses).all()
    assert (errors == 1).all() if spec.objective == "classification" else np.isnan(errors).all()
    assert form.train(sent, examples, complete({}), generator())[-1].isnan()


@every_model
@pytest.mark.parametrize("num_examples", [1, 31, 300])
def test_measures_are_those_of_torch(name, num_examples):
    """More examples than a batch, and fewer."""
    model, spec = make_model(name)
    examples = make_examples(spec, num_examples)
    with torch.no_grad():
        model.module.eval()
        x, y = examples.all()
        expected = model.measure(model.module(x), y)
    losses, errors = compiled(model, spec).measure(model.flat.clone(), examples)
    assert losses == pytest.approx(expected.loss.numpy(), rel=1e-5, abs=1e-6)
    assert errors == pytest.approx(expected.error.numpy(), rel=1e-5)


@every_model
def test_the_bits_do_not_depend_on_what_was_trained_before(name):
    """Nor on the form of the examples, if they need no scale: as they are stored, converted, or as views."""
    model, spec = make_model(name)
    sent, examples, others = model.flat.clone(), make_examples(spec), make_examples(spec, 40, seed=1)
    form, config = compiled(model, spec), complete({"dropout": 0.2, "momentum": 0.5, "batch_size": 4})
    first = form.train(sent, examples, config, generator()).clone()
    form.train(sent, others, config | {"batch_size": 16}, generator(3))
    form.measure(sent, others)
    assert torch.equal(form.train(sent, examples, config, generator()), first)
    fresh, _ = make_model(name)
    x, y = examples.arrays
    twice = np.repeat(x, 2, axis=0)[::2]  # every other row of a larger array
    twice.flags.writeable = False
    again = compiled(fresh, spec).train(sent, StoredExamples(twice, y, spec, "cpu"), config, generator())
    assert torch.equal(again, first)


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.float32, np.int64])
def test_inputs_of_other_types_are_converted(dtype):
    model, spec = make_model("mlp")
    examples = make_examples(spec)
    x, y = examples.arrays
    other = StoredExamples(x.astype(dtype), y, spec, "cpu")
    form, config, sent = compiled(model, spec), complete({}), model.flat.clone()
    expected = form.train(sent, examples, config, generator()).clone()
    assert torch.equal(form.train(sent, other, config, generator()), expected)
    assert torch.equal(form.train(sent, examples.all(), config, generator()), expected)


def test_local_sgd_trains_in_the_kernel_if_the_model_carries_it():
    model, spec = make_model("mlp")
    sent, examples = model.flat.clone(), make_examples(spec)
    in_torch = train(model, sent, examples.all(), {}, generator()).clone()
    model.compiled = compiled(model, spec)
    in_kernel = train(model, sent, examples, {}, generator()).clone()
    assert torch.equal(in_kernel, model.compiled.train(sent, examples, complete({}), generator()))
    assert not torch.equal(in_kernel, in_torch)
    with torch.autocast("cpu", torch.bfloat16):  # which the kernel does not know
        in_bf16 = train(model, sent, examples.all(), {}, generator())
    assert (in_bf16 - in_torch).norm() > 1e-4 * way(in_torch, sent)


def test_labels_and_tokens_that_the_model_does_not_know():
    model, spec = make_model("lstm")
    x, y = make_examples(spec).arrays
    form, config = compiled(model, spec), complete({})
    for wrong in (-1, 11, 2**40):
        labels = y.copy()
        labels[3] = wrong
        with pytest.raises(InputError, match=rf"^labels must be in 0\.\.10, got {wrong}$"):
            form.train(model.flat.clone(), StoredExamples(x, labels, spec, "cpu"), config, generator())
        tokens = x.astype(np.int64)
        tokens[3, 2] = wrong
        for call in (
            lambda examples: form.train(model.flat.clone(), examples, config, generator()),
            lambda examples: form.measure(model.flat.clone(), examples),
        ):
            with pytest.raises(InputError, match=rf"^tokens must be in 0\.\.10, got {wrong}$"):
                call(StoredExamples(tokens, y, spec, "cpu"))


def test_examples_of_another_shape_or_type():
    model, spec = make_model("mlp")
    form = compiled(model, spec)
    x, y = make_examples(spec).all()
    for examples in (
        Examples(x[:, :3], y),
        Examples(x, y.int()),
        Examples(x.double(), y),
        Examples(x, y[:, None].expand(-1, 2)),
    ):
        with pytest.raises(InputError, match=r"^examples must have shapes \(4, 9\) and \(\), got "):
            form.train(model.flat.clone(), examples, complete({}), generator())


def reason(module, spec=IMAGES, **options):
    result = compile_model(FlatModel(module, objective=spec.objective, **options), spec)
    assert isinstance(result, str)
    return result


def with_hook():
    module = logistic(IMAGES)
    module[-1].register_forward_hook(lambda *_: None)
    return module


def with_frozen_weight():
    module = logistic(IMAGES)
    module[-1].bias.requires_grad_(False)
    return module


def with_shared_weight():
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 36), nn.Linear(36, 5))
    module[3].weight = module[1].weight
    return module


def with_own_forward():
    module = logistic(IMAGES)
    module[-1].forward = lambda x: cross_entropy
    return module


def with_own_weight():
    module = logistic(IMAGES)
    module[-1].register_parameter("scale", nn.Parameter(torch.ones(1)))
    return module


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.LogSoftmax(1)), "doesn't know the layer LogSoftmax"),
        (lambda: cnn(DatasetSpec((4, 8), "real", 5)), "doesn't know the layer Conv2d"),
        (lambda: nn.Sequential(nn.Linear(9, 5), nn.Flatten(), nn.Linear(20, 5)), r"gets inputs of shape \(4, 9\)"),
        (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(36, 5)), "nn.Flatten of all axes after the first only"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), "must have 5 outputs, got 4"),
        (lambda: nn.Sequential(nn.Flatten(), *[nn.Tanh()] * 64, nn.Linear(36, 5)), "at most 64 layers"),
        (with_hook, "a layer has a hook"),
        (with_own_forward, "a forward of its own"),
        (with_frozen_weight, "not trained"),
        (with_shared_weight, "shared"),
        (with_own_weight, "used by no layer"),
    ],
)  # fmt: skip
def test_models_that_the_kernel_does_not_know(make, why):
    assert re.search(why, reason(make()))


def test_lstms_that_the_kernel_does_not_know():
    for change, why in [
        (lambda model: setattr(model.layers[0], "bidirectional", True), "plain nn.LSTM"),
        (lambda model: setattr(model.dropouts, "0", nn.Identity()), "plain nn.LSTM"),
        (lambda model: setattr(model.embedding, "padding_idx", 0), "nn.Embedding without options"),
    ]:
        module = lstm(TEXT, hidden=4, layers=1)
        change(module)
        assert why in reason(module, TEXT)


def test_objectives_that_the_kernel_does_not_know():
    spec = DatasetSpec((6,), "token", 11, objective="next_token", target_shape=(6,))
    assert "doesn't know the objective 'next_token'" in reason(lstm(TEXT, hidden=4, layers=1), spec)


def test_numbers_for_a_model_of_tokens():
    spec = DatasetSpec((6,), "real", 11)
    assert "begin with an embedding" in reason(lstm(TEXT, hidden=4, layers=1), spec)


def test_the_library_says_what_it_was_built_from():
    library = load_library()
    assert isinstance(library, Library)
    digest, compiler, *_ = library.built_from.split()
    assert len(digest) == 16
    assert compiler
    assert compiled(*make_model("mlp")).digest == library.built_from


IN_ANOTHER_PROCESS = "from fedtune_clients.kernel_library import load_library; print(load_library())"


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("ATEN_CPU_CAPABILITY", "default", "the kernel needs a processor with AVX2"),
        ("FEDTUNE_KERNEL_LIBRARY", "no/such.so", "there is no kernel, such.so"),
        ("FEDTUNE_KERNEL_LIBRARY", __file__, "the kernel can't be loaded"),
        ("FEDTUNE_KERNEL_LIBRARY", torch._C.__file__, "the kernel can't be loaded"),
    ],
)
def test_why_there_is_no_kernel(variable, value, why):
    environment = os.environ | {variable: value}
    answer = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], env=environment, capture_output=True, text=True)
    assert answer.stdout.startswith(why), answer.stderr

import torch

from fedtune import plugins
from fedtune.client.flat_model import FlatModel
from fedtune.initial_weights import initial_weights
from fedtune.settings import resolve


def test_the_initial_weights_depend_on_the_seed_alone():
    settings = resolve([{"data": {"name": "digits"}}])
    spec = plugins.load_dataset({"name": "digits", "num_clients": 3}).spec
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = initial_weights(settings, spec, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(initial_weights(settings, spec, 0), first)
    assert not torch.equal(initial_weights(settings, spec, 1), first)
    assert first.shape == (FlatModel(plugins.make_model(settings.model, spec)).num_weights,)

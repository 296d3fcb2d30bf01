"""The weights of a run's model before the first round."""

import torch
from jaxtyping import Float

from fedtune import plugins, rng
from fedtune.client.flat_model import FlatModel
from fedtune.data.spec import DatasetSpec
from fedtune.settings import Settings


def initial_weights(settings: Settings, spec: DatasetSpec, seed: int) -> Float[torch.Tensor, "weight"]:
    """The model's weights before the first round, the same for every tuner of a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.derived_seed(seed, "initial weights"))
        return FlatModel(plugins.make_model(settings.model, spec)).flat.clone()

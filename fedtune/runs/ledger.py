"""What a study has asked, spent, retried, scored and extended."""

from fedtune.settings import ExtensionSettings
from fedtune.tuning.trial import Extendable, Tuner

MOST_ATTEMPTS = 1000  # at one job


def extend(tuner: Tuner, extension: ExtensionSettings) -> None:
    """Lets a tuner draw as many configurations in all as the extension says. Raises InputError where it can't."""
    if extension.num_configs is not None:
        assert isinstance(tuner, Extendable)
        tuner.raise_num_configs(extension.num_configs)

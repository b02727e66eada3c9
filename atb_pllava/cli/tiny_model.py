"""The tiny model in a clone of the repository, which some commands use when no model is named."""

from atb_pllava.doctor.required_packages import CLONE
from atb_pllava.errors import ConfigError


def tiny_model() -> str:
    """The path of the tiny model. Raises ConfigError in an installed package, which has no examples."""
    path = CLONE / "examples" / "tiny_pllava"
    if not path.is_dir():
        raise ConfigError("name a checkpoint with --model_path; the tiny model is in a clone of the repository only")
    return str(path)

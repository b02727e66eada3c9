"""How much of a card the weights of a checkpoint take, by the headers of its files."""

import os

from atb_pllava.loader.weight_loader import open_checkpoint

# What the host splits over the cards: the decoder's layers and the head. All else is on every card.
_SPLIT = ("language_model.model.layers.", "language_model.lm_head.")


def weight_bytes(model_path: str | os.PathLike[str], world_size: int) -> int:
    """Bytes of the weights on each of `world_size` cards. Raises CheckpointError for a directory that cannot load."""
    stored = open_checkpoint(model_path).base.tensors
    split = sum(tensor.num_bytes for name, tensor in stored.items() if name.startswith(_SPLIT))
    return -(-split // world_size) + sum(t.num_bytes for name, t in stored.items() if not name.startswith(_SPLIT))

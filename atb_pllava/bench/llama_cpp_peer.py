"""llama.cpp on a GGUF file of the same shape, through llama-cpp-python. The package is optional.

llama.cpp has no PLLaVA, so it is compared on text prompts of the same length at batch size 1. Attention and cache are
those that were fastest on CPUs: no flash attention, float16 keys and values.
"""

from collections.abc import Sequence
from typing import Any

from atb_pllava.config import TextConfig
from atb_pllava.errors import ConfigError


class LlamaCppPeer:
    """A loaded GGUF file. Raises ConfigError without the package, and for a file with other sizes."""

    def __init__(self, path: str, config: TextConfig, context: int, threads: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise ConfigError("--gguf needs llama.cpp: pip install llama-cpp-python") from None
        try:
            both = {"n_threads": threads, "n_threads_batch": threads}
            self._llama: Any = llama_cpp.Llama(path, n_ctx=context, n_batch=512, verbose=False, **both)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--gguf {path} cannot be loaded by llama.cpp: {error}") from None
        self.name = f"llama.cpp ({self._llama.metadata.get('general.name', path)})"
        self._check(path, config)

    def _check(self, path: str, config: TextConfig) -> None:
        wanted = {
            "block_count": config.num_hidden_layers,
            "embedding_length": config.hidden_size,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
        }
        found = {name: self._llama.metadata.get(f"llama.{name}") for name in wanted}
        if found != {name: str(number) for name, number in wanted.items()}:
            raise ConfigError(f"--gguf {path} has sizes {found}, the shape has {wanted}: make it of the same shape")

    def prefill(self, token_ids: Sequence[int]) -> None:
        """Compute a whole prompt."""
        self._llama.reset()
        self._llama.eval(list(token_ids))

    def decode(self) -> None:
        """Compute one token after the prompt. The token does not stay in the context."""
        self._llama.eval([1])
        self._llama.n_tokens -= 1  # the next call overwrites it

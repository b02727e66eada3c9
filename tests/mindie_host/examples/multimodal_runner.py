"""The runner for models with media."""

from typing import Any

from examples.run_pa import PARunner


class MultimodalPARunner(PARunner):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.processor = None
        self.max_prefill_tokens = kwargs["max_prefill_tokens"]
        self.init_processor()

    def init_processor(self) -> None:
        raise AssertionError("AutoProcessor does not know this model")

"""MindIE's class that turns chat messages into token ids. The stand-in raises."""

from collections.abc import Iterable
from typing import Any


class InputBuilder:
    def __init__(
        self,
        tokenizer: Any,
        chat_template: str = "",
        system_role_name: str = "system",
        user_role_name: str = "user",
        max_length: int = 2048,
    ) -> None:
        assert not chat_template and (system_role_name, user_role_name) == ("system", "user")
        self.tokenizer = tokenizer
        self.max_length = max_length

    @staticmethod
    def generate_position_ids(input_ids: Any) -> Iterable[int]:
        return range(len(input_ids))

    def make_context(self, rank: int, conversation: Any, *arguments: Any, **keywords: Any) -> list[int]:
        raise RuntimeError("The model does not appear to be a chat model")

"""A tokenizer that the tests of prompts share."""

import pytest

from atb_pllava.prompt.tokenizer import Tokenizer
from tests.support import IMAGE_ID, tokenizer_definition


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(tokenizer_definition(), IMAGE_ID, "tokenizer.json")

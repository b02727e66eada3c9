"""A request: the embeddings of its prompt, and room for its answer."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class MultiModalReqParams:
    text: Any
    image: Any
    video: Any
    audio: Any
    max_out_length: int
    block_size: int
    req_idx: int
    adapter_id: str | None = None
    batch_size: int = 1


class MultiModalRequest:
    def __init__(self, embeddings: Any, max_out_length: int, block_size: int) -> None:
        self.input_ids = embeddings
        self.input_length = embeddings.shape[0]
        self.need_blocks = math.ceil((self.input_length + max_out_length) / block_size)
        self.out_token_list: list[int] = []


def request_from_multimodalinputs(processor: Any, model: Any, multimodalparams: MultiModalReqParams) -> Any:
    embeddings = model.model.prepare_prefill_token(multimodalparams, processor)
    return MultiModalRequest(embeddings, multimodalparams.max_out_length, multimodalparams.block_size)

"""Fields that the requests of other servers have and this server treats alone: without effect, refused, or unknown."""

import logging
from typing import Any

from atb_pllava.server.api_error import ApiError

logger = logging.getLogger(__name__)

# Fields that are accepted and change nothing: they say who asks, or how a provider should bill and cache.
WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)

# Fields of OpenAI's API and of vLLM that this server lacks. Each has the values that ask for nothing; null always does.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logits_processors": ([],),
    "min_p": (0,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "priority": (0,),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_INSTEAD = {"best_of": "; use n", "use_beam_search": "; use num_beams"}
_MOST_NAMES_WARNED_OF = 100

_warned_of: set[str] = set()


def check_other_fields(fields: dict[str, Any], at: str = "") -> None:
    """Raises ApiError for an unsupported field. Logs one warning for each unknown name. `at` is the object's path."""
    for name, value in fields.items():
        if name in WITHOUT_EFFECT:
            continue
        path = f"{at}.{name}" if at else name
        if name not in UNSUPPORTED:
            _warn_once(name)
        elif value is not None and value not in UNSUPPORTED[name]:
            hint = _INSTEAD.get(name, "; leave it out")
            raise ApiError(400, "unsupported_field", f"{path} is not supported{hint}", path)


def _warn_once(name: str) -> None:
    """Warn of the first 100 unknown names. A client that invents names must not fill the log."""
    if name not in _warned_of and len(_warned_of) < _MOST_NAMES_WARNED_OF:
        _warned_of.add(name)
        logger.warning("requests have an unknown field, which is ignored: %s", ascii(name[:80]))

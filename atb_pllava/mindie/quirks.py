"""Register of the host's quirks that this package works around: what, where, how, and when that may go.

Read from Ascend/MindIE-LLM at 8b4871a (April 2026); paths are relative to its `examples/atb_models` unless they start
with `mindie_llm` or `src`. Code that is as it is because of one of them says its number.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirk:
    """`where` in the host, `what` is odd, what we do (`handled`) and in which of our files (`by`), and `until` when."""

    number: int
    where: str
    what: str
    handled: str
    by: str
    until: str


QUIRKS = (
    Quirk(
        1, "atb_llm/models/__init__.py: get_model",
        "only folders that lie in atb_llm/models are models; no entry point, no search path",
        "one self-contained folder that can be linked, copied or offered by an import hook",
        "plugin/pllava/__init__.py", "the host has a registry of models"),
    Quirk(
        2, "atb_llm/models/__init__.py: get_model",
        'model_type "llava", which published PLLaVA says, goes to LlavaRouter before any of our code is asked',
        'the converter writes model_type "pllava"; our commands and the import hook refuse others, naming the command; '
        "with the folder linked, and MindIE started by hand, the host's LLaVA fails on the names of the weights",
        "host_checks.py", "published checkpoints say pllava"),
    Quirk(
        3, "atb_llm/models/llama/flash_causal_llama.py: prepare_inputs_for_ascend",
        "one flag, skip_word_embedding, decides which input slot holds what in prefill and decode, while the decode "
        "graph is always built with embedding; and the prefill graph is built with the flag of the first call",
        "the flag is set before every forward, and before the graphs are built",
        "plugin/pllava/flash_causal_pllava.py", "FlashLlama looks at is_prefill itself"),
    Quirk(
        4, "atb_llm/utils/weights.py: get_partial_sharded_padding_gqa",
        "grouped heads that do not come out even over the cards are dealt out wrongly, without an error",
        "such world sizes are refused", "host_checks.py", "the host is exact or refuses them itself"),
    Quirk(
        5, "atb_framework/models/base/model/decoder_model.cpp",
        "the prefill graph writes its result into the tensor of embeddings it is given",
        "what it gets is a tensor nobody else holds: new ones in the service, a copy of the caller's in the runner",
        "plugin/pllava/flash_causal_pllava.py", "the engine has a buffer of its own"),
    Quirk(
        6, "atb_llm/runner/model_runner.py: load_weights",
        "any TypeError of a model's constructor makes it call again with two arguments only, and the second error "
        "hides the first",
        "a TypeError leaves our constructor as another error",
        "plugin/pllava/flash_causal_pllava.py", "the retry is gone"),
    Quirk(
        7, "atb_llm/models/base/router.py: get_config",
        "an error in a model's config class is logged, and a plain PretrainedConfig used in its place",
        "get_config is overridden", "plugin/pllava/router_pllava.py", "the fallback is gone"),
    Quirk(
        8, "atb_llm/models/base/router.py: config",
        "the model length of MindIE's config.json is set on the top level of a config after it is built, the rotary "
        "table is made from text_config",
        "text_config gets the larger one; a position beyond the table is an error",
        "plugin/pllava/router_pllava.py", "the host passes the length to text_config"),
    Quirk(
        9, "atb_llm/models/base/config.py: from_dict; base/router.py: check_config",
        "top_k is set to 1000 where config.json says nothing, and then has to be at most the vocabulary",
        "top_k is set to the smaller of the two", "plugin/pllava/router_pllava.py", "the default fits"),
    Quirk(
        10, "mindie_llm/tokenizer/tokenizer.py: encode, encode_chat",
        "media files are deleted when the prompt is tokenised, before the model sees it",
        "frames are read then and wait in shared memory", "segments.py", "files live as long as the request"),
    Quirk(
        11, "atb_llm/utils/shm_utils.py: get_data_from_shm",
        "a segment that is gone becomes a tensor of uninitialised memory, and a warning",
        "segments have our own header and our own reader, which raises", "segments.py", "it raises"),
    Quirk(
        12, "mindie_llm/tokenizer/io_utils.py: remove_cache_dir",
        "segments are freed by names in the request's shm_name.txt, whose path is not passed along in the service",
        "names go to the file two folders above the media", "prompt_builder.py", "the path is passed"),
    Quirk(
        13, "atb_llm/models/base/input_builder.py: make_context",
        "chat truncation cuts ids wherever the limit falls, through videos and turn markers",
        "user text is shortened instead, everything else stays whole", "dialogue.py", "never: it is better so"),
    Quirk(
        14, "mindie_llm/text_generator/generator.py: warm_up",
        "the warm-up, after which free memory becomes KV cache, has text only; and without npuMemSize sizes are "
        "guessed from top-level keys with another model's defaults",
        "the first forward encodes a grey video; config.json has the language model's sizes on its top level",
        "plugin/pllava/flash_causal_pllava.py", "multimodal warm-up exists"),
    Quirk(
        15, "atb_framework: lm_head over ranks",
        "a vocabulary that does not come out even gets columns of logits 0 at its end, which can win",
        "logits are cut to the vocabulary", "plugin/pllava/flash_causal_pllava.py", "the host cuts them"),
    Quirk(
        16, "mindie_llm/text_generator/generator.py: eos_token_id; examples/server: Postprocessor",
        "generation ends at the config's eos_token_id only, not at the marker that ends a template's turns",
        "both are in eos_token_id", "plugin/pllava/router_pllava.py", "never: templates are ours"),
    Quirk(
        17, "mindie_llm/modeling/model_wrapper/atb/atb_model_wrapper.py; models/llama/flash_causal_llama.py",
        "there are two classes InferenceMode; with the one that is the default FlashLlama fails in its first forward",
        "modes that mean something are refused, and none is passed on",
        "plugin/pllava/flash_causal_pllava.py", "one class is left"),
    Quirk(
        18, "mindie_llm/text_generator/utils/batch_context.py; samplers/logits_handlers/pta_handlers.py",
        "for a repetition penalty prompts are cut to int32 and their ids used as indices, which may not be negative",
        "our negative ids become, when cut, positive ones beyond the vocabulary, which have a column of their own",
        "media_ids.py", "the host leaves negative ids out"),
    Quirk(
        19, "atb_llm/models/base/flash_causal_lm.py: head_size",
        "a llama's head size is hidden_size / num_attention_heads, whatever head_dim says",
        "another head_dim is refused", "host_checks.py", "the host reads head_dim"),
    Quirk(
        20, "atb_llm/utils/weights.py: get_sharded",
        "scales of column groups are dealt out by their own number, whatever the columns' share of a card is",
        "shares that are no whole groups are refused", "host_checks.py", "the host is exact or refuses them itself"),
)  # fmt: skip

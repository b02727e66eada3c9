"""The register of MindIE's quirks that this package works around: what, where, how, and until when.

Read from Ascend/MindIE-LLM at 8b4871a (April 2026). Paths are relative to its `examples/atb_models`, unless they start
with `mindie_llm` or `src`. A comment "quirk N" in other files of this package refers to number N here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirk:
    """One quirk. where: file and function of MindIE. what: how it behaves. handled: what this package does instead.

    by: the file of this package, relative to `mindie/`. until: the change of MindIE that makes the workaround needless.
    """

    number: int
    where: str
    what: str
    handled: str
    by: str
    until: str


QUIRKS = (
    Quirk(
        1, "atb_llm/models/__init__.py: get_model",
        "Only folders in atb_llm/models are models. There is no entry point and no search path.",
        "The plugin is one self-contained folder, which is linked, copied, or found by an import hook.",
        "plugin/pllava/__init__.py", "MindIE has a registry of models"),
    Quirk(
        2, "atb_llm/models/__init__.py: get_model",
        'model_type "llava", which published PLLaVA has, goes to LlavaRouter before the plugin is asked.',
        'The converter writes model_type "pllava". The commands and the import hook refuse other types and print the '
        "conversion command. With a linked folder and MindIE started by hand, MindIE's LLaVA fails on tensor names.",
        "host_checks.py", "published checkpoints have model_type pllava"),
    Quirk(
        3, "atb_llm/models/llama/flash_causal_llama.py: prepare_inputs_for_ascend",
        "One flag, skip_word_embedding, chooses the input slots of prefill and decode. The decode graph always has an "
        "embedding. The prefill graph is built with the flag of the first call.",
        "The flag is set before every forward, and before the graphs are built.",
        "plugin/pllava/flash_causal_pllava.py", "FlashLlama looks at is_prefill itself"),
    Quirk(
        4, "atb_llm/utils/weights.py: get_partial_sharded_padding_gqa",
        "Grouped attention heads that the cards do not divide evenly are split wrongly, without an error.",
        "Such world sizes are refused.", "host_checks.py", "MindIE is exact, or refuses them"),
    Quirk(
        5, "atb_framework/models/base/model/decoder_model.cpp",
        "The prefill graph writes its result into the tensor of embeddings that it is given.",
        "The graph gets a tensor that nobody else holds: a new one in the service, a copy in the PA runner.",
        "plugin/pllava/flash_causal_pllava.py", "the engine has a buffer of its own"),
    Quirk(
        6, "atb_llm/runner/model_runner.py: load_weights",
        "A TypeError of a model's constructor leads to a second call with two arguments. The second error hides the "
        "first.",
        "The constructor turns a TypeError into a BackendError.",
        "plugin/pllava/flash_causal_pllava.py", "the second call is gone"),
    Quirk(
        7, "atb_llm/models/base/router.py: get_config",
        "An error of a model's configuration class is logged, and a plain PretrainedConfig is used instead.",
        "get_config is overridden.", "plugin/pllava/router_pllava.py", "the fallback is gone"),
    Quirk(
        8, "atb_llm/models/base/router.py: config",
        "The model length of MindIE's config.json is set on the top level of a built configuration. The rotary table "
        "is made from text_config.",
        "text_config gets the larger of the two lengths. A position beyond the table is an error.",
        "plugin/pllava/router_pllava.py", "MindIE passes the length to text_config"),
    Quirk(
        9, "atb_llm/models/base/config.py: from_dict; base/router.py: check_config",
        "Without top_k in config.json MindIE sets it to 1000, and then refuses a top_k above the vocabulary size.",
        "top_k is the smaller of the two.", "plugin/pllava/router_pllava.py", "the default fits"),
    Quirk(
        10, "mindie_llm/tokenizer/tokenizer.py: encode, encode_chat",
        "Media files are deleted when the prompt is tokenised, before the model reads them.",
        "The tokenizer process reads the frames and writes them into shared memory.",
        "segments.py", "files live as long as the request"),
    Quirk(
        11, "atb_llm/utils/shm_utils.py: get_data_from_shm",
        "A segment that does not exist becomes a tensor of uninitialised memory, with a warning.",
        "Segments have a header and a reader of this package, which raises.", "segments.py", "it raises"),
    Quirk(
        12, "mindie_llm/tokenizer/io_utils.py: remove_cache_dir",
        "Segments are freed by the names in the request's shm_name.txt, whose path the service does not pass on.",
        "The names go to the file two folders above the media.", "prompt_builder.py", "the path is passed"),
    Quirk(
        13, "atb_llm/models/base/input_builder.py: make_context",
        "Truncation of a chat cuts the token ids at the limit, through videos and turn markers.",
        "Only the text of questions and answers is shortened.", "truncation.py", "never: videos stay whole this way"),
    Quirk(
        14, "mindie_llm/text_generator/generator.py: warm_up",
        "The warm-up, after which free memory becomes KV cache, has text only. Without npuMemSize the cache size is "
        "computed from top-level keys, with another model's defaults.",
        "The first forward encodes a grey video. config.json has the language model's sizes on its top level.",
        "plugin/pllava/flash_causal_pllava.py", "MindIE warms up with media"),
    Quirk(
        15, "atb_framework: lm_head over ranks",
        "A vocabulary that the ranks do not divide evenly gets extra columns of logits 0, which can win.",
        "The logits are cut to the vocabulary.", "plugin/pllava/flash_causal_pllava.py", "MindIE cuts them"),
    Quirk(
        16, "mindie_llm/text_generator/generator.py: eos_token_id; examples/server: Postprocessor",
        "Generation ends at the configuration's eos_token_id, and not at the token that ends a template's turns.",
        "eos_token_id has both.", "plugin/pllava/router_pllava.py", "never: the templates are this package's"),
    Quirk(
        17, "mindie_llm/modeling/model_wrapper/atb/atb_model_wrapper.py; models/llama/flash_causal_llama.py",
        "There are two classes InferenceMode. With the default one FlashLlama fails in its first forward.",
        "Modes other than plain decoding are refused, and no mode is passed on.",
        "plugin/pllava/flash_causal_pllava.py", "one class is left"),
    Quirk(
        18, "mindie_llm/text_generator/utils/batch_context.py; samplers/logits_handlers/pta_handlers.py",
        "A repetition penalty cuts prompt ids to int32 and uses them as indices, which may not be negative.",
        "The negative ids of a video become, when cut, positive ids beyond the vocabulary, which have a column of "
        "their own.",
        "media_ids.py", "MindIE leaves negative ids out"),
    Quirk(
        19, "atb_llm/models/base/flash_causal_lm.py: head_size",
        "A llama's head size is hidden_size / num_attention_heads, whatever head_dim says.",
        "Another head_dim is refused.", "host_checks.py", "MindIE reads head_dim"),
    Quirk(
        20, "atb_llm/utils/weights.py: get_sharded",
        "The scales of column groups are split by their own number, whatever columns a card has.",
        "World sizes that cut through groups are refused.", "host_checks.py", "MindIE is exact, or refuses them"),
)  # fmt: skip

"""The classes, functions and attributes of MindIE's atb_llm that the plugin relies on, and their check.

MindIE has no version number that tells whether these parts are there. `mindie install` therefore parses MindIE's source
files with `ast` before it registers the plugin. No module of MindIE is imported, and no code of MindIE runs.

A contract maps a file to lines. Each line has one of five forms:
    def f(a, b, **kwargs)   a function, or a method as `Class.f`, takes these parameters first, in this order. Further
                            parameters must have a default. `**kwargs` in the line must be in the function
    class C(a, b)           the annotated fields of a class begin with these, in this order
    .C.x                    a method of class C assigns the attribute x
    uses f name             function f reads `name`
    Name                    the module defines, assigns or imports Name
A file with no lines must exist.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTRACT: dict[str, tuple[str, ...]] = {
    "models/__init__.py": (
        "def get_model(model_name_or_path, is_flash_causal_lm, load_tokenizer, max_position_embeddings, revision, "
        "tokenizer_path, trust_remote_code, enable_atb_torch, enable_edge, llm_config_path, models_dict, "
        "sub_model_path)",
        "uses get_model __file__",  # the import hook gives get_model another __file__
        "safe_get_config_dict",
    ),
    "models/base/router.py": (
        "class BaseRouter(model_name_or_path, config_dict, is_flash_causal_lm, load_tokenizer, "
        "max_position_embeddings, revision, tokenizer_path, trust_remote_code, enable_atb_torch, enable_edge, "
        "llm_config, sub_model_path)",
        "def BaseRouter.config(self)",
        "def BaseRouter.tokenizer(self)",
        "def BaseRouter.input_builder(self)",
        "def BaseRouter.check_config(config)",
        "def BaseRouter.tokenize(self, inputs, **kwargs)",
        "def BaseRouter.get_config(self)",
        "def BaseRouter.get_config_cls(self)",
        "def BaseRouter.get_model_cls(self)",
        "def BaseRouter.get_tokenizer(self)",
        "def BaseRouter.get_input_builder(self)",
        "def BaseRouter.generation_config(self)",
        "def BaseRouter.custom_chat_template(self)",
    ),
    "models/base/config.py": ("def BaseConfig.from_dict(cls, config_dict, **kwargs)",),
    "models/llama/config_llama.py": ("LlamaConfig",),
    "models/llama/modeling_llama.py": (".FlashLlamaModel.embed_tokens",),
    "models/base/input_builder.py": (
        "def InputBuilder.__init__(self, tokenizer, chat_template, system_role_name, user_role_name, max_length)",
        "def InputBuilder.make_context(self, rank, conversation, add_generation_prompt, adapt_to_max_length, **kwargs)",
        "def InputBuilder.generate_position_ids(input_ids)",
    ),
    "models/base/flash_causal_lm.py": (
        "def FlashForCausalLM.__init__(self, config, weights, **kwargs)",
        "def FlashForCausalLM.forward(self, input_ids, position_ids, is_prefill, kv_cache, block_tables, slots, "
        "input_lengths, max_seq_len, lm_head_indices, **kwargs)",
        ".FlashForCausalLM.ascend_weight",
        ".FlashForCausalLM.max_position_embeddings",
    ),
    "models/llama/flash_causal_llama.py": (
        "def FlashLlamaForCausalLM.__init__(self, config, weights, lmhead_prefix, model_prefix, **kwargs)",
        "def FlashLlamaForCausalLM.prepare_inputs_for_ascend(self, input_ids, position_ids, is_prefill, kv_cache, "
        "block_tables, slots, input_lengths, max_seq_len, lm_head_indices, **kwargs)",
        "def FlashLlamaForCausalLM.init_ascend_weight(self)",
        ".FlashLlamaForCausalLM.skip_word_embedding",
    ),
    "utils/weights.py": (
        "def Weights.__init__(self, model_name_or_path, device, dtype, process_group, quantize, is_gqa, extension, "
        "aliases, mapping, **kwargs)",
        ".Weights.device",
        ".Weights.dtype",
        ".Weights.mapping",
        ".Weights.process_group",
    ),
    "utils/shm_utils.py": ("def release_shared_memory(file_path)",),  # frees the plugin's segments by their names
    "utils/configuration_utils.py": ("def LLMConfig.get(self, key)",),
    "conf/config.json": (),
}

# The contract with MindIE's example programs, which only `mindie/runner.py` uses. Paths are relative to the directory
# that holds the package `examples`.
RUNNER_CONTRACT: dict[str, tuple[str, ...]] = {
    "examples/multimodal_runner.py": (
        "def MultimodalPARunner.__init__(self, **kwargs)",
        "def MultimodalPARunner.init_processor(self)",
    ),
    "examples/run_pa.py": (
        ".PARunner.block_size",
        ".PARunner.cache_manager",
        ".PARunner.model",
        ".PARunner.model_config",
        ".PARunner.tokenizer",
    ),
    "examples/server/cache.py": (
        "def CacheConfig.__init__(self, num_blocks, block_size)",
        "def CacheManager.__init__(self, cache_config, model_config)",
    ),
    "examples/server/request.py": (
        "class MultiModalReqParams(text, image, video, audio, max_out_length, block_size, req_idx, adapter_id, "
        "batch_size)",
        "def request_from_multimodalinputs(processor, model, multimodalparams)",
    ),
    "examples/server/generate.py": (
        "def generate_req(req_list, model, max_batch_size, max_prefill_tokens, cache_manager)",
    ),
}


def check_contract(root: Path, contract: dict[str, tuple[str, ...]]) -> list[str]:
    """One sentence for each line of `contract` that the files in the directory `root` do not fulfil."""
    return [problem for name, lines in contract.items() for problem in _check_file(root / name, lines)]


def _check_file(file: Path, lines: tuple[str, ...]) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
        module = _Module.parse(text) if file.suffix == ".py" else _Module({}, set(), set(), set())
    except (OSError, ValueError, SyntaxError) as error:
        yield f"{file}: {'does not exist' if isinstance(error, FileNotFoundError) else f'cannot be read: {error}'}"
        return
    for line in lines:
        problem = module.problem_with(line)
        if problem is not None:
            yield f"{file}: {problem}"


@dataclass(frozen=True)
class Signature:
    """A function's parameters.

    names: the positional parameters in order, then the keyword-only parameters without a default. optional: those with
    a default. takes_keywords: whether the function has **kwargs.
    """

    names: tuple[str, ...]
    optional: frozenset[str]
    takes_keywords: bool

    @classmethod
    def of(cls, arguments: ast.arguments) -> "Signature":
        positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
        with_default = positional[len(positional) - len(arguments.defaults) :]
        keyword_only = [a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is None]
        # A keyword-only parameter without a default counts as a required one: the plugin's calls do not pass it.
        return cls((*positional, *keyword_only), frozenset(with_default), arguments.kwarg is not None)

    def lacks(self, wanted: "Signature") -> str | None:
        """Why a call made for the signature `wanted` would fail with this signature. None when the call works."""
        head = self.names[: len(wanted.names)]
        if head != wanted.names:
            return f"takes ({', '.join(self.names)}), and ({', '.join(wanted.names)}) is needed"
        required = [name for name in self.names[len(head) :] if name not in self.optional]
        if required:
            return f"requires {', '.join(required)} as well, which is never given"
        return "takes no **kwargs" if wanted.takes_keywords and not self.takes_keywords else None


@dataclass(frozen=True)
class _Module:
    """The definitions in a source file.

    signatures: of functions `f` and methods `Class.f`, and of classes, whose parameters are their fields. attributes:
    `Class.x`. reads: `function name`. names: all other names that the module assigns or imports.
    """

    signatures: dict[str, Signature]
    attributes: set[str]
    reads: set[str]
    names: set[str]

    @classmethod
    def parse(cls, text: str) -> "_Module":
        module = cls({}, set(), set(), set())
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                module._add_class(node)
            elif isinstance(node, ast.FunctionDef):
                module.signatures[node.name] = Signature.of(node.args)
                module.reads.update(f"{node.name} {n.id}" for n in ast.walk(node) if isinstance(n, ast.Name))
            elif isinstance(node, ast.Import | ast.ImportFrom):
                module.names.update(alias.asname or alias.name for alias in node.names)
            elif isinstance(node, ast.Assign):
                module.names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        return module

    def _add_class(self, node: ast.ClassDef) -> None:
        fields = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
        self.signatures[node.name] = Signature(tuple(fields), frozenset(fields), False)
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                self.signatures[f"{node.name}.{item.name}"] = Signature.of(item.args)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                self.attributes.add(f"{node.name}.{inner.attr}")

    def problem_with(self, line: str) -> str | None:
        """Why the module does not fulfil `line` of a contract. None when the module does."""
        kind, _, rest = line.partition(" ")
        if kind == "uses":
            return None if rest in self.reads else f"{rest.replace(' ', ' does not use ')}"
        if kind not in ("def", "class"):
            name = line.removeprefix(".")
            known = self.attributes if line.startswith(".") else self.names | self.signatures.keys()
            return None if name in known else f"{name} is not there"
        name, _, parameters = rest.partition("(")
        # `a, b, **kwargs` is parsed as the parameters of a lambda.
        lambda_node = ast.parse(f"lambda {parameters.removesuffix(')')}: 0", mode="eval").body
        assert isinstance(lambda_node, ast.Lambda)
        found = self.signatures.get(name)
        lack = "is not there" if found is None else found.lacks(Signature.of(lambda_node.args))
        return None if lack is None else f"{name} {lack}"

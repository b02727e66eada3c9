"""Sources of an atb_llm that has what the plugin relies on, as MindIE-LLM declares it, and little else."""

from pathlib import Path

from atb_pllava.mindie.install import PLUGIN
from tests.support import ROOT

STAND_IN = ROOT / "tests" / "mindie_host"

# The host in a few lines: what the plugin relies on, as MindIE-LLM's sources declare it.
HOST = {
    "__init__.py": "",
    "conf/config.json": "{}",
    "models/base/__init__.py": "",
    "models/llava/__init__.py": "",
    "models/llava/router_llava.py": "class LlavaRouter:\n    def __init__(self, *args):\n        self.args = args\n",
    "models/llama/__init__.py": "",
    "models/__init__.py": """
import importlib, json, os
from typing import Optional
def safe_get_config_dict(path):
    with open(os.path.join(path, "config.json")) as file:
        return json.load(file)
def get_model(model_name_or_path: str, is_flash_causal_lm: bool = True, load_tokenizer: bool = True,
              max_position_embeddings: Optional[int] = None, revision=None, tokenizer_path=None,
              trust_remote_code: bool = False, enable_atb_torch=False, enable_edge=False, llm_config_path=None,
              models_dict=None, sub_model_path=""):
    model_type = safe_get_config_dict(model_name_or_path)["model_type"].lower()
    folder = os.path.dirname(os.path.abspath(__file__))
    known = [n for n in os.listdir(folder) if os.path.isdir(os.path.join(folder, n)) and not n.startswith("_")]
    if model_type not in known:
        raise NotImplementedError(f"unsupported model type: {model_type}")
    router = importlib.import_module(f"atb_llm.models.{model_type}.router_{model_type}")
    return getattr(router, f"{model_type.capitalize()}Router")(model_name_or_path, is_flash_causal_lm, revision)
""",
    "models/base/router.py": """
from dataclasses import dataclass
@dataclass
class BaseRouter:
    model_name_or_path: str = ""
    config_dict: dict = None
    is_flash_causal_lm: bool = True
    load_tokenizer: bool = True
    max_position_embeddings: int = None
    revision: str = None
    tokenizer_path: str = None
    trust_remote_code: bool = False
    enable_atb_torch: bool = False
    enable_edge: bool = False
    llm_config: object = None
    sub_model_path: str = ""
    _config: object = None
    @property
    def config(self): ...
    @property
    def tokenizer(self): ...
    @property
    def input_builder(self): ...
    @staticmethod
    def check_config(config): ...
    def tokenize(self, inputs, **kwargs): ...
    def get_config(self): ...
    def get_config_cls(self): ...
    def get_model_cls(self): ...
    def get_tokenizer(self): ...
    def get_input_builder(self): ...
    @property
    def generation_config(self): ...
    @property
    def custom_chat_template(self): ...
""",
    "models/base/input_builder.py": """
class InputBuilder:
    def __init__(self, tokenizer, chat_template="", system_role_name="system", user_role_name="user", max_length=2048):
        ...
    @staticmethod
    def generate_position_ids(input_ids): ...
    def make_context(self, rank, conversation, add_generation_prompt=True, adapt_to_max_length=False, **kwargs): ...
""",
    "models/base/flash_causal_lm.py": """
class FlashForCausalLM:
    def __init__(self, config, weights, **kwargs):
        self.ascend_weight = []
        self.max_position_embeddings = config.max_position_embeddings
    def forward(self, input_ids, position_ids, is_prefill, kv_cache, block_tables, slots, input_lengths, max_seq_len,
                lm_head_indices=None, reset=False, **kwargs): ...
""",
    "models/llama/flash_causal_llama.py": """
class FlashLlamaForCausalLM:
    def __init__(self, config, weights, lmhead_prefix="lm_head", model_prefix="model", **kwargs):
        self.skip_word_embedding = False
    def init_ascend_weight(self): ...
    def prepare_inputs_for_ascend(self, input_ids, position_ids, is_prefill, kv_cache, block_tables, slots,
                                  input_lengths, max_seq_len, lm_head_indices=None, **kwargs): ...
""",
    "utils/weights.py": """
class Weights:
    def __init__(self, model_name_or_path, device, dtype, process_group, quantize=None, is_gqa=False,
                 extension=".safetensors", aliases=None, mapping=None, **kwargs):
        self.device, self.dtype = device, dtype
        self.mapping = mapping
        self.process_group = process_group
""",
    "models/base/config.py": """
class BaseConfig:
    @classmethod
    def from_dict(cls, config_dict, **kwargs): ...
""",
    "models/llama/config_llama.py": "class LlamaConfig: ...",
    "models/llama/modeling_llama.py": """
class FlashLlamaModel:
    def __init__(self, config, weights, model_prefix="model", **kwargs):
        self.embed_tokens = None
""",
    "utils/shm_utils.py": "def release_shared_memory(file_path): ...",
    "utils/configuration_utils.py": "class LLMConfig:\n    def get(self, key): ...",
}

# The same of its example programs, which lie beside the package.
RUNNER_SOURCES = {
    "examples/__init__.py": "",
    "examples/multimodal_runner.py": """
class MultimodalPARunner:
    def __init__(self, **kwargs): ...
    def init_processor(self): ...
""",
    "examples/run_pa.py": """
class PARunner:
    def __init__(self, **kwargs):
        self.model = self.tokenizer = self.cache_manager = self.model_config = self.block_size = None
""",
    "examples/server/request.py": """
class MultiModalReqParams:
    text: list
    image: list
    video: list
    audio: list
    max_out_length: int
    block_size: int
    req_idx: int
    adapter_id: str = None
    batch_size: int = 1
def request_from_multimodalinputs(processor, model, multimodalparams): ...
""",
    "examples/server/generate.py": """
def generate_req(req_list, model, max_batch_size, max_prefill_tokens, cache_manager, eplb_forwarder=None): ...
""",
    "examples/server/cache.py": """
class CacheConfig:
    def __init__(self, num_blocks=1024, block_size=128, input_max_length=2048): ...
class CacheManager:
    def __init__(self, cache_config, model_config): ...
""",
}


def write_host(directory: Path) -> Path:
    """A package atb_llm in `directory`."""
    for name, text in HOST.items():
        file = directory / "atb_llm" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return directory / "atb_llm"


def link_plugin(home: Path, farm: Path) -> None:
    """A directory with links to all of the `atb_llm` in `home`, and with the plugin as its models/pllava."""
    (farm / "atb_llm" / "models").mkdir(parents=True)
    for folder in ("atb_llm", "atb_llm/models"):
        for entry in (home / folder).iterdir():
            if entry.name not in ("models" if folder == "atb_llm" else "pllava", "__pycache__"):
                (farm / folder / entry.name).symlink_to(entry)
    (farm / "atb_llm" / "models" / "pllava").symlink_to(PLUGIN)

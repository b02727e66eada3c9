"""MindIE Service's config.json for PLLaVA: computed from the model and the cards' memory, and checked.

Names, types and bounds are those of MindIE's `src/config_manager` and of its service_parameter_configuration.md. A key
that has nothing to do with the model has the value of the config.json that MindIE ships. HTTPS is off, because HTTPS
needs certificates.
"""

import copy
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from atb_pllava.config import PllavaConfig
from atb_pllava.errors import ConfigError, counted
from atb_pllava.mindie.host_model import check_host_path

GIB = 2**30
BLOCK_SIZE = 128  # tokens in a block of the KV cache
MAX_REQUESTS = 200  # maxBatchSize in the config.json that MindIE ships
MAX_PREFILL_TOKENS = 8192  # maxPrefillTokens in the same file; a larger one costs memory for activations
DEFAULT_TEXT_TOKENS = 512  # of template, question and history, and as many of an answer
MAX_MEDIA = 20  # in one request: src/server/endpoint/endpoint_def.h
MIN_TEXT_TOKENS = 64  # of a template and a short question beside the videos

_MODEL_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,254}[A-Za-z0-9])?")

SHIPPED: dict[str, Any] = {
    "Version": "1.0.0",
    "ServerConfig": {
        "ipAddress": "127.0.0.1", "managementIpAddress": "127.0.0.2", "port": 1025, "managementPort": 1026,
        "metricsPort": 1027, "allowAllZeroIpListening": False, "maxLinkNum": 1000, "httpsEnabled": True,
        "fullTextEnabled": False, "tlsCaPath": "security/ca/", "tlsCaFile": ["ca.pem"],
        "tlsCert": "security/certs/server.pem", "tlsPk": "security/keys/server.key.pem",
        "tlsCrlPath": "security/certs/", "tlsCrlFiles": ["server_crl.pem"],
        "managementTlsCaFile": ["management_ca.pem"], "managementTlsCert": "security/certs/management/server.pem",
        "managementTlsPk": "security/keys/management/server.key.pem",
        "managementTlsCrlPath": "security/management/certs/", "managementTlsCrlFiles": ["server_crl.pem"],
        "metricsTlsCaFile": ["metrics_ca.pem"], "metricsTlsCert": "security/certs/metrics/server.pem",
        "metricsTlsPk": "security/keys/metrics/server.key.pem", "metricsTlsCrlPath": "security/metrics/certs/",
        "metricsTlsCrlFiles": ["server_crl.pem"], "inferMode": "standard", "interCommTLSEnabled": True,
        "interCommPort": 1121, "interCommTlsCaPath": "security/grpc/ca/", "interCommTlsCaFiles": ["ca.pem"],
        "interCommTlsCert": "security/grpc/certs/server.pem", "interCommPk": "security/grpc/keys/server.key.pem",
        "interCommTlsCrlPath": "security/grpc/certs/", "interCommTlsCrlFiles": ["server_crl.pem"],
        "openAiSupport": "vllm", "tokenTimeout": 600, "e2eTimeout": 600, "distDPServerEnabled": False,
    },
    "BackendConfig": {
        "backendName": "mindieservice_llm_engine", "modelInstanceNumber": 1, "npuDeviceIds": [[0]],
        "tokenizerProcessNumber": 8, "multiNodesInferEnabled": False, "multiNodesInferPort": 1120,
        "interNodeTLSEnabled": True, "interNodeTlsCaPath": "security/grpc/ca/", "interNodeTlsCaFiles": ["ca.pem"],
        "interNodeTlsCert": "security/grpc/certs/server.pem", "interNodeTlsPk": "security/grpc/keys/server.key.pem",
        "interNodeTlsCrlPath": "security/grpc/certs/", "interNodeTlsCrlFiles": ["server_crl.pem"],
        "ModelDeployConfig": {
            "maxSeqLen": 2560, "maxInputTokenLen": 2048, "truncation": 0,
            "ModelConfig": [{
                "modelInstanceType": "Standard", "modelName": "pllava", "modelWeightPath": "", "worldSize": 1,
                "cpuMemSize": 0, "npuMemSize": -1, "backendType": "atb", "trustRemoteCode": False,
            }],
        },
        "ScheduleConfig": {
            "templateType": "Standard", "templateName": "Standard_LLM", "cacheBlockSize": BLOCK_SIZE,
            "maxPrefillBatchSize": 50, "maxPrefillTokens": MAX_PREFILL_TOKENS, "prefillTimeMsPerReq": 150,
            "prefillPolicyType": 0, "decodeTimeMsPerReq": 50, "decodePolicyType": 0, "maxBatchSize": MAX_REQUESTS,
            "maxIterTimes": 512, "maxPreemptCount": 0, "supportSelectBatch": False,
            "maxQueueDelayMicroseconds": 5000, "maxFirstTokenWaitTime": 2500,
        },
    },
    "LogConfig": {"dynamicLogLevel": "", "dynamicLogLevelValidHours": 2, "dynamicLogLevelValidTime": ""},
}  # fmt: skip

_DEPLOY = ("BackendConfig", "ModelDeployConfig")
_SCHEDULE = ("BackendConfig", "ScheduleConfig")
# Path of a number in config.json: its least and its greatest value (src/config_manager/*.cpp, CheckParam).
VALUE_BOUNDS: dict[tuple[str, ...], tuple[int, int]] = {
    ("ServerConfig", "port"): (1024, 65535),
    ("ServerConfig", "managementPort"): (1024, 65535),
    ("ServerConfig", "metricsPort"): (1024, 65535),
    ("BackendConfig", "tokenizerProcessNumber"): (1, 32),
    (*_DEPLOY, "maxSeqLen"): (1, 2**32 - 1),
    (*_DEPLOY, "maxInputTokenLen"): (1, 2**22),
    (*_SCHEDULE, "cacheBlockSize"): (1, 128),
    (*_SCHEDULE, "maxPrefillTokens"): (1, 2**22),
    (*_SCHEDULE, "maxPrefillBatchSize"): (1, 819200),
    (*_SCHEDULE, "maxBatchSize"): (1, 819200),
    (*_SCHEDULE, "maxIterTimes"): (1, 2**32 - 1),
}


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest request. input: videos and text. output: the answer."""

    input: int
    output: int

    @property
    def total(self) -> int:
        return self.input + self.output


def plan_lengths(config: PllavaConfig, videos: int, text: int | None, output: int | None) -> Lengths:
    """The lengths of a request with `videos` videos, `text` tokens of text and `output` tokens of answer.

    None for `text` or `output` is 512, or less where the model's positions leave less. Raises ConfigError for a number
    that MindIE refuses.
    """
    if not 1 <= videos <= MAX_MEDIA:
        raise ConfigError(f"--max_videos is {videos}; MindIE takes 1 to {MAX_MEDIA} in a request")
    for name, value in (("--max_text_tokens", text), ("--max_output_length", output)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    positions_left = config.text.max_position_embeddings - videos * config.num_video_tokens
    if output is None:
        output = max(1, min(DEFAULT_TEXT_TOKENS, (positions_left - (text or 0)) // (2 if text is None else 1)))
    if text is None:
        text = max(MIN_TEXT_TOKENS, min(DEFAULT_TEXT_TOKENS, positions_left - output))
    return Lengths(videos * config.num_video_tokens + text, output)


def prefill_tokens(lengths: Lengths) -> int:
    """maxPrefillTokens: the most prompt tokens of one prefill. MAX_PREFILL_TOKENS, or more for a longer request."""
    return max(MAX_PREFILL_TOKENS, lengths.total)


def kv_bytes_per_token(config: PllavaConfig, world_size: int) -> int:
    """Bytes of one token's keys and values on one card, in 16 bits. MindIE rounds the KV heads of a card up."""
    text = config.text
    return 2 * 2 * text.num_hidden_layers * math.ceil(text.num_key_value_heads / world_size) * text.head_dim


def size_text(size: float) -> str:
    """A number of bytes in GiB, MiB or KiB: `1.62 GiB`, `38 MiB`, `36 KiB`."""
    if size >= GIB / 10:
        return f"{size / GIB:.2f} GiB"
    return f"{math.ceil(size / 2**20)} MiB" if size >= 2**20 else f"{math.ceil(size / 2**10)} KiB"


@dataclass(frozen=True)
class CachePlan:
    """The KV cache of a card.

    gib: its size in GiB, a whole number as npuMemSize must be. requests: how many longest requests it holds.
    request_bytes: the size of one of them.
    """

    gib: int
    requests: int
    request_bytes: int


def plan_cache(
    config: PllavaConfig, lengths: Lengths, world_size: int, budget: float, batch_size: int | None
) -> CachePlan:
    """The KV cache within `budget` bytes of a card: all of them, or as many as `batch_size` requests need.

    MindIE rounds prompt and answer to blocks separately. Raises ConfigError when the budget does not hold one request,
    or not `batch_size` requests.
    """
    blocks = math.ceil(lengths.input / BLOCK_SIZE) + math.ceil(lengths.output / BLOCK_SIZE)
    request = blocks * BLOCK_SIZE * kv_bytes_per_token(config, world_size)
    gib = int(budget // GIB)
    fitting = gib * GIB // request
    wanted = batch_size or 1
    if fitting < wanted:
        requests = f"{counted(wanted, 'request')} of {lengths.total} tokens"
        raise ConfigError(
            f"the KV cache of {requests} takes {size_text(wanted * request)} on each card, and "
            f"{size_text(max(0.0, budget))} are left there beside weights and activations (MindIE counts whole GiB): "
            "use more cards (--world_size), W8A16 weights, fewer videos, shorter texts or a smaller batch"
        )
    if batch_size is None:
        return CachePlan(gib, min(fitting, MAX_REQUESTS), request)
    return CachePlan(max(1, math.ceil(batch_size * request / GIB)), batch_size, request)


def make_config(
    model_path: str | os.PathLike[str],
    model_name: str,
    lengths: Lengths,
    cache: CachePlan,
    world_size: int,
    *,
    port: int = 1025,
    ip: str = "127.0.0.1",
    https: bool = False,
    options: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The contents of config.json. `options` are the plugin's: conversation, system, sampler, resize.

    Raises ConfigError for a model name, an address, a port or a path that MindIE refuses.
    """
    if _MODEL_NAME.fullmatch(model_name) is None:
        raise ConfigError(
            f"--model_name {model_name!r}: MindIE wants 1 to 256 letters, digits, '_', '.' and '-', the first and the "
            "last of them a letter or digit"
        )
    if ip in ("0.0.0.0", "::"):
        raise ConfigError(f"--ip {ip}: MindIE refuses to listen everywhere; name one address of this machine")
    check_host_path(model_path, "--model_path")
    config = copy.deepcopy(SHIPPED)
    most_prefilled = prefill_tokens(lengths)
    config["ServerConfig"] |= {
        "ipAddress": ip,
        "port": port,
        "managementPort": port + 1,
        "metricsPort": port + 2,
        "httpsEnabled": https,
    }
    backend = config["BackendConfig"]
    backend["npuDeviceIds"] = [list(range(world_size))]
    backend["ModelDeployConfig"] |= {"maxSeqLen": lengths.total, "maxInputTokenLen": lengths.input}
    model = backend["ModelDeployConfig"]["ModelConfig"][0]
    model |= {
        "modelName": model_name,
        "modelWeightPath": os.path.realpath(model_path),
        "worldSize": world_size,
        "npuMemSize": cache.gib,
    }
    if options:
        model["models"] = {"pllava": dict(options)}
    backend["ScheduleConfig"] |= {
        "maxBatchSize": cache.requests,
        "maxPrefillTokens": most_prefilled,
        "maxIterTimes": lengths.output,
        "maxPrefillBatchSize": max(1, min(cache.requests, most_prefilled // lengths.input)),
    }
    problems = list(find_problems(config))
    if problems:
        raise ConfigError("; ".join(f"{what}: {remedy}" for what, remedy in problems))
    return config


def find_problems(config: Mapping[str, Any], model: PllavaConfig | None = None) -> Iterator[tuple[str, str]]:
    """Each problem of a config.json, with its remedy. With `model`, also whether one video of the model fits.

    Missing keys and values of the wrong type are reported alone, because the other checks read them.
    """
    wrong = list(_wrong_keys(config))
    if wrong:
        yield from wrong
        return
    yield from _out_of_bounds(config)
    backend = config["BackendConfig"]
    schedule = backend["ScheduleConfig"]
    deploy = backend["ModelDeployConfig"]
    model_config = deploy["ModelConfig"][0]
    ports = [config["ServerConfig"][name] for name in ("port", "managementPort", "metricsPort")]
    if len(set(ports)) < 3:
        yield f"port, managementPort and metricsPort are {ports}", "give each a port of its own"
    if [len(ids) for ids in backend["npuDeviceIds"]] != [model_config["worldSize"]]:
        yield (
            f"npuDeviceIds is {backend['npuDeviceIds']} and worldSize {model_config['worldSize']}",
            "name as many cards as worldSize says, in one inner list",
        )
    if model_config["backendType"] != "atb":
        yield f"backendType is {model_config['backendType']!r}", 'PLLaVA runs on "atb" only'
    if deploy.get("truncation", 0) not in (0, False):
        yield f"truncation is {deploy['truncation']}", "0: what is cut off could be a part of a video"
    if model_config["npuMemSize"] < 1:
        yield (
            f"npuMemSize is {model_config['npuMemSize']}",
            "a number of GiB: for models with media the host guesses it from another model's sizes",
        )
    longest = deploy["maxInputTokenLen"]
    most_prefilled = schedule["maxPrefillTokens"]
    if most_prefilled < longest:
        yield f"maxPrefillTokens {most_prefilled} is less than maxInputTokenLen {longest}", f"at least {longest}"
    if schedule["maxPrefillBatchSize"] > schedule["maxBatchSize"]:
        yield f"maxPrefillBatchSize is above maxBatchSize {schedule['maxBatchSize']}", "at most that"
    if model is not None:
        yield from _too_small_for(model, deploy, schedule, model_config)


def _too_small_for(
    model: PllavaConfig, deploy: Mapping[str, Any], schedule: Mapping[str, Any], model_config: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """The lengths and the KV cache of a config.json that are too small for one video of `model`."""
    video = model.num_video_tokens
    longest = deploy["maxInputTokenLen"]
    if longest < video + MIN_TEXT_TOKENS:
        yield (
            f"maxInputTokenLen is {longest}, one video alone is {video} tokens",
            f"at least {video + MIN_TEXT_TOKENS}, better {video + DEFAULT_TEXT_TOKENS}",
        )
    if deploy["maxSeqLen"] <= longest:
        yield (
            f"maxSeqLen {deploy['maxSeqLen']} leaves no room for an answer after maxInputTokenLen {longest}",
            f"{longest + schedule['maxIterTimes']}: maxInputTokenLen and maxIterTimes",
        )
    if model_config["npuMemSize"] >= 1:
        tokens = math.ceil(deploy["maxSeqLen"] / BLOCK_SIZE) * BLOCK_SIZE
        request = tokens * kv_bytes_per_token(model, model_config["worldSize"])
        if model_config["npuMemSize"] * GIB < request:
            yield (
                f"npuMemSize {model_config['npuMemSize']} GiB does not hold one request of maxSeqLen "
                f"{deploy['maxSeqLen']}",
                f"at least {math.ceil(request / GIB)}",
            )


def _wrong_keys(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each of REQUIRED_KEYS that is missing, or whose value has another type than in SHIPPED."""
    for section, names in REQUIRED_KEYS.items():
        for name in names:
            value = _walk(config, (*section, name))
            example = _walk(SHIPPED, (*section, name))
            where = ".".join((*section, name))
            if value is None:
                yield f"{where} is missing", f"for example {example!r}"
            elif type(value) is not type(example):
                yield f"{where} is {value!r}", f"a value such as {example!r}"


# The keys that MindIE's constraint tables call compulsory, and the keys that its code reads without asking.
REQUIRED_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("ServerConfig",): (
        "ipAddress", "port", "managementPort", "metricsPort", "maxLinkNum", "httpsEnabled", "inferMode",
        "allowAllZeroIpListening", "tokenTimeout", "e2eTimeout"),
    ("BackendConfig",): (
        "backendName", "tokenizerProcessNumber", "modelInstanceNumber", "npuDeviceIds", "multiNodesInferEnabled",
        "interNodeTLSEnabled", "ScheduleConfig", "ModelDeployConfig"),
    _DEPLOY: ("maxSeqLen", "maxInputTokenLen", "ModelConfig"),
    (*_DEPLOY, "ModelConfig", "[0]"): (
        "cpuMemSize", "modelWeightPath", "modelName", "npuMemSize", "worldSize", "backendType", "trustRemoteCode"),
    _SCHEDULE: (
        "templateName", "templateType", "cacheBlockSize", "decodePolicyType", "decodeTimeMsPerReq", "maxBatchSize",
        "maxPreemptCount", "maxPrefillTokens", "maxIterTimes", "maxPrefillBatchSize", "maxQueueDelayMicroseconds",
        "prefillPolicyType", "prefillTimeMsPerReq", "supportSelectBatch"),
}  # fmt: skip


def _walk(value: Any, path: tuple[str, ...]) -> Any:
    """The value at `path` in nested mappings, where "[0]" is a list's first element. None where there is no value."""
    for step in path:
        if step == "[0]":
            value = value[0] if isinstance(value, list) and value else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _out_of_bounds(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each number outside VALUE_BOUNDS, with the bounds as the remedy."""
    for path, (least, most) in VALUE_BOUNDS.items():
        value = _walk(config, path)
        if not least <= value <= most:
            yield f"{path[-1]} is {value}", f"{least} to {most}"

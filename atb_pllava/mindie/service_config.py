"""MindIE Service's config.json for PLLaVA: what it has to say, computed from the model, and what is wrong with one.

Names, types and bounds are those of the host's `src/config_manager` and of its service_parameter_configuration.md;
everything that is not about the model has the value of the config.json it ships with, but for HTTPS, which needs
certificates.
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
BLOCK_SIZE = 128
LARGEST_BATCH = 200  # what the host ships with
PREFILL_TOKENS = 8192  # the same; more prompts at once cost memory for activations
DEFAULT_LENGTH = 512  # tokens of a question with its history, and of an answer
LARGEST_MEDIA = 20  # in one request: src/server/endpoint/endpoint_def.h
LEAST_TEXT = 64  # tokens a template and a short question take beside the videos

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
            "maxPrefillBatchSize": 50, "maxPrefillTokens": PREFILL_TOKENS, "prefillTimeMsPerReq": 150,
            "prefillPolicyType": 0, "decodeTimeMsPerReq": 50, "decodePolicyType": 0, "maxBatchSize": LARGEST_BATCH,
            "maxIterTimes": 512, "maxPreemptCount": 0, "supportSelectBatch": False,
            "maxQueueDelayMicroseconds": 5000, "maxFirstTokenWaitTime": 2500,
        },
    },
    "LogConfig": {"dynamicLogLevel": "", "dynamicLogLevelValidHours": 2, "dynamicLogLevelValidTime": ""},
}  # fmt: skip

_DEPLOY = ("BackendConfig", "ModelDeployConfig")
_SCHEDULE = ("BackendConfig", "ScheduleConfig")
# Path of a number: least and greatest value (src/config_manager/*.cpp, CheckParam).
BOUNDS: dict[tuple[str, ...], tuple[int, int]] = {
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
    """Token counts of the longest request: videos with their text, and the answer."""

    input: int
    output: int

    @property
    def total(self) -> int:
        return self.input + self.output


def plan_lengths(config: PllavaConfig, videos: int, text: int | None, output: int | None) -> Lengths:
    """Lengths for `videos` in a request. None for `text` and `output` is 512 each, or what the positions leave."""
    if not 1 <= videos <= LARGEST_MEDIA:
        raise ConfigError(f"--max_videos is {videos}; MindIE takes 1 to {LARGEST_MEDIA} in a request")
    for name, value in (("--max_text_tokens", text), ("--max_output_length", output)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    room = config.text.max_position_embeddings - videos * config.num_video_tokens
    if output is None:
        output = max(1, min(DEFAULT_LENGTH, (room - (text or 0)) // (2 if text is None else 1)))
    if text is None:
        text = max(LEAST_TEXT, min(DEFAULT_LENGTH, room - output))
    return Lengths(videos * config.num_video_tokens + text, output)


def prefill_tokens(lengths: Lengths) -> int:
    """Most tokens that are prefilled together: the host's own limit, or one longest request."""
    return max(PREFILL_TOKENS, lengths.total)


def kv_bytes_per_token(config: PllavaConfig, world_size: int) -> int:
    """Bytes of one token's keys and values on one card, in 16 bits; KV heads that do not divide are padded."""
    text = config.text
    return 2 * 2 * text.num_hidden_layers * math.ceil(text.num_key_value_heads / world_size) * text.head_dim


def size_text(size: float) -> str:
    """Bytes in the unit that suits them: `1.62 GiB`, `38 MiB`, `36 KiB`."""
    if size >= GIB / 10:
        return f"{size / GIB:.2f} GiB"
    return f"{math.ceil(size / 2**20)} MiB" if size >= 2**20 else f"{math.ceil(size / 2**10)} KiB"


@dataclass(frozen=True)
class CachePlan:
    """The KV cache of a card: its size in whole GiB, as the host wants it, and how many longest requests it holds."""

    gib: int
    requests: int
    request_bytes: int


def plan_cache(
    config: PllavaConfig, lengths: Lengths, world_size: int, budget: float, batch_size: int | None
) -> CachePlan:
    """Divide `budget` bytes of a card into requests: all of it, or what `batch_size` requests need.

    The host counts blocks for prompt and answer separately. ConfigError when not even one request fits.
    """
    blocks = math.ceil(lengths.input / BLOCK_SIZE) + math.ceil(lengths.output / BLOCK_SIZE)
    request = blocks * BLOCK_SIZE * kv_bytes_per_token(config, world_size)
    whole = int(budget // GIB)
    held = whole * GIB // request
    wanted = batch_size or 1
    if held < wanted:
        requests = f"{counted(wanted, 'request')} of {lengths.total} tokens"
        raise ConfigError(
            f"the KV cache of {requests} takes {size_text(wanted * request)} on each card, and "
            f"{size_text(max(0.0, budget))} are left there beside weights and activations (MindIE counts whole GiB): "
            "use more cards (--world_size), W8A16 weights, fewer videos, shorter texts or a smaller batch"
        )
    if batch_size is None:
        return CachePlan(whole, min(held, LARGEST_BATCH), request)
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
    """The contents of config.json. `options` are the plugin's, by name; ConfigError for a name the host refuses."""
    if _MODEL_NAME.fullmatch(model_name) is None:
        raise ConfigError(
            f"--model_name {model_name!r}: MindIE wants 1 to 256 letters, digits, '_', '.' and '-', the first and the "
            "last of them a letter or digit"
        )
    if ip in ("0.0.0.0", "::"):
        raise ConfigError(f"--ip {ip}: MindIE refuses to listen everywhere; name one address of this machine")
    check_host_path(model_path, "--model_path")
    config = copy.deepcopy(SHIPPED)
    at_once = prefill_tokens(lengths)
    config["ServerConfig"] |= {
        "ipAddress": ip, "port": port, "managementPort": port + 1, "metricsPort": port + 2, "httpsEnabled": https,
    }  # fmt: skip
    config["BackendConfig"]["npuDeviceIds"] = [list(range(world_size))]
    deploy, schedule = (config["BackendConfig"][name] for name in ("ModelDeployConfig", "ScheduleConfig"))
    deploy |= {"maxSeqLen": lengths.total, "maxInputTokenLen": lengths.input}
    deploy["ModelConfig"][0] |= {
        "modelName": model_name, "modelWeightPath": os.path.realpath(model_path), "worldSize": world_size,
        "npuMemSize": cache.gib,
    }  # fmt: skip
    if options:
        deploy["ModelConfig"][0]["models"] = {"pllava": dict(options)}
    schedule |= {
        "maxBatchSize": cache.requests, "maxPrefillTokens": at_once, "maxIterTimes": lengths.output,
        "maxPrefillBatchSize": max(1, min(cache.requests, at_once // lengths.input)),
    }  # fmt: skip
    problems = list(find_problems(config))
    if problems:
        raise ConfigError("; ".join(f"{what}: {remedy}" for what, remedy in problems))
    return config


def find_problems(config: Mapping[str, Any], model: PllavaConfig | None = None) -> Iterator[tuple[str, str]]:
    """What is wrong with a config.json, each with its remedy; with `model`, also whether its videos fit."""
    shape = list(_wrong_keys(config))
    if shape:
        yield from shape
        return
    yield from _out_of_bounds(config)
    backend = config["BackendConfig"]
    deploy, schedule = backend["ModelDeployConfig"], backend["ScheduleConfig"]
    one = deploy["ModelConfig"][0]
    ports = [config["ServerConfig"][name] for name in ("port", "managementPort", "metricsPort")]
    if len(set(ports)) < 3:
        yield f"port, managementPort and metricsPort are {ports}", "give each a port of its own"
    if [len(ids) for ids in backend["npuDeviceIds"]] != [one["worldSize"]]:
        yield (
            f"npuDeviceIds is {backend['npuDeviceIds']} and worldSize {one['worldSize']}",
            "name as many cards as worldSize says, in one inner list",
        )
    if one["backendType"] != "atb":
        yield f"backendType is {one['backendType']!r}", 'PLLaVA runs on "atb" only'
    if deploy.get("truncation", 0) not in (0, False):
        yield f"truncation is {deploy['truncation']}", "0: what is cut off could be a part of a video"
    if one["npuMemSize"] < 1:
        yield (
            f"npuMemSize is {one['npuMemSize']}",
            "a number of GiB: for models with media the host guesses it from another model's sizes",
        )
    longest, at_once = deploy["maxInputTokenLen"], schedule["maxPrefillTokens"]
    if at_once < longest:
        yield f"maxPrefillTokens {at_once} is less than maxInputTokenLen {longest}", f"at least {longest}"
    if schedule["maxPrefillBatchSize"] > schedule["maxBatchSize"]:
        yield f"maxPrefillBatchSize is above maxBatchSize {schedule['maxBatchSize']}", "at most that"
    if model is not None:
        yield from _too_small_for(model, deploy, schedule, one)


def _too_small_for(
    model: PllavaConfig, deploy: Mapping[str, Any], schedule: Mapping[str, Any], one: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    video, longest = model.num_video_tokens, deploy["maxInputTokenLen"]
    if longest < video + LEAST_TEXT:
        yield (
            f"maxInputTokenLen is {longest}, one video alone is {video} tokens",
            f"at least {video + LEAST_TEXT}, better {video + DEFAULT_LENGTH}",
        )
    if deploy["maxSeqLen"] <= longest:
        yield (
            f"maxSeqLen {deploy['maxSeqLen']} leaves no room for an answer after maxInputTokenLen {longest}",
            f"{longest + schedule['maxIterTimes']}: maxInputTokenLen and maxIterTimes",
        )
    if one["npuMemSize"] >= 1:
        request = math.ceil(deploy["maxSeqLen"] / BLOCK_SIZE) * BLOCK_SIZE * kv_bytes_per_token(model, one["worldSize"])
        if one["npuMemSize"] * GIB < request:
            yield (
                f"npuMemSize {one['npuMemSize']} GiB does not hold one request of maxSeqLen {deploy['maxSeqLen']}",
                f"at least {math.ceil(request / GIB)}",
            )


def _wrong_keys(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys that are missing, or whose value is of another type."""
    for section, names in REQUIRED.items():
        for name in names:
            value, example = (_walk(root, (*section, name)) for root in (config, SHIPPED))
            where = ".".join((*section, name))
            if value is None:
                yield f"{where} is missing", f"for example {example!r}"
            elif type(value) is not type(example):
                yield f"{where} is {value!r}", f"a value such as {example!r}"


# What the host's constraint tables call compulsory, and what its code reads without asking.
REQUIRED: dict[tuple[str, ...], tuple[str, ...]] = {
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
    """What lies at `path`, where "[0]" is a list's first element; None where there is nothing."""
    for step in path:
        if step == "[0]":
            value = value[0] if isinstance(value, list) and value else None
        else:
            value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _out_of_bounds(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for path, (least, most) in BOUNDS.items():
        value = _walk(config, path)
        if not least <= value <= most:
            yield f"{path[-1]} is {value}", f"{least} to {most}"

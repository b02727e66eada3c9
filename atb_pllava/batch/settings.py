"""The settings behind results: a digest of them, and the values in which two sets of settings differ."""

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from atb_pllava.errors import ConfigError

_SHOWN = 60  # characters of a value that a message shows
_ABSENT = object()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the settings as JSON. The order of the names does not count."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_settings(path: str | os.PathLike[str], old: Mapping[str, Any], new: Mapping[str, Any], remedy: str) -> None:
    """Raises ConfigError when the results in `path` have other settings, naming each difference, then `remedy`."""
    changed = differences(old, new)
    if changed:
        raise ConfigError(f"{os.fspath(path)} has answers with other settings ({'; '.join(changed)}); {remedy}")


def check_recorded_settings(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], settings: Mapping[str, Any], remedy: str
) -> None:
    """`check_settings` for the settings that the manifest of `path` has. Settings that it lacks are not compared."""
    recorded = {name: manifest[name] for name in settings if name in manifest}
    check_settings(path, recorded, {name: settings[name] for name in recorded}, remedy)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`name: old -> new` for each setting that differs. A nested setting has a name such as `sampling.max_tokens`."""
    before = _flat(old)
    after = _flat(new)
    names = [name for name in {**before, **after} if before.get(name, _ABSENT) != after.get(name, _ABSENT)]
    return [f"{name}: {' -> '.join(_shown(before.get(name, _ABSENT), after.get(name, _ABSENT)))}" for name in names]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings with nested names joined by dots, and values as a JSON file has them."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(old: Any, new: Any) -> list[str]:
    """Both values as text. Long values are cut to the part where they begin to differ."""
    texts = ["not recorded" if value is _ABSENT else json.dumps(value, ensure_ascii=False) for value in (old, new)]
    if max(map(len, texts)) <= _SHOWN:
        return texts
    start = max(len(os.path.commonprefix(texts)) - _SHOWN // 4, 0)
    return [_cut(text, start) for text in texts]


def _cut(text: str, start: int) -> str:
    piece = text[start : start + _SHOWN]
    return ("..." if start else "") + piece + ("..." if start + _SHOWN < len(text) else "")

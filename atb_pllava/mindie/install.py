"""Registers the plugin with an installed atb_llm, and takes it out again.

Three ways, because MindIE knows none: a link `atb_llm/models/pllava` to the plugin of this package, a copy there that
holds this package as well, or an import hook in a `.pth` file of the interpreter where nothing may be written into
atb_llm. Each is made whole or not at all, and only what is ours is ever replaced or removed.
"""

import filecmp
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import atb_pllava
from atb_pllava.errors import ConfigError
from atb_pllava.mindie.contract import CONTRACT, check_contract

WAYS = ("link", "copy", "hook")
PACKAGE = Path(atb_pllava.__file__).resolve().parent
PLUGIN = PACKAGE / "mindie" / "plugin" / "pllava"
PLUGIN_IN_PACKAGE = PLUGIN.relative_to(PACKAGE.parent)
MARK = ".atb_pllava"  # in a copy: says that it is ours
VENDORED = "package"  # in a copy: holds the package the plugin imports
PTH = "atb_pllava_mindie.pth"

# One line of a .pth file. It runs at every start of Python: no import, one comparison for each later import, and
# whatever goes wrong is said once when MindIE's library is imported and never stops a program.
WAITER = """
import sys
class AtbPllava:
    def find_spec(name, path=None, target=None):
        if name == "atb_llm.models":
            sys.meta_path.remove(AtbPllava)
            try:
                space = {{"__name__": "atb_pllava_hook"}}
                with open({hook!r}) as file:
                    exec(compile(file.read(), file.name, "exec"), space)
                return space["find_spec"](name, path, {folder!r})
            except Exception as error:
                print("atb_pllava: the import hook failed, MindIE goes on without PLLaVA:", error, file=sys.stderr)
sys.meta_path.insert(0, AtbPllava)
"""


@dataclass(frozen=True)
class Registration:
    """The plugin as found in one place: how it got there, what is wrong with it, and whose plugin it runs."""

    way: str
    place: Path
    source: Path | None = None  # what a link or hook points to
    problem: str | None = None

    def __str__(self) -> str:
        target = f" -> {self.source}" if self.source is not None else ""
        return f"{self.way} {self.place}{target}{f': {self.problem}' if self.problem else ''}"


def install(atb_llm: Path, way: str | None, sites: Sequence[Path]) -> list[str]:
    """Register the plugin in one of WAYS; the lines that say what was changed, none when it was registered that way.

    None is a link, or a hook where `atb_llm` cannot be written. A hook goes to the first of `sites`; registrations of
    ours elsewhere, in `atb_llm` and in all of them, are taken out once the new one is made.
    ConfigError when the host's contract differs, or when something that is not ours is in the way.
    """
    if not (PLUGIN / "router_pllava.py").is_file():
        raise ConfigError(f"this copy of atb_pllava lacks its plugin, {PLUGIN}; install the whole package again")
    problems = check_contract(atb_llm, CONTRACT)
    if problems:
        raise ConfigError(
            f"{atb_llm} is a version of MindIE's library that the plugin does not fit; nothing was changed:\n  "
            + "\n  ".join(problems)
        )
    place = atb_llm / "models" / "pllava"
    chosen = way or ("link" if os.access(place.parent, os.W_OK) else "hook")
    present = find_registrations(atb_llm, sites)
    if [(r.way, r.problem) for r in present] == [(chosen, None)]:
        return []
    if os.path.lexists(place) and not any(r.place == place for r in present):
        raise ConfigError(f"{place} exists and is not of atb_pllava; it stays as it is. Move it to install the plugin")
    folder = sites[0] if chosen == "hook" else place.parent
    if not os.access(folder, os.W_OK):
        other = "use --hook" if chosen != "hook" else "name a writable one with --site"
        raise ConfigError(f"{folder} cannot be written; {other}, or run this as the user it belongs to")
    partial, final, change = _make(chosen, place, sites[0])
    for registration in present:
        _remove(registration)
    os.rename(partial, final)
    return [*(f"removed {r.way} {r.place}" for r in present), change]


def uninstall(atb_llm: Path | None, sites: Sequence[Path]) -> list[str]:
    """Take out every registration of ours; the lines that say what was changed. What is not ours stays."""
    found = find_registrations(atb_llm, sites)
    for registration in found:
        _remove(registration)
    return [f"removed {registration.way} {registration.place}" for registration in found]


def find_registrations(atb_llm: Path | None, sites: Sequence[Path]) -> list[Registration]:
    """All registrations of ours in `atb_llm` (None: there is none) and in the site directories, good or broken."""
    found = [] if atb_llm is None else list(_in_models(atb_llm / "models" / "pllava"))
    return [*found, *(hook for site in sites if (hook := _read_hook(site / PTH)) is not None)]


def _in_models(place: Path) -> Iterator[Registration]:
    if place.is_symlink():
        source = place.parent / os.readlink(place)
        if source.parts[-len(PLUGIN_IN_PACKAGE.parts) :] == PLUGIN_IN_PACKAGE.parts:
            yield Registration("link", place, source, _problem_of(source))
    elif (place / MARK).is_file():
        yield Registration("copy", place, None, _difference(place))


def _problem_of(source: Path) -> str | None:
    if not (source / "router_pllava.py").is_file():
        return "the plugin it points to is gone"
    return None if source == PLUGIN else f"it belongs to another copy of atb_pllava, this one is {PACKAGE.parent}"


def _difference(place: Path) -> str | None:
    """What a copy lacks or has otherwise than this package, None when they are equal."""
    pairs = {place / name.relative_to(PLUGIN): name for name in _sources(PLUGIN)}
    pairs |= {place / VENDORED / name.relative_to(PACKAGE.parent): name for name in _sources(PACKAGE)}
    stale = [path for path, source in pairs.items() if not path.is_file() or not filecmp.cmp(path, source, False)]
    return f"{len(stale)} files differ from this version of atb_pllava" if stale else None


def _sources(root: Path) -> list[Path]:
    """Every file of a package; what Python, macOS and editors leave beside them is none."""
    files = [path for path in root.rglob("*") if path.is_file()]
    return sorted(path for path in files if not any(map(_is_left_over, path.relative_to(root).parts)))


def _is_left_over(name: str) -> bool:
    return name == "__pycache__" or name.startswith(".")


def _read_hook(file: Path) -> Registration | None:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return None
    if text == _hook_line():
        return Registration("hook", file, PLUGIN, _problem_of(PLUGIN))
    return Registration("hook", file, None, f"it is of another copy or version of atb_pllava, not of {PACKAGE.parent}")


def _hook_line() -> str:
    source = WAITER.format(hook=str(PACKAGE / "mindie" / "hook.py"), folder=str(PLUGIN.parent))
    return f"import sys; exec({source!r}, {{}})\n"


def _make(way: str, place: Path, site: Path) -> tuple[Path, Path, str]:
    """The registration under a name that nobody looks at, where it belongs, and what to say when it is there."""
    # The host skips folders that begin with an underscore, Python reads files that end in .pth.
    partial = (site if way == "hook" else place.parent) / f"_pllava.{os.getpid()}"
    if way == "hook":
        partial.write_text(_hook_line(), encoding="utf-8")
        return partial, site / PTH, f"wrote {site / PTH}: an import hook for every Python that reads {site}"
    if way == "link":
        os.symlink(PLUGIN, partial)
        return partial, place, f"linked {place} -> {PLUGIN}"
    _copy_all(partial)
    return partial, place, f"copied the plugin and the package atb_pllava to {place}"


def _copy_all(target: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    try:
        shutil.copytree(PLUGIN, target, ignore=skip)
        shutil.copytree(PACKAGE, target / VENDORED / PACKAGE.name, ignore=skip)
        (target / MARK).write_text(f"a copy made by {PACKAGE.parent}; `mindie uninstall` removes it\n")
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise


def _remove(registration: Registration) -> None:
    place = registration.place
    try:
        if place.is_dir() and not place.is_symlink():
            gone = place.with_name(f"_pllava.{os.getpid()}.old")  # out of the host's sight in one step
            place.rename(gone)
            shutil.rmtree(gone)
        else:
            place.unlink()
    except OSError as error:
        raise ConfigError(f"{place} could not be removed: {error.strerror}; run this as its owner") from None

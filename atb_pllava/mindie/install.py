"""Registers the plugin with an installed atb_llm, and removes it again.

MindIE has no registration of its own, so there are three ways:
    link: `atb_llm/models/pllava` is a symbolic link to the plugin in this package
    copy: `atb_llm/models/pllava` is a copy of the plugin that contains this package
    hook: an import hook in a `.pth` file of the interpreter, with nothing written into atb_llm
A registration is made completely or not at all. Only registrations of this package are replaced or removed.
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
MARK = ".atb_pllava"  # a file in a copy, by which the copy is recognised
VENDORED = "package"  # a folder in a copy: the package that the plugin imports
PTH = "atb_pllava_mindie.pth"

# The program in the .pth file, which every start of Python runs. It imports nothing, and costs one comparison for each
# later import. Any error is printed once, when MindIE's library is imported, and stops no program.
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
    """A registration of the plugin that was found.

    way: one of WAYS. place: the link, the copy or the .pth file. source: the plugin that a link or a hook leads to.
    problem: why MindIE would not run this package's plugin. None when MindIE would.
    """

    way: str
    place: Path
    source: Path | None = None
    problem: str | None = None

    def __str__(self) -> str:
        target = f" -> {self.source}" if self.source is not None else ""
        return f"{self.way} {self.place}{target}{f': {self.problem}' if self.problem else ''}"


def install(atb_llm: Path, way: str | None, sites: Sequence[Path]) -> list[str]:
    """Register the plugin. Returns one sentence for each change, and none when nothing had to change.

    `way` None is a link, or a hook where `atb_llm` cannot be written. A hook goes to the first of `sites`. Other
    registrations of this package, in `atb_llm` and in all `sites`, are removed once the new one is made.
    Raises ConfigError when MindIE does not fulfil the contract, and when `atb_llm/models/pllava` is not this package's.
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
    """Remove every registration of this package. Returns one sentence for each change.

    Raises ConfigError when a registration cannot be removed. Files of others stay as they are.
    """
    found = find_registrations(atb_llm, sites)
    for registration in found:
        _remove(registration)
    return [f"removed {registration.way} {registration.place}" for registration in found]


def find_registrations(atb_llm: Path | None, sites: Sequence[Path]) -> list[Registration]:
    """All registrations of this package in `atb_llm` and in the site directories, good or broken.

    `atb_llm` None: there is no MindIE, and only the site directories are searched.
    """
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
    """How many files of a copy are missing or differ from this package. None when all are equal."""
    pairs = {place / name.relative_to(PLUGIN): name for name in _sources(PLUGIN)}
    pairs |= {place / VENDORED / name.relative_to(PACKAGE.parent): name for name in _sources(PACKAGE)}
    stale = [path for path, source in pairs.items() if not path.is_file() or not filecmp.cmp(path, source, False)]
    return f"{len(stale)} files differ from this version of atb_pllava" if stale else None


def _sources(root: Path) -> list[Path]:
    """Every file of a package, without __pycache__ and hidden files."""
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
    """Make the registration under a temporary name. Returns the temporary path, the final path, and a sentence.

    MindIE skips folders that begin with an underscore, and Python reads only files that end in .pth.
    """
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
            gone = place.with_name(f"_pllava.{os.getpid()}.old")  # MindIE no longer finds the folder after the rename
            place.rename(gone)
            shutil.rmtree(gone)
        else:
            place.unlink()
    except OSError as error:
        raise ConfigError(f"{place} could not be removed: {error.strerror}; run this as its owner") from None

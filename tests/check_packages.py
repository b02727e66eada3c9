"""Build the wheel and the source distribution, install the wheel into an empty environment, and use both.

Usage: python tests/check_packages.py. The environment is a new one in a temporary directory. It holds the wheel and the
packages that the wheel's metadata requires, and nothing else: they are linked from this Python, so nothing is
downloaded. Exit status 1 and one line say what is wrong.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
NEEDED_IN_WHEEL = [
    "atb_pllava/mindie/runner.py",
    "atb_pllava/mindie/plugin/pllava/__init__.py",
    "atb_pllava/py.typed",
]
NOT_IN_WHEEL = re.compile(r"^(precision|tests|examples)/")
VERBS = ["run", "predict", "convert", "bench", "mindie", "doctor"]


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Standard output of a command. Ends the process with the command's own output when it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def copy_of_the_tree(target: Path) -> Path:
    """The files that git knows or would add: an old build/ in the clone must not reach the wheel."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def build(source: Path, target: Path) -> tuple[Path, Path]:
    """The wheel and the source distribution."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source, cwd=source)
    return next(target.glob("*.whl")), next(target.glob("*.tar.gz"))


def check_contents(wheel: Path, source: Path) -> None:
    """Every module and kernel source is in the wheel, and nothing of the clone's tools."""
    names = set(zipfile.ZipFile(wheel).namelist())
    package = source / "atb_pllava"
    kernels = [str(path.relative_to(source)) for path in (package / "ops/cpu/csrc").glob("[!.]*")]
    modules = [str(path.relative_to(source)) for path in package.rglob("*.py")]
    missing = sorted({*NEEDED_IN_WHEEL, *kernels, *modules} - names)
    foreign = sorted(filter(NOT_IN_WHEEL.match, names))
    if missing or foreign:
        sys.exit(f"the wheel lacks {missing} and holds {foreign}, which belongs to a clone")


def required_distributions(requirements: Iterable[str], known: set[str]) -> Iterator[metadata.Distribution]:
    """The distributions that requirements name, and their own requirements, each once and without extras."""
    for text in requirements:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and name not in known:
            known.add(name)
            found = metadata.distribution(requirement.name)
            yield found
            yield from required_distributions(found.requires or [], known)


def empty_environment(folder: Path, wheel: Path) -> Path:
    """Python of a new environment with the wheel and what its metadata requires."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    site = next((folder / "lib").glob("python*/site-packages"))
    requires = next(metadata.distributions(name="atb_pllava", path=[str(site)])).requires or []
    for distribution in required_distributions(requires, set()):
        tops = {file.parts[0] for file in distribution.files or [] if file.parts[0] != ".."}
        for top in tops - {"__pycache__"}:
            target = site / top
            if not target.exists():
                target.symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return python


def check_commands(python: Path, work: Path, source: Path) -> None:
    """The console command and `python -m atb_pllava` in the new environment, away from the clone."""
    command = python.with_name("atb-pllava")
    for verb in VERBS:
        helped = run(command, verb, "--help", cwd=work)
        if "atb-pllava" not in helped:
            sys.exit(f"`atb-pllava {verb} --help` names another command:\n{helped}")
        run(python, "-m", "atb_pllava", verb, "--help", cwd=work)
    tiny = source / "examples" / "tiny_pllava"
    clip = source / "examples" / "videos" / "red_circle_moves_left.mp4"
    merged = work / "merged"
    run(command, "convert", "-src", tiny, "-dst", merged, "-type", "pllava_w8a16", cwd=work)
    asked = ("--media", clip, "--prompt", "Describe the video.", "--quiet")
    for weights in (tiny, merged):
        said = run(command, "run", "--model_path", weights, *asked, cwd=work)
        if "A red circle moves to the left." not in said:
            sys.exit(f"the installed package answers wrongly about {weights}:\n{said}")
    run(command, "bench", "scaling", cwd=work)
    said = run(python, "-c", "import atb_pllava; print(atb_pllava.__file__, atb_pllava.LLM)", cwd=work)
    if str(python.parents[1]) not in said:
        sys.exit(f"another atb_pllava was imported: {said}")


def check_sdist(archive: Path, work: Path) -> None:
    """All tests of the unpacked source distribution can be collected, and some of them pass."""
    with tarfile.open(archive) as tar:
        tar.extractall(work, filter="data")
    source = next(path for path in work.iterdir() if path.name.startswith("atb_pllava-"))
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    run(*pytest, "--collect-only", cwd=source)
    run(*pytest, "tests/test_layers.py", "tests/model", "tests/test_tiny_pllava.py", cwd=source)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="atb_pllava_packaging") as folder:
        work = Path(folder)
        source = copy_of_the_tree(work / "source")
        wheel, sdist = build(source, work / "dist")
        check_contents(wheel, source)
        python = empty_environment(work / "environment", wheel)
        (work / "elsewhere").mkdir()
        check_commands(python, work / "elsewhere", source)
        (work / "unpacked").mkdir()
        check_sdist(sdist, work / "unpacked")
        print(f"{wheel.name} and {sdist.name}: built, installed and used")


if __name__ == "__main__":
    main()

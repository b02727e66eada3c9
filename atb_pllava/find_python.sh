# Sourced by run_pa.sh and tests/run.sh. `find_python FILE...` sets PYTHON to an interpreter that has every package of
# the requirements files: $ATB_PLLAVA_PYTHON, the python3 that is active, or one in .venv, which is made when needed.
# Packages that are installed already, in whatever version, are used as they are and never replaced.

# Prints the requirement lines whose package the interpreter lacks; fails when it cannot say.
missing_packages() {
    "$@" - "${requirements[@]}" <<'PY'
import importlib.metadata
import re
import sys

for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        lines = [line.split("#")[0].strip() for line in file]
    for line in filter(None, lines):
        name, _, marker = line.partition(";")
        old = sys.version_info < (3, 11)
        if "python_version" in marker and ("<" in marker) != old:
            continue
        if "sys_platform" in marker and sys.platform != "linux":
            continue
        try:
            importlib.metadata.version(re.match(r"[\w-]+", name).group())
        except importlib.metadata.PackageNotFoundError:
            print(name.strip())
PY
}

# Whether torch is missing and pip's index has it with CUDA libraries, several GB that a plain CPU machine has no use for.
offers_only_cuda_torch() {
    local torch
    torch=$(tr ' ' '\n' <<<"$missing" | grep '^torch==') || return 1
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --dry-run --no-deps --ignore-installed --report - "$torch" \
        2>/dev/null | grep -Eq '"(nvidia|cuda)-'
}

find_python() {
    local root requirements=("$@") missing base venv options=()
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
    venv=$root/.venv
    if [ -n "${ATB_PLLAVA_PYTHON:-}" ]; then
        PYTHON=$ATB_PLLAVA_PYTHON
        missing=$(missing_packages "$PYTHON") ||
            { echo "error: ATB_PLLAVA_PYTHON=$PYTHON is no Python that runs; unset it or name another" >&2; return 2; }
        [ -z "$missing" ] && return 0
        echo "error: ATB_PLLAVA_PYTHON=$PYTHON lacks" $missing "- install them there, or unset the variable" >&2
        return 2
    fi
    base=$(command -v python3 || command -v python) ||
        { echo "error: no python3 found; install Python 3.10 or newer" >&2; return 2; }
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $base is $("$base" --version 2>&1); Python 3.10 or newer is needed (name one in ATB_PLLAVA_PYTHON)" >&2
        return 2
    fi
    PYTHON=$base
    missing=$(missing_packages "$PYTHON") && [ -z "$missing" ] && return 0
    PYTHON=$venv/bin/python
    [ -x "$PYTHON" ] && missing=$(missing_packages "$PYTHON") && [ -z "$missing" ] && return 0

    if [ ! -x "$PYTHON" ] || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        "$base" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' &&
            options=(--system-site-packages)
        echo "setting up $venv with $base${options:+, using the torch that is installed}" >&2
        "$base" -m venv --clear "${options[@]}" "$venv" ||
            { echo "error: $base -m venv failed; on Debian and Ubuntu install python3-venv" >&2; return 2; }
    fi
    missing=$(missing_packages "$PYTHON") || return 2
    echo "installing into $venv (once):" $missing >&2
    if offers_only_cuda_torch; then
        options=(--extra-index-url https://download.pytorch.org/whl/cpu)
    else
        options=()
    fi
    # shellcheck disable=SC2086
    if ! "$PYTHON" -m pip install --quiet --disable-pip-version-check "${options[@]}" $missing >&2; then
        echo "error: pip could not install the packages above; install them yourself and set ATB_PLLAVA_PYTHON" >&2
        return 2
    fi
}

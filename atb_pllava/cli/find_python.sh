# Sourced by run_pa.sh, convert_quant_weights.sh and tests/run.sh.
#
# `find_python FILE...` sets PYTHON to an interpreter that has every package of the requirements files. The candidates are
# $ATB_PLLAVA_PYTHON alone if it is set; else the active python3, then .venv in the clone. If both lack packages, .venv is
# set up. An installed package is used in the version that it has. It is never replaced. If an NVIDIA GPU is here and the
# torch of PYTHON has no CUDA, a line on stderr names the command that installs a CUDA build.

CPU_BUILDS=https://download.pytorch.org/whl/cpu # PyTorch's own index of builds without CUDA

# Prints the requirements whose package the interpreter lacks. Fails if the interpreter does not run.
# In .venv a package without the file INSTALLER counts as missing. pip writes INSTALLER last, so an installation of the
# package was interrupted.
missing_packages() {
    "$@" - "$venv" "${requirements[@]}" <<'PY'
import importlib.metadata
import os
import re
import sys

in_venv = os.path.realpath(sys.prefix) == os.path.realpath(sys.argv[1])
for path in sys.argv[2:]:
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
            found = importlib.metadata.distribution(re.match(r"[\w-]+", name).group())
        except importlib.metadata.PackageNotFoundError:
            print(name.strip())
            continue
        here = os.path.realpath(found.locate_file("")).startswith(os.path.realpath(sys.prefix) + os.sep)
        if in_venv and here and found.read_text("INSTALLER") is None:
            print(name.strip())
PY
}

# Deletes the .dist-info folders of packages whose installation was interrupted. pip would not install them again.
forget_interrupted() {
    "$PYTHON" - <<'PY'
import pathlib
import shutil
import sys
import sysconfig

for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
    for record in pathlib.Path(folder).glob("*.dist-info"):
        if not (record / "INSTALLER").exists():
            print(f"{record.name.partition('-')[0]} was installed in part only: it is installed again", file=sys.stderr)
            shutil.rmtree(record)
PY
}

# Succeeds if torch is missing and the build that pip would install needs CUDA libraries. They take several GB, and a
# machine without a GPU does not use them.
offers_only_cuda_torch() {
    local torch
    torch=$(tr ' ' '\n' <<<"$missing" | grep '^torch==') || return 1
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --dry-run --no-deps --ignore-installed --report - "$torch" \
        2>/dev/null | grep -Eq '"(nvidia|cuda)-'
}

# Sets `download` and `disk` to the MB that the missing packages take, measured on x86-64 Linux with Python 3.11. Only
# torch and Triton count. All other packages are small.
estimate_size() {
    download=0 disk=0
    case $'\n'$missing in *$'\n'torch==*) download=270 disk=1200 ;; esac
    case $'\n'$missing in *$'\n'triton==*) download=$((download + 240)) disk=$((disk + 900)) ;; esac
}

# Prints the free MB of the file system that holds a folder.
free_space() {
    df -Pk "$1" 2>/dev/null | awk 'NR == 2 {print int($4 / 1024)}'
}

# Prints the first of the folders that pip writes to whose disk has less than 50 MB free. Fails if there is none.
full_disk() {
    local folder
    for folder in "$venv" "${TMPDIR:-/tmp}" "$("$PYTHON" -m pip cache dir 2>/dev/null)"; do
        while [ -n "$folder" ] && [ ! -d "$folder" ]; do folder=$(dirname "$folder"); done
        [ -n "$folder" ] && [ "$(free_space "$folder")" -lt 50 ] 2>/dev/null && { echo "$folder"; return 0; }
    done
    return 1
}

# Waits until no other shell sets up this clone. The lock is on the clone's folder. It ends when file descriptor 9 is
# closed.
lock_clone() {
    exec 9<"$root"
    "$base" - "$venv" <<'PY'
import fcntl
import signal
import sys

signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print(f"another shell is setting up {sys.argv[1]}: waiting for it", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    pass  # the file system has no locks: go on without
PY
}

# Prints a line about a GPU that the torch of PYTHON cannot use.
name_cuda_torch() {
    local line
    line=$("$PYTHON" - <"$root/atb_pllava/ops/cuda/torch_builds.py") || return 0
    [ -z "$line" ] || echo "note: $line" >&2
}

# Makes the torch of $base visible in .venv, if it is not. A venv sees the packages of the Python that it was made from.
# If $base is itself in a virtual environment, that is the Python behind $base, without the packages of $base.
share_torch() {
    local folder
    folder=$("$base" -c 'import importlib.util as u, pathlib
spec = u.find_spec("torch")
print(pathlib.Path(spec.origin).parents[1] if spec and spec.origin else "")')
    [ -z "$folder" ] && return 0
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' && return 0
    "$PYTHON" - "$folder" <<'PY'
import pathlib
import sys
import sysconfig

pathlib.Path(sysconfig.get_path("purelib"), "shared_torch.pth").write_text(sys.argv[1] + "\n", encoding="utf-8")
PY
}

has_pip() {
    "$PYTHON" -m pip --version >/dev/null 2>&1
}

# Creates .venv. A .venv whose Python runs is kept with its packages, and pip is installed again if it is missing. If that
# fails, .venv is created anew.
make_venv() {
    local options=()
    if [ -x "$PYTHON" ] && "$PYTHON" -c '' 2>/dev/null; then
        forget_interrupted || return 2
        has_pip && return 0
        "$PYTHON" -m ensurepip >/dev/null 2>&1 && has_pip && return 0
        echo "$venv has no pip that works: it is made anew" >&2
    fi
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "error: $base cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 2
    fi
    "$base" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' &&
        options=(--system-site-packages)
    echo "setting up $venv with $base${options:+, using the torch that is installed}" >&2
    "$base" -m venv --clear ${options[@]+"${options[@]}"} "$venv" >&2 && share_torch && return 0
    explain_failure "$base -m venv failed, see above"
    return 2
}

# Fails if .venv cannot be written in the clone, and prints the commands that set it up elsewhere.
check_writable() {
    local folder=$root elsewhere=${HOME:-/tmp}/atb_pllava-venv
    [ -d "$venv" ] && folder=$venv
    [ -w "$folder" ] && return 0
    echo "error: $folder is read-only, so $venv cannot be set up. Set it up elsewhere and name it:" >&2
    echo "  $base -m venv $elsewhere" >&2
    echo "  $elsewhere/bin/python -m pip install ${requirements[*]/#/-r } --extra-index-url $CPU_BUILDS" >&2
    echo "  export ATB_PLLAVA_PYTHON=$elsewhere/bin/python" >&2
    return 2
}

# Prints an error: that a disk is full if one is, else the given cause.
explain_failure() {
    local full
    if full=$(full_disk); then
        echo "error: the disk of $full is full; free some space and run the same command again" >&2
    else
        echo "error: $1" >&2
    fi
}

set_up() {
    local options=() download disk free names=("${requirements[@]#"$root/"}")
    PYTHON=$venv/bin/python
    [ -x "$PYTHON" ] && missing=$(missing_packages "$PYTHON") && [ -z "$missing" ] && return 0 # another shell has set it up
    check_writable || return 2
    missing=$(missing_packages "$base") || return 2 # for the estimate, if there is no .venv yet
    [ -x "$PYTHON" ] && missing=$(missing_packages "$PYTHON" 2>/dev/null)
    estimate_size
    free=$(free_space "$root")
    if [ -n "$free" ] && [ "$free" -lt "$disk" ]; then
        echo "error: $venv needs about $disk MB, and $root has $free MB free; free some space and run the same command again" >&2
        return 2
    fi
    make_venv || return 2
    missing=$(missing_packages "$PYTHON") || return 2
    estimate_size
    if [ "$disk" -gt 0 ]; then
        echo "installing into $venv (once; about $download MB to download, $disk MB on disk):" $missing >&2
    else
        echo "installing into $venv (once):" $missing >&2
    fi
    offers_only_cuda_torch && options=(--extra-index-url "$CPU_BUILDS")
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --disable-pip-version-check ${options[@]+"${options[@]}"} $missing >&2 && return 0
    [ -n "$interrupted" ] && return 130
    explain_failure "pip could not install the packages above"
    full_disk >/dev/null && return 2
    echo "without a network, on a machine that has one, the same system and $("$PYTHON" --version), in a clone of this repository:" >&2
    echo "  python3 -m pip download ${names[*]/#/-r } -d wheels --extra-index-url $CPU_BUILDS" >&2
    echo "then bring the folder wheels here, and begin the same command with: PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels" >&2
    echo "or install the packages into a Python of your own, and name it in ATB_PLLAVA_PYTHON" >&2
    return 2
}

find_python() {
    local root
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
    choose_python "$@" || return
    name_cuda_torch
}

# Sets PYTHON, see the top of this file.
choose_python() {
    local requirements=("$@") missing base venv=$root/.venv status=0 interrupted=""
    if [ -n "${ATB_PLLAVA_PYTHON:-}" ]; then
        PYTHON=$ATB_PLLAVA_PYTHON
        missing=$(missing_packages "$PYTHON" 2>/dev/null) ||
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
    trap 'interrupted=yes' INT # bash runs the trap after the interrupted command has returned
    { lock_clone && set_up; } || status=$?
    exec 9<&-
    trap - INT
    if [ -n "$interrupted" ]; then
        echo "set-up interrupted; the same command goes on with it" >&2
        return 130
    fi
    return "$status"
}

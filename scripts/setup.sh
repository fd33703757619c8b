#!/usr/bin/env bash
# Sets up .venv with everything: system packages (apt), torch, DALI, FFCV, tools. Idempotent.
#   scripts/setup.sh                    or: make setup
#   PYTHON=python3.12 scripts/setup.sh  uses that interpreter when .venv is created
#   CONSTRAINTS=1 scripts/setup.sh      installs the tested versions, and compares their hashes
# If FFCV or DALI cannot be installed, set-up prints one line and continues; see the log for details.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
PY=$VENV/bin/python
LOG=$VENV/setup.log
STAMP=$VENV/setup.stamp
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 DEBIAN_FRONTEND=noninteractive
unset PYTHONPATH PYTHONHOME

# The stamp holds a checksum of the inputs, the closing line, and the missing engines.
inputs=$(cat setup.cfg pyproject.toml scripts/setup.sh constraints.txt - <<<"${CONSTRAINTS-}" | cksum)
if [[ -x $PY && -f $STAMP ]]; then
    mapfile -t stamp <"$STAMP"
    if [[ ${stamp[0]-} == "$inputs" && -z ${stamp[2]-} ]]; then
        touch "$STAMP"
        echo "set-up is up to date: ${stamp[1]}"
        exit 0
    fi
fi

say() { printf '  %-56s %4d s\n' "$1" "$2"; }

# stage NAME COMMAND...: runs the command quietly, then prints NAME and its duration in seconds.
stage() {
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*" >>"$LOG"
    "$@" >>"$LOG" 2>&1 </dev/null || return 1
    say "$name" $((SECONDS - start))
}

die() {
    echo "set-up failed: $1" >&2
    if [[ -s $LOG ]]; then
        echo "the end of $LOG:" >&2
        tail -n 15 "$LOG" | sed 's/^/    /' >&2
    fi
    exit 1
}

# apt_install PACKAGE...: installs missing packages. Returns 1 with the reason in $why.
why=
apt_install() {
    local package missing=() root=()
    command -v apt-get >/dev/null || { why="no apt-get on this platform"; return 1; }
    for package in "$@"; do
        dpkg-query -W -f='${Status}\n' "$package" 2>/dev/null | grep -q '^install ok installed' ||
            missing+=("$package")
    done
    ((${#missing[@]})) || return 0
    if ((EUID != 0)); then
        command -v sudo >/dev/null || { why="not root and no sudo: ${missing[*]}"; return 1; }
        # Without a terminal nobody can type a password, so sudo must not wait for one.
        if [[ -t 0 ]]; then root=(sudo); else root=(sudo -n); fi
        "${root[@]}" true || { why="sudo refused: ${missing[*]}"; return 1; }
        root+=(env "DEBIAN_FRONTEND=$DEBIAN_FRONTEND")
    fi
    stage "system packages: index" "${root[@]}" apt-get update -q || true # old lists may be sufficient
    if ! stage "system packages: ${missing[*]}" "${root[@]}" \
        apt-get install -q -y --no-install-recommends "${missing[@]}"; then
        why="apt-get failed: $(grep '^E: ' "$LOG" | tail -n 1 | cut -c4-150)"
        return 1
    fi
}

recent_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n ${PYTHON-} ]]; then
        recent_enough "$PYTHON" || die "PYTHON=$PYTHON is not Python 3.11 or newer"
        python=$PYTHON
        return 0
    fi
    for candidate in python3.12 python3.11 python3; do
        if recent_enough "$candidate"; then
            python=$candidate
            return 0
        fi
    done
    return 1
}

make_venv() {
    local version
    find_python || apt_install python3 python3-venv python3-dev || true
    find_python || die "no Python 3.11 or newer found (${why:-set PYTHON=/path/to/python3})"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        apt_install "python$version-venv" || die "Python $version cannot create a venv: $why"
    fi
    stage "virtual environment, Python $version" "$python" -m venv "$VENV" ||
        die "$python -m venv $VENV"
}

# can_import MODULE: tests the import itself, not pip's records.
can_import() { "$PY" -W ignore -c "import $1" >>"$LOG" 2>&1 </dev/null; }
pip_install() { "$PY" -m pip install -q "$@"; }
last_error() { grep -iE 'error|no matching' "$LOG" | tail -n 1 | sed 's/^ *//' | cut -c1-150; }

# locked PART: options of pip for the tested versions: of ffcv, of dali, or of all others.
locked() {
    local file=$VENV/constraints-$1.txt
    awk -v part="$1" '
        /^[^ #]/ { found = /^ffcv==/ ? "ffcv" : /^nvidia-dali/ ? "dali" : "others" }
        found == part' constraints.txt >"$file"
    # The file is complete: pip has nothing to look for.
    requirement=(--no-deps --require-hashes -r "$file")
}

install_project() {
    local requirement
    [[ ${CONSTRAINTS-} == 1 ]] || { pip_install -e '.[dev,eval]'; return; }
    locked others
    pip_install "${requirement[@]}" && pip_install --no-deps --no-build-isolation -e .
}

install_dali() {
    local major requirement=(-e '.[dali]')
    [[ ${CONSTRAINTS-} != 1 ]] && can_import nvidia.dali && return 0
    major=$("$PY" -c 'import torch; print((torch.version.cuda or "13").split(".")[0])')
    [[ $major == 13 ]] || requirement=("nvidia-dali-cuda${major}0>=2.3")
    [[ ${CONSTRAINTS-} != 1 ]] || locked dali
    stage "DALI for CUDA $major" pip_install "${requirement[@]}" && can_import nvidia.dali && return 0
    why=$(last_error)
    return 1
}

install_ffcv() {
    local packages include requirement=(-e '.[ffcv]')
    [[ ${CONSTRAINTS-} != 1 ]] && can_import ffcv && return 0
    # FFCV builds against OpenCV and TurboJPEG; the OpenCV wheel it pulls in loads libGL and GLib.
    packages=(g++ pkg-config libopencv-dev libturbojpeg0-dev libgl1 libglib2.0-0)
    include=$("$PY" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [[ -f $include/Python.h ]] ||
        packages+=("$("$PY" -c 'import sys; print("python%d.%d-dev" % sys.version_info[:2])')")
    # Without apt the headers may still be present: let the build decide.
    apt_install "${packages[@]}" || true
    # Built with the setuptools of the same file, not with the newest.
    [[ ${CONSTRAINTS-} != 1 ]] || { locked ffcv; requirement+=(--no-build-isolation); }
    stage "FFCV, built from source" pip_install "${requirement[@]}" && can_import ffcv && return 0
    [[ -n $why ]] || why=$(last_error)
    return 1
}

echo "setting up $VENV (log: $LOG)"
mkdir -p "$VENV"
: >"$LOG"
rm -f "$STAMP"
"$PY" -m pip --version >/dev/null 2>&1 || make_venv
stage "rotpred, torch and tools" install_project || die "pip could not install rotpred"

missing=
why=
if ! install_dali; then
    missing+=" dali"
    echo "  DALI is left out: ${why:-see $LOG}"
fi
why=
if ! install_ffcv; then
    missing+=" ffcv"
    echo "  FFCV is left out: ${why:-see $LOG}"
fi

# Compile now what the first run would otherwise compile.
stage "numba kernels" "$PY" -m pipelines.precompile ||
    echo "  Kernels are not compiled yet: $(last_error)"

engines=$(MISSING=$missing "$PY" - <<'PYTHON'
import os
from importlib.metadata import distributions

found = {d.name.lower(): d.version for d in distributions()}
dali = next((name for name in sorted(found) if name.startswith("nvidia-dali-cuda")), "nvidia-dali")
parts = [("ffcv", "ffcv"), ("dali", dali), ("folder", "torchvision")]
missing = os.environ["MISSING"].split()
names = [f"{e} ({p} {found.get(p)})" for e, p in parts if e not in missing] + ["synthetic"]
print("engines: " + ", ".join(names))
PYTHON
)
printf '%s\n' "$inputs" "$engines" "$missing" >"$STAMP"
echo "set-up done in $SECONDS s; $engines"

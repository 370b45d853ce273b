#!/usr/bin/env bash
# Makes sure that a virtual environment has what this machine needs, and prints its Python.
#
#   python=$(scripts/setup.sh)         # to train
#   python=$(scripts/setup.sh test)    # to run the tests as well
#
# A second call installs nothing: a stamp in the environment remembers what was installed from which
# pyproject.toml and constraints.txt. TORCH_INDEX_URL names a package index to take torch from.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; } # stdout is for the answer

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# The constraints were tested on 3.11, so that comes first.
find_python() {
    for candidate in python3.11 python3.12 python3.13 python3.14 python3 python; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    say "Python 3.11 or newer was not found; install one (Debian: apt install python3.11-venv)"
    exit 1
}

machine() {
    if nvidia-smi -L >/dev/null 2>&1; then
        echo cuda
    elif [ "$(uname -sm)" = "Darwin arm64" ]; then
        echo apple
    elif [ -d /opt/rocm ]; then
        echo rocm
    else
        echo cpu
    fi
}

venv=${VIRTUAL_ENV:-$PWD/.venv}
python=$venv/bin/python
if [ ! -x "$python" ]; then
    base=$(find_python)
    say "making a virtual environment in $venv"
    "$base" -m venv "$venv" >&2
elif ! is_new_enough "$python"; then
    say "$python is older than 3.11; deactivate it, or remove $venv, and start again"
    exit 1
fi

# The folder is part of the digest: another clone in the same environment is another installation.
digest=$({ pwd; cat pyproject.toml constraints.txt; } | cksum)
extras=$(machine)${1:+,$1}
missing=
for extra in ${extras//,/ }; do
    [ "$(cat "$venv/.simpletuner-$extra" 2>/dev/null)" = "$digest" ] || missing=yes
done

if [ "$missing" ]; then
    say "installing simpletuner[$extras] into $venv, once; this takes a few minutes"
    if [[ $extras == rocm* && -z ${TORCH_INDEX_URL:-} ]]; then
        say "torch for ROCm is not on PyPI: set TORCH_INDEX_URL to the index of your ROCm version," \
            "from https://pytorch.org/get-started/locally"
        exit 1
    fi
    # torch first and alone, or another package's requirement picks its build.
    "$python" -m pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
        --constraint constraints.txt torch >&2
    "$python" -m pip install --constraint constraints.txt --editable ".[$extras]" >&2
    for extra in ${extras//,/ }; do
        echo "$digest" >"$venv/.simpletuner-$extra"
    done
fi
echo "$python"

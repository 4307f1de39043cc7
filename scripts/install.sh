#!/usr/bin/env bash
# Create the virtual environment and install tierkv (editable) with the extras named.
#
#   scripts/install.sh VENV EXTRA[,EXTRA...]
#
# PYTHON           the interpreter to make it with (default python3; at least 3.11)
# TORCH_INDEX_URL  where to take torch from, if not the package index in use
set -euo pipefail
cd "$(dirname "$0")/.."

venv=$1
extras=$2
python=${PYTHON:-python3}

if [ ! -x "$venv/bin/python" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "tierkv needs Python 3.11 or newer, and $python is $("$python" --version 2>&1);" \
            "set PYTHON, for example: make test PYTHON=python3.12" >&2
        exit 1
    }
    "$python" -m venv "$venv"
fi

# Without an NVIDIA driver every machine gets the same torch; with one, what fits its CUDA.
torch="torch>=2.11"
constraint=()
if [ ! -e /proc/driver/nvidia/version ] && ! command -v nvidia-smi >/dev/null; then
    torch=$(grep '^torch==' constraints-cpu.txt)
    constraint=(--constraint constraints-cpu.txt)
fi

# Torch first and by itself: only its build depends on the machine.
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
"${pip[@]}" "${constraint[@]}" --editable ".[$extras]"

#!/usr/bin/env bash
# smedjan beside mlx-lm on this Mac, in one command from a clone: tokens/s and peak memory of LoRA, prefill and decode.
#
#   bench/mac.sh [--shape NAME ...] [--rounds N] [--steps N] [--out FOLDER]      (bench/mac.py says what each is)
#
# Makes a virtual environment of its own in bench/.venv-mac (PYTHON chooses its interpreter); with SMEDJAN_PYTHON set,
# that interpreter runs the bench, and nothing is installed. No model is downloaded.
# Exit code: 0 all well, 1 the bench failed, 2 the machine lacks something.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if [ -z "${SMEDJAN_PYTHON:-}" ]; then
    if [ "$(uname -s)" != Darwin ] || [ "$(uname -m)" != arm64 ]; then
        echo "this is for Macs with Apple silicon, under an arm64 shell (bench/README.md)" >&2
        exit 2
    fi
    venv=bench/.venv-mac
    SMEDJAN_PYTHON=$venv/bin/python
    if [ ! -x "$SMEDJAN_PYTHON" ]; then
        "${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
            echo "smedjan needs Python 3.11 to 3.13: give one as PYTHON=..." >&2
            exit 2
        }
        "${PYTHON:-python3}" -m venv "$venv" || exit 2
    fi
    "$SMEDJAN_PYTHON" -m pip install --quiet -e '.[mlx]' 'mlx-lm>=0.32' || exit 2
fi
"$SMEDJAN_PYTHON" -c 'import mlx.core, mlx_lm' || exit 2
exec "$SMEDJAN_PYTHON" bench/mac.py "$@"

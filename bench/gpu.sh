#!/usr/bin/env bash
# The Triton backend on a real NVIDIA GPU, in one call of at most 9 minutes that needs no network: its tests, compiled and
# run on the device, then its kernels and its training steps beside their peers, as RESULTS/<device>-<date>.json.
#
#   bench/gpu.sh [RESULTS]        default bench/results; PYTHON chooses the interpreter (default python3)
#
# Needs torch >= 2.11 with CUDA, triton >= 3.6, transformers and pytest; the package itself need not be installed. Liger
# Kernel and peft are measured beside it where they import.
# Exit code: 0 all well, 1 a test failed or a step ran out of time, 2 the machine lacks something.
set -uo pipefail
results=$(realpath -m "${1:-$(dirname "$0")/results}")
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 SMEDJAN_TEST_DEVICE=cuda
unset TRITON_INTERPRET

"$python" - <<'CHECK' || exit 2
import importlib.util, sys

missing = [name for name in ("torch", "triton", "transformers", "pytest") if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"missing here: {' '.join(missing)} (python -m pip install {' '.join(missing)})")
import torch, triton

if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device")
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, python {sys.version.split()[0]}")
CHECK
file=$("$python" bench/gpu_result.py "$results") || exit 2

# Most of the tests' time is Triton compiling: with pytest-xdist several processes do it at once.
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); else echo "pytest-xdist is not here: one process"; fi

status=0
tests=passed
# --confcutdir leaves out tests/conftest.py, which wants every dependency of the package.
timeout 240 "$python" -m pytest -q -x "${workers[@]}" -p no:cacheprovider --confcutdir=tests/backends/cuda_triton \
    $(bench/gpu_tests.sh) || tests=failed
echo "kernel tests on the device: $tests"
"$python" bench/gpu_result.py "$file" tests "$tests"
[ "$tests" = passed ] || status=1

timeout 150 "$python" bench/gpu_kernels.py "$file" || status=1
timeout 130 "$python" bench/gpu_step.py "$file" || status=1
echo "wrote $file"
exit "$status"

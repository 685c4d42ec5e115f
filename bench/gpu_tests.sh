#!/usr/bin/env bash
# The tests that run on a device: those of the kernels, which say so by taking the fixture `device` or `rand`.
cd "$(dirname "$0")/.." && grep -lE "\((.*, )?(rand|device)[,:)]" tests/backends/cuda_triton/test_*.py

#!/usr/bin/env bash
# Lints, and runs the tests on a CPU in WORKERS=2 processes; arguments go to pytest: bash launch/test.sh -k sampling
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

.venv/bin/ruff check .
# XLA's newest code generation for CPUs takes a third of the compile time; this flag, known to the jaxlib that
# requirements.txt pins, turns it off.
export XLA_FLAGS=${XLA_FLAGS---xla_cpu_use_fusion_emitters=false}
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"

#!/usr/bin/env bash
# Lints and runs the tests, on a CPU, in WORKERS=2 processes; arguments go to pytest: bash launch/test.sh -k sampling
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

.venv/bin/ruff check .
# A third of the time that compiling takes is XLA's newest way to generate code for a CPU; requirements.txt pins the jaxlib
# that knows this flag.
export XLA_FLAGS=${XLA_FLAGS---xla_cpu_use_fusion_emitters=false}
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"

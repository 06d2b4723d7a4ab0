#!/usr/bin/env bash
# Lints and runs the tests, on a CPU, in WORKERS=2 processes; arguments go to pytest: bash launch/test.sh -k sampling
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" test

.venv/bin/ruff check .
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest -n "${WORKERS:-2}" --dist worksteal "$@"

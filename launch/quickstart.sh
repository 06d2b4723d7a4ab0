#!/usr/bin/env bash
# From a fresh clone to text: installs, prepares the data, trains, evaluates and samples. Run again, it goes on where it
# stopped. Further arguments are settings: bash launch/quickstart.sh --config.train.steps=4000
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "" # no extra; without an argument it would see this script's

# A stopped training saves and exits with a status that ends this script too, so that nothing else starts.
trap 'exit 130' INT
trap 'exit 143' TERM

duo() { .venv/bin/python -m duo_jax.main --config=configs/quickstart.py --workdir="${WORKDIR:-runs/quickstart}" "$@"; }

words=("$@") settings=() # settings: all arguments but --workdir, which the preparation of the data does not take
for ((i = 0; i < $#; i++)); do
  case ${words[i]} in
    --workdir=*) ;;
    --workdir) i=$((i + 1)) ;;
    *) settings+=("${words[i]}") ;;
  esac
done

.venv/bin/python -m duo_jax.data.prepare --config=configs/quickstart.py "${settings[@]}"
duo "$@"
duo "$@" --config.mode=eval
duo "$@" --config.mode=sample

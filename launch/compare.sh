#!/usr/bin/env bash
# Compares the algorithms on the same text with the same network: trains the quickstart's recipe with each, one after the
# other, and plots their held-out perplexity. Run again, it goes on where it stopped.
#
#   bash launch/compare.sh                   all algorithms; results in runs/compare
#   ALGOS="duo mdlm" bash launch/compare.sh  only these
#
# Further arguments are settings for all of them: bash launch/compare.sh --config.train.steps=20000
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "" # no extra; without an argument it would see this script's

# A stopped training saves and exits with a status that ends this script too, so that nothing else starts.
trap 'exit 130' INT
trap 'exit 143' TERM

folder=${WORKDIR:-runs/compare}
runs=()
for algo in ${ALGOS:-ar mdlm duo duo_base sedd d3pm}; do
  .venv/bin/python -m duo_jax.main --config=configs/quickstart.py --config.algo.name="$algo" --workdir="$folder/$algo" "$@"
  runs+=(--runs "$algo=$folder/$algo")
done
.venv/bin/python -m duo_jax.evaluation.compare "${runs[@]}" --out "$folder"

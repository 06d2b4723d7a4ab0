"""From noise to text: every sampler, prompts and infilling, and texts of any number and length from a network."""

from duo_jax.sampling import prompts, replay, texts
from duo_jax.sampling.engine import Given, Knobs, Walk, generate, run, walk
from duo_jax.sampling.networks import denoiser, sample_tokens
from duo_jax.sampling.results import unigram_entropy, until_end
from duo_jax.sampling.settings import (
    NOISE_REMOVALS,
    SAMPLERS,
    Psi,
    Settings,
    as_psi,
    check_guidance,
    check_temperature,
    uses_nucleus,
)

__all__ = [
    "NOISE_REMOVALS", "SAMPLERS", "Given", "Knobs", "Psi", "Settings", "Walk", "as_psi", "check_guidance",
    "check_temperature", "denoiser", "generate", "prompts", "replay", "run", "sample_tokens", "texts", "unigram_entropy",
    "until_end", "uses_nucleus", "walk",
]  # fmt: skip

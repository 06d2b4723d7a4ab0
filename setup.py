"""Installs duo_jax: `pip install -e .` on a CPU, `pip install -e .[cuda]` on an NVIDIA GPU."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "cuda": ["jax[cuda12]"],
    "harness": ["lm-eval>=0.4.13"],
    "hub": ["datasets>=3.0"],
    "judge": ["gguf>=0.10"],
    "torch": ["torch>=2.4"],
    "tpu": ["jax[tpu]"],
    "test": [
        "gguf>=0.10",
        "lm-eval>=0.4.13",
        "mpmath>=1.3",
        "pyarrow>=17",
        "pytest>=8.0",
        "pytest-xdist>=3.6",
        "ruff==0.17.6",
    ],
}

setup(
    name="duo_jax",
    version="0.1.0",
    description="The Diffusion Duality in JAX: uniform-state discrete diffusion language models and few-step samplers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["duo_jax", "duo_jax.*"]),
    package_data={"duo_jax": ["sampling/*.html", "shipped/*/*", "shipped/*/tokenizer/*"]},
    install_requires=[
        "absl-py>=2.1",
        "clu>=0.0.12",
        "flax>=0.12",
        "grain>=0.2.16",
        "huggingface_hub>=0.24",
        "jax>=0.10",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.20",
        "safetensors>=0.4.5",
        "scipy>=1.13",
        "tensorboardX>=2.6.2",
        "tiktoken>=0.12",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
)

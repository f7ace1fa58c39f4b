"""Package `jaxrl_llm` and `jaxrl_kernels`. `experiments` and `configs` run from a checkout and are not in the wheel.

Which jax goes with which flax:

- Python 3.11: jax 0.10.2 and flax 0.12.8, the last of both for it. `requirements.lock` pins this pair, the one that
  every change is tested with; the lock installs on Python 3.11 to 3.14.
- Python 3.12 and later may also have jax 0.11.2 with flax 0.12.12.
- flax 0.12.8 with jax 0.11 fails when it is imported: jax took away classes that it uses.
- jax 0.11.0, 0.11.1 and 0.12 are excluded: not tested with any flax.
"""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

CORE = [
    "jax>=0.10.2,!=0.11.0,!=0.11.1,<0.12",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "jaxtyping>=0.3.11",
    "ml_collections>=1.1",
    "numpy>=2.0",
    "tokenizers>=0.22",
    "transformers>=5.0",
    "huggingface_hub>=1.0",
    "sentencepiece>=0.2.3",
    "jinja2>=3.1.6",
    "datasets>=4.4",
    "safetensors>=0.6",
    "bm25s>=0.3",
    "jsonschema>=4.26",
    "simpleeval>=1.0.8",
    "faiss-cpu>=1.13",
    "mcp>=2.3,<3",
    "math-verify[antlr4-13-2]>=0.9",
    "mctx>=0.0.71",
    "outlines_core>=0.2.14",
    "rich>=14.0",
    "tabulate>=0.9",
    "matplotlib>=3.10",
    "tenacity>=9.0",
    "tensorboardX>=2.6.4",
]
DEV = [
    "pytest>=9.0",
    "pytest-cov>=7.0",
    "pytest-xdist>=3.8",
    "psutil>=7.0",
    "hypothesis>=6.150",
    "chex>=0.1.92",
    "packaging>=25",
    "ruff>=0.15",
    "mypy>=2.0",
    "nbclient>=0.10",
    "nbformat>=5.10",
    "ipykernel>=7.0",
    "setuptools>=77",
]


def read_version() -> str:
    for node in ast.parse((ROOT / "jaxrl_llm" / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__version__":
            return ast.literal_eval(node.value)
    raise RuntimeError("jaxrl_llm/__init__.py assigns no __version__")


setup(
    name="jaxrl_llm",
    version=read_version(),
    description="Reinforcement learning of language models in JAX: pure functions, one page per paper",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["jaxrl_llm", "jaxrl_llm.*"]) + find_packages("kernels"),
    package_dir={"jaxrl_kernels": "kernels/jaxrl_kernels"},
    package_data={
        "jaxrl_llm": [
            "py.typed",
            *(f"**/{name}" for name in ("*.csv", "*.json", "*.jsonl", "*.safetensors", "*.md", "LICENSE*")),
        ]
    },
    install_requires=CORE,
    extras_require={
        "dev": DEV,
        "distributed": ["ray>=2.60"],  # jaxrl_llm.distributed in several processes
        "gpu": ["jax[cuda13]"],  # needs an NVIDIA driver from 580 on; for an older one install jax[cuda12] by hand
        "tpu": ["jax[tpu]"],
        "plan": ["libtpu==0.0.52"],  # compiles for TPUs on a machine without one: python -m experiments.plan
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

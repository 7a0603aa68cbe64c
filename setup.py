"""Maps the top-level folders into one namespace package, ``palimpsest``.

``models/`` is ``palimpsest.models``, ``kernels/`` is ``palimpsest.kernels`` and so on: the folders keep
short names in a checkout, and an installed copy never occupies a bare ``models`` or ``train``.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ("kernels", "models", "train", "eval", "configs")
HERE = Path(__file__).parent


def packages() -> list[str]:
    """Every package of every room, under its installed name."""
    found = []
    for room in ROOMS:
        found.append(f"palimpsest.{room}")
        found += [f"palimpsest.{room}.{name}" for name in find_packages(str(HERE / room))]
    return found


DOORS = {
    "palimpsest-train": "palimpsest.train.__main__:main",
    "palimpsest-data": "palimpsest.train.data:main",
    "palimpsest-report": "palimpsest.train.report:main",
    "palimpsest-eval": "palimpsest.eval.__main__:main",
    "palimpsest-generate": "palimpsest.eval.generate:main",
    "palimpsest-quickstart": "palimpsest.eval.quickstart:main",
    "palimpsest-presets": "palimpsest.eval.presets:main",
    "palimpsest-stability": "palimpsest.eval.stability:main",
    "palimpsest-inspect": "palimpsest.eval.inspect:main",
    "palimpsest-ablate": "palimpsest.eval.ablate:main",
    "palimpsest-describe": "palimpsest.models.describe:main",
    "palimpsest-export": "palimpsest.eval.export:main",
    "palimpsest-lm-eval": "palimpsest.eval.lm_eval:main",
    "palimpsest-profile": "palimpsest.kernels.profile.__main__:main",
}

DATA = ["datasets>=3.0", "pyarrow>=15", "tokenizers>=0.20", "zstandard>=0.22"]
HF = ["transformers>=4.56"]
LM_EVAL = ["lm_eval>=0.4.13", "nltk>=3.9.1", "wonderwords>=2.2"]  # the last two make the texts of RULER's tasks
PLOT = ["matplotlib>=3.8"]
TOOLS = [
    "build>=1.2",
    "hypothesis>=6.100",
    "mypy>=1.11",
    "pytest-xdist>=3.5",
    "pytest>=8",
    "ruff>=0.8",
    "setuptools>=77",
    "types-PyYAML",
    "wheel",
]
EXTRAS = {
    "data": DATA,
    "hf": HF,
    "lm-eval": HF + DATA + LM_EVAL,
    "plot": PLOT,
    "flash": ["flash-attn>=2.6; platform_system == 'Linux'"],
    "fp8": ["torchao>=0.10; platform_system == 'Linux'"],
    "dev": TOOLS + DATA + HF + PLOT,
}

setup(
    name="palimpsest",
    version="0.1.0",
    description="Memory-augmented sequence models: test-time learned memories, and one small loop to pretrain them",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    packages=packages(),
    package_dir={f"palimpsest.{room}": room for room in ROOMS},
    package_data={"palimpsest.configs": ["*.yaml", "**/*.yaml"], "palimpsest.kernels": ["profile/*.json"]},
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "einops>=0.8",
        "numpy>=1.26",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "tensorboard>=2.16",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": [f"{name}={target}" for name, target in DOORS.items()]},
)

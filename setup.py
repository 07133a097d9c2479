"""The repository root is the import package `internlm3`, so `kernels` and `runtime` never land top-level."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'VERSION = "(.+)"', (ROOT / "runtime" / "version.py").read_text(encoding="utf-8"))[1]
ROOT_MODULES = {"__init__", "__main__"}


class BuildPackageOnly(build_py):
    """The root doubles as the package: only the package's own modules are packed, no other file of the checkout."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [found for found in modules if package != "internlm3" or found[1] in ROOT_MODULES]


setup(
    name="internlm3",
    version=VERSION,
    description="InternLM3 at the lowest latency one GPU allows: Triton kernels and a thin runtime",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    package_dir={"internlm3": "."},
    packages=["internlm3", *(f"internlm3.{name}" for name in find_packages(ROOT, include=["kernels*", "runtime*"]))],
    package_data={"internlm3": ["py.typed"]},
    cmdclass={"build_py": BuildPackageOnly},
    # Both ends were tried (2026-11-25, Python 3.11, no GPU): the pins of constraints.txt, which are the newest, and
    # - torch 2.11.0 with triton 3.6.0, and 2.14.1 with 3.8.0: kernels in the interpreter, model, engine;
    # - triton 3.6.0, 3.8.0 and 3.9.0 by `make test TRITON=...`: every kernel test in the interpreter, and the audit of
    #   machine code, without a violation;
    # - the least of all others together: text and weights of the demo model come out as with the newest.
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; sys_platform == 'linux'",
        "numpy>=1.26",  # torch works without it, but warns
        "sentencepiece>=0.2.3",
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "huggingface_hub>=1.1",  # 1.0 shows bars though none are asked for
        "jinja2>=3.1.6",
        "filelock>=3.12",
        "tqdm>=4.60",
    ],
    extras_require={
        # History, editing and several lines at once in `internlm3 chat`.
        "chat": ["prompt_toolkit>=3.0"],
        # `internlm3 demo` converts a small GGUF model into InternLM3's format, and chats.
        "demo": ["gguf>=0.17", "protobuf>=5", "prompt_toolkit>=3.0"],
        # `python -m bench.report --plot` draws a record.
        "plots": ["matplotlib>=3.9"],
        # transformers is the oracle of the tests and a peer of the benches, never a dependency of the runtime.
        "test": [
            "gguf>=0.17",
            "protobuf>=5",
            "prompt_toolkit>=3.0",
            "matplotlib>=3.9",
            # the first that knows InternLM3; Python 3.10 has an older one, and leaves those comparisons out
            "transformers>=5.23; python_version >= '3.11'",
            "transformers>=5.20; python_version < '3.11'",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
        ],
    },
    entry_points={"console_scripts": ["internlm3 = internlm3.runtime.cli:main"]},
)

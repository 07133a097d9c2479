"""The package: a wheel that contains it and nothing else, and checkouts that share an environment but no code."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import ROOT

PACKAGED = ("__init__.py", "__main__.py", "py.typed", "kernels", "runtime")  # of the root
NEEDED = (*PACKAGED, "setup.py", "pyproject.toml", "README.md", "LICENSE")  # to build a wheel


def run(*command, cwd, expect=0, **variables):
    """The standard output of a command, without this process's PYTHONPATH and its like."""
    ours = ("PYTHON", "PYTEST", "INTERNLM3")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


def copy_to(folder, names):
    """Copies these files and folders of this checkout."""
    folder.mkdir()
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy of this checkout with modules of a user in it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    copy_to(source, NEEDED)
    for stray in ("mine.py", "notes.py", "kernels_of_mine/__init__.py", "experiments/__init__.py", "kernels/notes.txt"):
        (source / stray).parent.mkdir(exist_ok=True)
        (source / stray).write_text("raise AssertionError('a stray module was imported')\n")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(place), str(source), cwd=place)
    (built,) = place.glob("*.whl")
    return built


def test_the_wheel_contains_the_package_and_nothing_else(wheel):
    modules = {path for name in PACKAGED for path in [ROOT / name, *(ROOT / name).rglob("*.py")] if path.is_file()}
    data = {ROOT / "runtime" / name for name in ("checkpoint/quantise/calibration.txt", "server/page.html")}
    expected = {f"internlm3/{path.relative_to(ROOT).as_posix()}" for path in modules | data}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert len([name for name in names if name.endswith(".dist-info/licenses/LICENSE")]) == 1


def test_its_metadata(wheel):
    from internlm3 import __version__

    assert wheel.name == f"internlm3-{__version__}-py3-none-any.whl"
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    text = archive.read(metadata).decode()
    assert "\nAuthor: The internlm3 authors\n" in text and "\nLicense: Apache-2.0\n" in text
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_installed_wheel_answers_without_the_checkout(wheel, demo_model, tmp_path):
    """In a fresh environment, which finds this one's PyTorch and other dependencies after its own packages."""
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env"), cwd=tmp_path)
    python = str(tmp_path / "env" / "bin" / "python")
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", str(wheel), cwd=tmp_path)
    where = run(python, "-c", "import internlm3; print(internlm3.__file__)", cwd=tmp_path).strip()
    assert Path(where) == site / "internlm3" / "__init__.py"
    command = [
        python,
        "-m",
        "internlm3",
        "generate",
        str(demo_model),
        "-p",
        "What is the capital of France?",
        "-n",
        "3",
    ]
    assert run(*command, cwd=tmp_path, OMP_NUM_THREADS="1").strip()
    assert run(str(site.parents[2] / "bin" / "internlm3"), "--version", cwd=tmp_path).startswith("internlm3 ")


def test_each_checkout_tests_itself(tmp_path):
    """Two checkouts and one environment: a fault in one makes its tests fail, and only its."""
    for name in ("sound", "faulty"):
        copy_to(tmp_path / name, (*NEEDED, "bench", "tests"))
    file = tmp_path / "faulty" / "runtime" / "sampling" / "params.py"
    text = file.read_text()
    assert text.count("top_k=40") == 1
    file.write_text(text.replace("top_k=40", "top_k=41"))
    test = "tests/sampling/test_params.py::test_recommended_settings_of_the_model"
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    assert "1 passed" in run(*pytest_, cwd=tmp_path / "sound")
    assert "assert (1.0, 0.8, 41, 1.005) == (1.0, 0.8, 40, 1.005)" in run(*pytest_, cwd=tmp_path / "faulty", expect=1)

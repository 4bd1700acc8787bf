"""The wheel and the sdist, built and installed where no checkout and nothing but torch is."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY
from packaging.requirements import Requirement

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = importlib.metadata.packages_distributions()  # name of a module -> names of what brings it
INSTALLED = {name for names in DISTRIBUTIONS.values() for name in names}
LEFT_OUT = (".*", "runs", "cache", "results", "__pycache__", "*.egg-info", "build", "dist", "site")


def run(*command, cwd, **how):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=120, **how)
    return done.returncode, done.stdout, done.stderr


def build(kind, source, target):
    """Build in a directory as pip does, with setuptools of this environment; return the file."""
    code = f"from setuptools import build_meta; print('made', build_meta.build_{kind}({str(target)!r}))"
    done, out, err = run(sys.executable, "-c", code, cwd=source)
    assert done == 0, err
    return Path(target) / re.findall(r"^made (.+)$", out, re.MULTILINE)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The checkout as files; the sdist made of it, and the wheel made of the sdist's files, as installers do."""
    root = tmp_path_factory.mktemp("package")
    shutil.copytree(REPOSITORY, root / "checkout", ignore=shutil.ignore_patterns(*LEFT_OUT))
    sdist = build("sdist", root / "checkout", root)
    with tarfile.open(sdist) as archive:
        archive.extractall(root, filter="data")
    return root / "checkout", sdist, build("wheel", root / sdist.name.removesuffix(".tar.gz"), root)


def needed(name):
    """A distribution and all that it requires, by name."""
    ahead, found = [name], {}
    while ahead:
        distribution = importlib.metadata.distribution(ahead.pop())
        if found.setdefault(distribution.name, distribution) is distribution:
            wanted = map(Requirement, distribution.requires or [])
            ahead += [w.name for w in wanted if not w.marker or w.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.fixture(scope="module")
def fresh(made, tmp_path_factory):
    """The Python of a new environment with torch, what torch requires, and the wheel: as `pip install adafrugal`."""
    root = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", root, cwd=root)
    (packages,) = root.glob("lib/python*/site-packages")
    for distribution in needed("torch"):
        for top in {Path(file).parts[0] for file in distribution.files if ".." not in Path(file).parts}:
            if top != "__pycache__" and not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    code, _, err = run(*pip, "install", "--no-index", made[2], cwd=root)  # fails if torch is not all it requires
    assert code == 0, err
    return python


def test_the_wheel_holds_the_package_alone(made):
    checkout, sdist, wheel = made
    name = f"adafrugal-{PROJECT['version']}"
    inside = set(zipfile.ZipFile(wheel).namelist())
    source = {str(f.relative_to(checkout / "src")) for f in (checkout / "src/adafrugal").rglob("*") if f.is_file()}
    assert {file for file in inside if ".dist-info/" not in file} == source
    assert "adafrugal/py.typed" in inside
    assert {file.split("/")[0] for file in inside} == {"adafrugal", f"{name}.dist-info"}
    with tarfile.open(sdist) as archive:
        listed = {file.removeprefix(f"{name}/") for file in archive.getnames()}
    assert {"CHANGELOG.md", "CITATION.cff", "LICENSE", "docs/library.md", "src/adafrugal/py.typed"} <= listed
    assert not any(file.startswith(("src/hydra_plugins", "tests", "train.py")) for file in listed)


def test_what_the_package_imports_comes_with_it_or_its_extras():
    """Except triton, of torch's builds for GPUs, and the trainers of `integrations`, whose users have them."""
    extras = [Requirement(line).name for lines in PROJECT["optional-dependencies"].values() for line in lines]
    brought = {d.name for name in ["torch", *extras] if name in INSTALLED for d in needed(name)} | {*extras}
    for file in (REPOSITORY / "src/adafrugal").rglob("*.py"):
        for name in re.findall(r"^ *(?:from|import) (\w+)", file.read_text(), re.MULTILINE):
            if file.parent.name != "integrations" and name not in sys.stdlib_module_names | {"adafrugal", "triton"}:
                assert {*DISTRIBUTIONS.get(name, [name])} & brought, f"{file}: {name}"


def test_the_page_on_the_index_has_no_relative_links():
    page = (REPOSITORY / PROJECT["readme"]).read_text()
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]+)\)", page))


def test_the_version_is_the_same_everywhere():
    version = PROJECT["version"]
    assert f"\nversion: {version}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_an_editable_install_gives_train_py_its_plugin(made, tmp_path):
    """Of requirements.txt's last line; only a path to src/ brings what the wheel leaves out."""
    checkout, _, _ = made
    archive = zipfile.ZipFile(build("editable", checkout, tmp_path))
    (path,) = (name for name in archive.namelist() if name.endswith(".pth"))
    assert archive.read(path).decode().strip() == str(checkout / "src")
    assert {f.stem for f in (checkout / "src/hydra_plugins").glob("*.py")} == {
        "adafrugal_launchers",
        "adafrugal_sweeper",
    }


def test_the_installed_library_trains_with_torch_alone(fresh, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/library.md").read_text(), re.DOTALL)
    program = f"""
import sys
import adafrugal.optim
from importlib import metadata, resources
assert not {{"torch", "numpy", "hydra", "omegaconf"}} & set(sys.modules)
{code}
assert not {{"numpy", "hydra", "omegaconf", "hydra_plugins"}} & set(sys.modules)
assert adafrugal.optim.__file__.startswith(sys.prefix)
assert resources.files("adafrugal").joinpath("py.typed").is_file()
assert metadata.version("adafrugal") == "{PROJECT["version"]}"
"""
    done, out, err = run(fresh, "-I", "-c", program, cwd=tmp_path)
    assert done == 0, err
    assert "'moments':" in out


@pytest.mark.parametrize("room", ["data", "memory", "reports"])
def test_what_needs_more_says_how_to_get_it(room, fresh, tmp_path):
    done, _, err = run(fresh, "-I", "-m", f"adafrugal.{room}", cwd=tmp_path)
    assert done == 1
    last = err.splitlines()[-1]
    assert "`pip install 'adafrugal[train]'`; train.py and its settings are in the repository alone" in last


def test_the_wheel_without_a_checkout_says_where_the_settings_are(made, tmp_path):
    with zipfile.ZipFile(made[2]) as wheel:
        wheel.extractall(tmp_path / "lib" / "python3" / "site-packages")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib" / "python3" / "site-packages")}
    done, _, err = run(sys.executable, "-m", "adafrugal.memory", cwd=tmp_path, env=environment)
    assert (done, len(err.splitlines())) == (2, 1)
    assert "has no conf/config.yaml; train.py and its settings are in the repository alone" in err

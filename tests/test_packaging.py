# SPDX-License-Identifier: Apache-2.0
"""What is built and what an installation can do: wheels of a copy of the tree, in environments that hold no more than
the core requirements."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution, version
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
BUILT_FROM = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "modeling_mesanet",
    "conversion",
    "eval",
    "kernels",
    "model_cards",
)
# What importing the package must not import: optional, and slow or absent.
NOT_IMPORTED = ("triton", "matplotlib", "lm_eval", "datasets", "peft")

# Reports where modules come from, and what importing the package brought in beyond what transformers does.
IMPORT = f"""
import json, sys
sys.path.insert(0, "")  # as in an interactive session, which is where people meet shadowed modules
import torch, transformers.modeling_utils
before = set(sys.modules)
import modeling_mesanet
from modeling_mesanet import mesa
imported = {{name.partition(".")[0] for name in set(sys.modules) - before}}
try:
    import kernels
    kernels_library = getattr(kernels, "STUB", False)
except ImportError:
    kernels_library = False
eager = "modeling_mesanet.conversion" in sys.modules
from modeling_mesanet import conversion
print(json.dumps({{
    "version": modeling_mesanet.__version__,
    "package": modeling_mesanet.__file__,
    "mesa": mesa.__file__,
    "conversion": conversion.__file__,
    "eager": eager,
    "kernels_library": kernels_library,
    "imported": sorted(imported & set({NOT_IMPORTED!r})),
}}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of what the distribution is built from: building writes into the source folder."""
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        found = "0"
    if Version(found) < Version("77"):
        pytest.skip("building without network needs setuptools 77 or newer in this environment")
    tree = tmp_path_factory.mktemp("source") / "tree"
    for name in BUILT_FROM:
        source, target = ROOT / name, tree / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            target.parent.mkdir(exist_ok=True)
            shutil.copy(source, target)
    return tree


@pytest.fixture(scope="module")
def build(tree, tmp_path_factory):
    """Call a hook of the build backend (`wheel`, `editable` or `sdist`) on a source folder; returns the file."""

    def build(kind: str, source: Path = tree) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
        done = run([sys.executable, "-c", code, folder], cwd=source)
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.splitlines()[-1]

    return build


@pytest.fixture(scope="module")
def wheel(build) -> Path:
    return build("wheel")


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """Make a virtual environment with a wheel and the core requirements (links to those installed here), no more."""
    metadata = Parser().parsestr(read(wheel, "METADATA"))
    entries = requirements(metadata.get_all("Requires-Dist"))

    def environment(package: Path, *, kernels_library: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("environment")
        builder = venv.EnvBuilder(with_pip=False)
        builder.create(folder)
        python = Path(builder.ensure_directories(folder).env_exe)
        site = Path(run([python, "-c", "import site; print(site.getsitepackages()[0])"]).stdout.strip())
        for entry in entries:
            (site / entry.name).symlink_to(entry)
        with zipfile.ZipFile(package) as archive:
            archive.extractall(site)
        if kernels_library:
            (site / "kernels").mkdir()
            (site / "kernels" / "__init__.py").write_text("STUB = True\n")
        return python

    return environment


def requirements(needed: list[str]) -> set[Path]:
    """Files and folders in site-packages of the installed distributions that meet `needed`, and of theirs in turn."""
    entries, queue, seen = set(), [Requirement(line) for line in needed], set()
    while queue:
        requirement = queue.pop()
        if requirement.name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(requirement.name)
        found = distribution(requirement.name)
        if found.files is None:
            pytest.skip(f"{requirement.name} was installed without a list of its files")
        tops = {file.parts[0] for file in found.files} - {"..", "__pycache__"}
        entries |= {Path(found.locate_file(top)) for top in tops}
        queue += [Requirement(line) for line in found.requires or []]
    return entries


def run(arguments: list, **options) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [str(argument) for argument in arguments],
        capture_output=True,
        text=True,
        env=variables,
        timeout=300,
        **options,
    )


def read(wheel: Path, name: str) -> str:
    """A file of the wheel's dist-info folder."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


class TestWheel:
    def test_holds_the_packages_and_nothing_else(self, wheel, tree):
        expected = {f"modeling_mesanet/{file.name}" for file in (tree / "modeling_mesanet").glob("*.py")}
        expected |= {f"modeling_mesanet/mesa/{file.name}" for file in (tree / "kernels" / "mesa").glob("*.py")}
        expected |= {f"modeling_mesanet/conversion/{file.name}" for file in (tree / "conversion").glob("*.py")}
        expected |= {f"modeling_mesanet/eval/{file.name}" for file in (tree / "eval").glob("*.py")}
        expected.add("modeling_mesanet/model_cards/template.md")
        facades = {f"modeling_mesanet/{part}/__init__.py" for part in ("conversion", "eval", "mesa")}
        assert facades <= expected
        tasks = [file for file in (tree / "eval" / "tasks").rglob("*") if file.is_file()]
        assert len(tasks) > 100
        expected |= {f"modeling_mesanet/eval/{file.relative_to(tree / 'eval').as_posix()}" for file in tasks}
        held = {name for name in names(wheel) if ".dist-info/" not in name and "/checkpoints/" not in name}
        assert held == expected
        # A top-level `kernels` would overwrite the library of that name.
        assert not (tree / "kernels" / "__init__.py").exists()

    def test_holds_the_checkpoint(self, wheel, tree):
        folder = tree / "modeling_mesanet" / "checkpoints" / "novels"
        if not folder.is_dir():
            pytest.skip("the tree holds no bundled checkpoint")
        with zipfile.ZipFile(wheel) as archive:
            for name in ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors"):
                file = folder / name
                assert archive.read(f"modeling_mesanet/checkpoints/novels/{name}") == file.read_bytes()
        assert (folder / "model.safetensors").stat().st_size <= 20_000_000

    def test_metadata(self, wheel):
        metadata = Parser().parsestr(read(wheel, "METADATA"))
        assert metadata["Name"] == "modeling-mesanet"
        assert metadata["License-Expression"] == "Apache-2.0"
        assert {"train", "eval", "test"} <= set(metadata.get_all("Provides-Extra"))
        assert "mesanet = modeling_mesanet.cli:main" in read(wheel, "entry_points.txt")
        assert "Apache License" in read(wheel, "licenses/LICENSE")
        assert read(wheel, "WHEEL").count("Tag: py3-none-any") == 1

    def test_source_distribution_builds_the_same(self, build, wheel, tmp_path):
        shutil.unpack_archive(build("sdist"), tmp_path)
        (source,) = tmp_path.iterdir()
        assert names(build("wheel", source)) == names(wheel)


# In the tree, by the report's name for it.
PLACES_OF_PACKAGES = (("package", "modeling_mesanet"), ("mesa", "kernels/mesa"), ("conversion", "conversion"))

KINDS = ("wheel", "editable")
PLACES = ("root", "elsewhere")


@pytest.fixture(scope="module")
def imports(build, wheel, environment, tree, tmp_path_factory):
    """The report of IMPORT by (kind of installation, working folder, whether a `kernels` library is installed)."""
    package = {"wheel": wheel, "editable": build("editable")}
    folder = {"root": tree, "elsewhere": tmp_path_factory.mktemp("elsewhere")}
    python = {
        (kind, library): environment(package[kind], kernels_library=library)
        for kind, library in product(KINDS, (False, True))
    }
    cases = list(product(KINDS, PLACES, (False, True)))

    def report(case):
        kind, place, library = case
        return run([python[kind, library], "-c", IMPORT], cwd=folder[place])

    # Each import takes seconds, most of them torch's and transformers'.
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(report, cases), strict=True))


class TestInstallation:
    @pytest.mark.parametrize("library", [False, True], ids=["no kernels library", "kernels library"])
    @pytest.mark.parametrize("place", PLACES)
    @pytest.mark.parametrize("kind", KINDS)
    def test_imports(self, imports, tree, wheel, kind, place, library):
        done = imports[kind, place, library]
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["version"] == Parser().parsestr(read(wheel, "METADATA"))["Version"]
        assert report["kernels_library"] is library
        assert report["imported"] == []
        assert not report["eager"]
        # The package and its operators must come from the same place.
        from_tree = kind == "editable" or place == "root"
        for name, location in PLACES_OF_PACKAGES:
            file = Path(report[name]).resolve()
            assert file.is_relative_to(tree / location) is from_tree
            assert file.exists()

    def test_core_requirements_suffice(self, wheel, environment, tmp_path):
        """Without triton, extras or deprecated features: the command line runs and the operators compute."""
        python = environment(wheel)
        block = "import sys; sys.modules['triton'] = None; "
        command = "sys.argv = ['mesanet', 'doctor', '--json']; from modeling_mesanet.cli import main; main()"
        done = run([python, "-W", "error::DeprecationWarning", "-c", block + command], cwd=tmp_path)
        assert done.returncode in (0, 1), done.stderr
        assert done.stderr == ""
        report = json.loads(done.stdout)
        assert report["versions"]["accelerate"] is None
        assert all(device["self_test"]["ok"] for device in report["devices"])
        bundled = (ROOT / "modeling_mesanet" / "checkpoints" / "novels").is_dir()
        assert report["ok"] is bundled

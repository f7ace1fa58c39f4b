"""What holds for the whole repository: which way imports point, style, the lock, the wheel."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
CODE = ("jaxrl_llm", "kernels", "experiments", "configs", "benchmarks", "tests")

# From below to above. A module imports from its own layer and from those before it; the longest name that fits says
# which layer that is.
LAYERS = (
    ("jaxrl_kernels",),
    ("jaxrl_llm.types", "jaxrl_llm.files"),
    ("jaxrl_llm.ops",),
    ("jaxrl_llm.models",),
    ("jaxrl_llm.sampling",),
    ("jaxrl_llm.envs", "jaxrl_llm.tools", "jaxrl_llm.retrieval", "jaxrl_llm.rewards", "jaxrl_llm.data"),
    ("jaxrl_llm.train",),
    ("jaxrl_llm.distributed",),
    ("jaxrl_llm.sampling.chat", "experiments", "configs", "benchmarks"),
)


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """Dotted name of a file, the one of its package for an `__init__.py`."""
    relative = path.relative_to(ROOT)
    parts = [*relative.parts[1 if relative.parts[0] == "kernels" else 0 : -1], relative.stem]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int | None:
    """Index into LAYERS; None for a module that is not ours, and for `jaxrl_llm` itself, which imports nothing."""
    found = [
        (len(name), index)
        for index, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    return max(found)[1] if found else None


def imported_modules(path: Path, top_level_only: bool = False) -> Iterator[str]:
    """Absolute dotted names that a file imports; `from a import b` gives `a.b`, as `b` may be a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)


def setup_list(name: str) -> list[Requirement]:
    """The requirements in one of the lists of setup.py."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return [Requirement(text) for text in ast.literal_eval(node.value)]
    raise AssertionError(f"setup.py has no list {name}")


def locked() -> dict[str, str]:
    """Name (canonical) to version, from requirements.lock."""
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines), "requirements.lock names a package twice"
    return {canonicalize_name(name): version for name, version in pins.items()}


def text_files() -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".") or name == ".ci"]
        folders[:] = [name for name in folders if name not in ("__pycache__", "out", "build", "dist")]
        folders[:] = [name for name in folders if not name.endswith(".egg-info")]
        for name in names:
            path = Path(folder, name)
            if path.suffix in (".py", ".md", ".toml", ".ipynb", ".json", ".lock") or name in ("Makefile", "run"):
                yield path


def test_imports_point_one_way() -> None:
    wrong = []
    for path in python_files("jaxrl_llm", "kernels", "experiments", "configs", "benchmarks"):
        own = layer(module_name(path))
        for module in imported_modules(path):
            other = layer(module)
            if other is not None and (own is None or other > own):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, "\n".join(["imports that point upward:", *wrong])


def test_every_module_has_a_layer() -> None:
    unplaced = [module_name(path) for path in python_files("jaxrl_llm", "kernels") if layer(module_name(path)) is None]
    assert unplaced == ["jaxrl_llm"]


def test_the_direction_check_sees_all_forms_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "jaxrl_llm" / "ops" / "example.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import jaxrl_llm.train\nfrom jaxrl_llm import models\nfrom .. import data\n"
        "def f():\n    from ..envs import geography\n"
    )
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = list(imported_modules(path))
    assert found == ["jaxrl_llm.train", "jaxrl_llm.models", "jaxrl_llm.data", "jaxrl_llm.envs.geography"]
    assert all((layer(module) or 0) > (layer(module_name(path)) or 0) for module in found)


def test_modules_import_at_the_top_only_what_is_always_installed() -> None:
    """Optional packages (transformers, ray, torch, ...) are imported inside the function that needs them."""
    ours = {"jaxrl_llm", "jaxrl_kernels", "experiments", "configs", "benchmarks"}
    core = {canonicalize_name(requirement.name) for requirement in setup_list("CORE")} | {"jaxlib", "absl-py"}
    providers = importlib.metadata.packages_distributions()
    wrong = []
    for path in python_files("jaxrl_llm", "kernels", "experiments", "configs"):
        for top in {module.split(".")[0] for module in imported_modules(path, top_level_only=True)}:
            if top in ours or top in sys.stdlib_module_names:
                continue
            if not core & {canonicalize_name(name) for name in providers.get(top, [top])}:
                wrong.append(f"{path.relative_to(ROOT)} imports {top}")
    assert not wrong, "\n".join(["imported at the top but not in CORE of setup.py:", *wrong])


def test_every_requirement_is_used() -> None:
    """CORE by the library and its commands, DEV (the tools that are run and not imported aside) by the tests."""
    providers = importlib.metadata.packages_distributions()

    def used(*folders: str) -> set[str]:
        tops = {module.split(".")[0] for path in python_files(*folders) for module in imported_modules(path)}
        return {canonicalize_name(name) for top in tops for name in providers.get(top, [])}

    tools = {"pytest-cov", "pytest-xdist", "ruff", "mypy", "ipykernel", "setuptools"}
    core = {canonicalize_name(requirement.name) for requirement in setup_list("CORE")}
    dev = {canonicalize_name(requirement.name) for requirement in setup_list("DEV")} - tools
    assert not core - used("jaxrl_llm", "kernels", "experiments", "configs")
    assert not dev - used("tests", "benchmarks")


def test_importing_the_package_starts_no_backend() -> None:
    """A module that makes an array when imported costs seconds and takes the accelerator from whoever holds it."""
    code = (
        "import jaxrl_llm, jaxrl_llm.ops, jax._src.xla_bridge as bridge; "
        "assert not bridge._backends, 'importing jaxrl_llm.ops started a JAX backend'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_package_folder_has_an_init() -> None:
    folders = {path.parent for path in python_files("jaxrl_llm", "kernels/jaxrl_kernels", "experiments", "configs")}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


def test_every_page_has_a_config() -> None:
    pages = [path for path in python_files("experiments") if len(path.relative_to(ROOT).parts) == 3]
    pages = [path for path in pages if not path.name.startswith("_")]  # what a family shares is no page
    missing = [
        str(page.relative_to(ROOT))
        for page in pages
        if not (ROOT / "configs" / page.relative_to(ROOT / "experiments")).exists()
    ]
    assert not missing, f"pages without a file of the same name under configs/: {missing}"


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Top-level functions and classes whose names have no underscore in front, and the methods of such classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    yield f"{node.name}.{method.name}", method


def test_public_code_is_documented_and_annotated() -> None:
    """Docstrings for the functions and classes of the library; annotations for methods and pages too."""
    wrong = []
    for path in python_files("jaxrl_llm", "kernels", "experiments"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documented = [] if path.is_relative_to(ROOT / "experiments") else tree.body
        if tree.body and ast.get_docstring(tree) is None:
            wrong.append(f"{path.relative_to(ROOT)}: the module has no docstring")
        for name, node in public_definitions(tree):
            if node in documented and ast.get_docstring(node) is None:
                wrong.append(f"{path.relative_to(ROOT)}: {name} has no docstring")
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [
                    argument.arg
                    for argument in arguments
                    if argument.annotation is None and argument.arg not in ("self", "cls")
                ]
                if bare or node.returns is None:
                    missing = ", ".join(bare) or "its result"
                    wrong.append(f"{path.relative_to(ROOT)}: {name} does not annotate {missing}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in text_files()
        if path.suffix in (".py", ".md", ".toml") or path.name == "Makefile"
    }
    assert not {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 400}


def test_no_path_of_a_machine() -> None:
    """Nothing names the folder of this checkout or somebody's home."""
    home = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")
    wrong = []
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        if home.search(text) or re.search(re.escape(str(ROOT)) + r"\b", text):
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong


def test_lock_is_pins_and_nothing_else() -> None:
    """No index address, path or hash: whoever installs decides where packages come from."""
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line), line
    assert not {"torch", "tensorboard", "notebook", "jupyterlab"} & set(locked())


def test_lock_is_complete() -> None:
    """It is installed with --no-deps: what a pinned package requires is pinned too, in a version that it accepts."""
    pins = locked()
    for requirement in setup_list("CORE") + setup_list("DEV"):
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None and version in requirement.specifier, f"setup.py: {requirement} against {version}"
    for name in pins:
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                version = pins.get(canonicalize_name(requirement.name))
                assert version is not None, f"{name} requires {text}, which requirements.lock leaves out"
                assert requirement.specifier.contains(version, prereleases=True), f"{name}: {text} against {version}"


def test_ruff() -> None:
    result = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_mypy() -> None:
    result = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_wheel_has_the_packages_and_their_data(tmp_path: Path) -> None:
    """Built from a copy, as a build leaves folders behind."""
    source = tmp_path / "source"
    for folder in ("jaxrl_llm", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--wheel-dir",
            str(tmp_path),
            str(source),
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("jaxrl_llm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(top))
        for top in (source, source / "kernels")
        for path in top.rglob("*")
        if path.is_file() and path.relative_to(top).parts[0] in ("jaxrl_llm", "jaxrl_kernels")
    }
    assert expected <= names, f"left out of the wheel: {sorted(expected - names)}"
    assert not {name.split("/")[0] for name in names} & {"experiments", "configs", "tests", "benchmarks", "kernels"}

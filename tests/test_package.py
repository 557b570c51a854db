"""The package as such: its layers, its imports, its documentation."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import matplotlib as mpl
import pytest

import stgen

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "stgen"
DOCS = ROOT / "docs"

NAMESPACES = ["datasets", "io", "models", "pl", "pp", "tl"]
LAYER_1 = [
    "data",
    "diffusion",
    "features",
    "kernels",
    "kriging",
    "measurement",
    "metrics",
    "models",
    "sampling",
    "train",
    "transforms",
    "windows",
]
SPATIAL = {"anndata", "scanpy", "spatialdata", "spatialdata_io", "squidpy"}


def public(module: str) -> list[str]:
    """The names that a module of the package declares, as ``module.name``."""
    return [f"{module}.{name}" for name in importlib.import_module(f"stgen.{module}").__all__]


@cache
def resolve(name: str) -> object:
    module, attribute = name.split(".")
    return getattr(importlib.import_module(f"stgen.{module}"), attribute)


def is_code(name: str) -> bool:
    """Whether a name is a class or a function; an alias of a type has no docstring of its own."""
    return inspect.isclass(resolve(name)) or inspect.isroutine(resolve(name))


CALLED = [name for module in NAMESPACES for name in public(module)]
DOCUMENTED = [name for module in [*LAYER_1, *NAMESPACES] for name in public(module) if is_code(name)]
DOCUMENTED = sorted(set(DOCUMENTED))


def syntax_trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE), ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path, tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, absolute names, wherever in the file it does so."""
    package = ("stgen", *path.parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parents, *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def loaded_by(statement: str) -> set[str]:
    """The top-level packages in memory after a statement, in an interpreter of its own."""
    code = f"{statement}\nimport sys\nsys.stdout.write(' '.join({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


# ---- imports and layers ----------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import stgen") & (SPATIAL | {"diffusers", "matplotlib", "numpy", "pandas", "torch"})


def test_models_need_no_spatial_library() -> None:
    assert not loaded_by("import stgen.models, stgen.train, stgen.metrics") & SPATIAL


def test_namespaces_are_there_when_first_used() -> None:
    assert loaded_by("import stgen; stgen.models.load; stgen.pl.maps") >= {"stgen", "torch"}
    assert {"datasets", "io", "models", "pl", "pp", "tl", "__version__"} <= set(dir(stgen))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = stgen.nothing


def test_layer_1_never_imports_layer_2() -> None:
    forbidden = tuple(SPATIAL)
    for path, tree in syntax_trees():
        if path.with_suffix("").parts[0] not in [*LAYER_1, "_checkpoint", "_checks", "_html", "_training_options"]:
            continue
        for module in imported_modules(path, tree):
            top, *rest = module.split(".")
            assert top not in forbidden, f"{path} imports {module}"
            if top == "stgen" and rest:
                assert rest[0] in [*LAYER_1, "_checkpoint", "_checks", "_html", "_training_options"], (
                    f"{path} belongs to layer 1 and imports {module} of layer 2"
                )


def test_nothing_is_pickled() -> None:
    for path, tree in syntax_trees():
        modules = {module.split(".")[0] for module in imported_modules(path, tree)}
        assert not modules & {"cloudpickle", "dill", "joblib", "pickle", "shelve"}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                assert call not in {"torch.load", "torch.save"}, f"{path}:{node.lineno} calls {call}"
                pickles = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
                assert not pickles, f"{path}:{node.lineno} allows pickle"


# ---- the house -------------------------------------------------------------------------------------------------------

SOURCES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "src").rglob("*.py"))}
FUNCTIONS = [
    (f"{path.relative_to(ROOT)}: {node.name}", node)
    for path, source in SOURCES.items()
    for node in ast.walk(ast.parse(source))
    if isinstance(node, ast.FunctionDef)
]


def test_files_are_short() -> None:
    assert {path.name: n for path, source in SOURCES.items() if (n := source.count("\n")) > 500} == {}


def test_functions_are_short() -> None:
    """Lines of the statements after the docstring."""
    bodies = ((name, node.body[ast.get_docstring(node, clean=False) is not None :]) for name, node in FUNCTIONS)
    lengths = {name: body[-1].end_lineno - body[0].lineno + 1 for name, body in bodies if body}
    assert {name: length for name, length in lengths.items() if length >= 90} == {}  # with blank lines and comments


def test_constructors_are_narrow() -> None:
    made = ((name, [*node.args.args[1:], *node.args.kwonlyargs]) for name, node in FUNCTIONS if node.name == "__init__")
    assert {name: len(arguments) for name, arguments in made if len(arguments) > 14} == {}


def test_private_names_stay_in_their_package() -> None:
    """``_spatial`` and ``_checks`` are there for all."""
    crossing = []
    for path, source in SOURCES.items():
        package = path.parent.relative_to(ROOT / "src").parts
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("stgen"):
                for names in ((*node.module.split("."), alias.name) for alias in node.names):
                    private = [i for i, n in enumerate(names) if n[0] == "_" and n not in ("_spatial", "_checks")]
                    owner = names[: private[0]] if private else ()
                    owner = (
                        owner[:-1] if private and ROOT.joinpath("src", *owner).with_suffix(".py").is_file() else owner
                    )
                    if owner != package[: len(owner)]:
                        crossing.append(f"{path.relative_to(ROOT)}: {'.'.join(names)}")
    assert crossing == []


# ---- metadata --------------------------------------------------------------------------------------------------------


def test_version_is_that_of_the_project_and_has_its_changes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert stgen.__version__ == version("stgen") == project["version"]
    assert f"## [{stgen.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_types_are_shipped() -> None:
    assert (files("stgen") / "py.typed").is_file()


def test_linter_has_one_version() -> None:
    pinned = re.search(r"^ruff==(\S+)", (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    hook = re.search(r"ruff-pre-commit\s+rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert pinned is not None
    assert hook is not None
    assert pinned[1] == hook[1]


# ---- documentation ---------------------------------------------------------------------------------------------------


def test_api_page_lists_what_the_package_declares() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^ {3}([a-z]+\.\w+)$", text, re.MULTILINE)
    assert len(listed) == len(set(listed)), "docs/api.md lists a name twice"
    assert set(listed) - set(DOCUMENTED) == set(), "docs/api.md lists what no __all__ declares"
    assert set(DOCUMENTED) - set(listed) == set(), "an __all__ declares what docs/api.md does not list"


def test_namespaces_declare_only_code() -> None:
    assert [name for name in CALLED if not is_code(name)] == []


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_is_there_and_has_an_example(name: str) -> None:
    text = inspect.getdoc(resolve(name)) or ""
    assert text, f"{name} has no docstring"
    if name not in CALLED or inspect.isabstract(resolve(name)):  # building blocks: where it helps
        return
    assert re.search(r"^Examples\n-{8}\n", text, re.MULTILINE), f"{name} has no section 'Examples'"
    assert ">>> " in text, f"{name} has no example that runs"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)  # for examples that save something
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for example in doctest.DocTestFinder().find(resolve(name), name, globs={}):
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_outputs_page_names_every_function_that_writes() -> None:
    text = (DOCS / "outputs.md").read_text(encoding="utf-8")
    for name in CALLED:
        parameters = inspect.signature(resolve(name)).parameters
        if any(parameter.endswith("key_added") for parameter in parameters):
            assert f"stgen.{name}`" in text, f"docs/outputs.md does not say what {name} writes"


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("methods/*.md"))])
def test_pages_name_only_what_exists(page: Path) -> None:
    modules = "|".join([*LAYER_1, *NAMESPACES])
    named = set(re.findall(rf"\b(?:sg|stgen)\.((?:{modules})\.\w+)", page.read_text(encoding="utf-8")))
    assert named - set(DOCUMENTED) == set(), f"{page.name} names what does not exist"


@pytest.mark.parametrize("tutorial", sorted((ROOT / "tutorials").glob("*.ipynb")), ids=lambda path: path.stem)
def test_tutorials_are_listed_and_keep_their_outputs(tutorial):
    cells = [cell for cell in json.loads(tutorial.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))  # executed once, in order
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert f"tutorials/{tutorial.stem}\n" in (DOCS / "index.md").read_text()

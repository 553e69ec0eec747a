"""What the code's shape promises: who imports whom, what loader workers never load, files and functions of a size that
fits a reader, no unsafe loading, one legend of tensor letters."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from extras import ROOT

SOURCES = sorted([*(ROOT / "ipt_jax").rglob("*.py"), *(ROOT / "synth").rglob("*.py")])
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), filename=str(path)) for path in SOURCES}

# Area (longest prefix of the module's name) -> what of ours it may import, as prefixes. An area may import itself.
DIRECTIONS: dict[str, tuple[str, ...]] = {
    "ipt_jax": ("ipt_jax.inference",),  # the package's door: load(), inside the function
    "ipt_jax.core": (),
    "ipt_jax.corpus": ("ipt_jax.core",),
    "ipt_jax.data": ("ipt_jax.core", "ipt_jax.corpus"),
    "ipt_jax.model": ("ipt_jax.core",),
    "ipt_jax.config": ("ipt_jax.core", "ipt_jax.data.mixture", "ipt_jax.model.config"),
    "ipt_jax.parallel": ("ipt_jax.core", "ipt_jax.model"),
    "ipt_jax.hf": ("ipt_jax.core", "ipt_jax.corpus.tokenizer", "ipt_jax.model"),
    "ipt_jax.inference": (
        "ipt_jax.core",
        "ipt_jax.corpus.tokenizer",
        "ipt_jax.hf",
        "ipt_jax.model",
        "ipt_jax.parallel",
    ),
    "ipt_jax.train": (
        "ipt_jax.config",
        "ipt_jax.core",
        "ipt_jax.corpus",
        "ipt_jax.data",
        "ipt_jax.hf",  # model.from and the configuration of a checkpoint
        "ipt_jax.model",
        "ipt_jax.parallel",
    ),
    "ipt_jax.compile": (
        "ipt_jax.config",
        "ipt_jax.core",
        "ipt_jax.hf.config",
        "ipt_jax.model",
        "ipt_jax.parallel",
        "ipt_jax.train",
    ),
    "ipt_jax.evaluate": (
        "ipt_jax.core",
        "ipt_jax.corpus",
        "ipt_jax.hf.convert",  # what backends hf and vllm read
        "ipt_jax.inference",
        "ipt_jax.load",
        "ipt_jax.parallel",
    ),
    "ipt_jax.report": ("ipt_jax.core", "ipt_jax.corpus", "ipt_jax.data.plan"),
    "ipt_jax.ablate": (
        *("ipt_jax.config", "ipt_jax.core", "ipt_jax.corpus", "ipt_jax.data"),
        *("ipt_jax.evaluate", "ipt_jax.report", "ipt_jax.train"),
    ),
    "ipt_jax.cli": ("ipt_jax",),
    "synth": ("ipt_jax.core", "ipt_jax.corpus", "ipt_jax.evaluate.tasks"),  # answers are scored in one place
    "synth.engine.jax_": ("ipt_jax.core", "ipt_jax.corpus", "ipt_jax.inference", "ipt_jax.load", "synth"),
}
# Packages outside the core -> the only modules that may import them, and there inside a function.
OPTIONAL: dict[str, set[str]] = {
    "vllm": {"synth.engine.vllm_"},
    "torch": set(),
    "ray": {"ipt_jax.core.executor"},
    "openai": {"synth.engine.openai_"},
    "datasets": {"ipt_jax.corpus.datasets"},
    "tensorflow_datasets": {"ipt_jax.corpus.datasets"},
    "lm_eval": {"ipt_jax.evaluate.harness", "ipt_jax.evaluate.lm_eval_", "synth.decontaminate.benchmarks"},
    "fsspec": {"ipt_jax.corpus.paths"},
}
# Module names that say the same thing in every package; any other name stands once in the project.
STRUCTURE = {"cli", "config", "run", "settings"}
# A word means one thing. These names meant several things, or said little; nothing is called by them again.
RETIRED_CLASSES = {
    "Stretch",
    "Piece",
    "Part",
    "Mark",
    "Kept",
    "Reading",
    "Look",
    "Survey",
    "Spool",
    "Live",
    "Made",
    "Job",
}
RETIRED_MODULES = {
    *"rows records page look pieces grounds sides kept spellings".split(),
    *"digests survey live card keep drive spool doubles".split(),
}
ALLOWED_MODULES = {"ipt_jax.corpus.records", "ipt_jax.report.page"}  # the one meaning that is left
NO_JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "torch")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in SOURCES}


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Every absolute name that `path` imports; `from a import b` gives a.b, which may be a module or a name in one."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            prefix = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            yield from ((f"{prefix}.{alias.name}", node) for alias in node.names)


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def area_of(module: str) -> str:
    """The longest known prefix; a module directly in a package that has no entry of its own counts to the package."""
    return max((area for area in DIRECTIONS if under(module, area)), key=len)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    module = module_name(path)
    area = area_of(module)
    assert area != "ipt_jax" or module == "ipt_jax", f"{module} has no line in DIRECTIONS"
    for name, node in imports(path):
        if name.split(".")[0] not in ("ipt_jax", "synth"):
            continue
        own = area != "ipt_jax" and under(name, area)
        allowed = own or any(under(name, prefix) for prefix in DIRECTIONS[area])
        assert allowed, (
            f"{module}:{node.lineno} imports {name}; {area} may import {DIRECTIONS[area] or 'nothing of ours'}"
        )
        assert name not in ("ipt_jax.cli", "synth.cli"), f"{module}:{node.lineno}: nobody imports the command line"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    module = module_name(path)
    at_import_time = {id(node) for node in TREES[path].body}
    for name, node in imports(path):
        package = name.split(".")[0]
        if package in OPTIONAL:
            assert module in OPTIONAL[package], f"{module}:{node.lineno} imports {package}"
            assert id(node) not in at_import_time, f"{module}:{node.lineno} imports {package} outside of a function"


@pytest.mark.parametrize("area", ["ipt_jax.core", "ipt_jax.corpus", "ipt_jax.data"])
def test_no_jax_in_what_workers_load(area: str) -> None:
    for path in SOURCES:
        if under(module_name(path), area):
            found = [name for name, _ in imports(path) if name.split(".")[0] in NO_JAX]
            assert not found, f"{module_name(path)} imports {found}"


@pytest.mark.parametrize(
    "module", ["ipt_jax", "ipt_jax.core", "ipt_jax.corpus", "ipt_jax.data.loader", "ipt_jax.cli", "synth.cli"]
)
def test_light_imports_stay_light(module: str) -> None:
    """Not even through a third package: a loader worker that holds JAX would claim the accelerator."""
    probe = f"import sys, {module}; print(*sorted({set(NO_JAX)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


def imported_modules(path: Path) -> set[str]:
    """Modules of ours that `path` imports anywhere, inside functions and for type checkers too."""
    found = (name if name in MODULES else name.rpartition(".")[0] for name, _ in imports(path))
    return {name for name in found if name in MODULES} - {module_name(path)}


def test_no_import_cycles() -> None:
    graph = {module_name(path): imported_modules(path) for path in SOURCES}
    while graph:
        leaves = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {module: needs for module, needs in graph.items() if module not in leaves}


# ---- sizes and names


def test_a_class_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in TREES[path].body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module_name(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}
    assert not RETIRED_CLASSES & places.keys()


def test_a_module_name_means_one_thing() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        if path.stem != "__init__" and path.stem not in STRUCTURE:
            places.setdefault(path.stem, []).append(module_name(path))
    assert not {name: found for name, found in places.items() if len(found) > 1}
    assert {module for found in places.values() for module in found if module.split(".")[-1] in RETIRED_MODULES} == (
        ALLOWED_MODULES
    )


def test_few_modules_and_few_tiny_ones() -> None:
    sizes = [path.read_text(encoding="utf-8").count("\n") for path in SOURCES if path.name != "__init__.py"]
    assert len(sizes) <= 144
    assert sum(size < 60 for size in sizes) <= 15


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_files_and_functions_fit_a_reader() -> None:
    beside = [path for folder in ("tests", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for path in [*SOURCES, *beside]:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, f"{path}: more than 500 lines"
        for function in functions(ast.parse(text)):
            lines = (function.end_lineno or function.lineno) - function.lineno + 1
            most = 60 if path in SOURCES else 100
            assert lines <= most, f"{path}:{function.lineno} {function.name}: {lines} lines"
    assert not [path for path in SOURCES if path.stem in ("utils", "util", "common", "helpers", "misc")]


def test_every_module_says_what_it_is() -> None:
    silent = [module_name(path) for path, tree in TREES.items() if tree.body and not ast.get_docstring(tree)]
    assert not silent


def test_nothing_unsafe() -> None:
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            where = f"{module_name(path)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "yaml.load", "os.system", "torch.load"), f"{where} calls {name}"
                for keyword in node.keywords:
                    is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                    assert not (keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and is_true), where
        loaded = {name.split(".")[0] for name, _ in imports(path)}
        assert not loaded & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}, module_name(path)


# ---- tensor letters

SHAPE = re.compile(r"\[([A-Za-z0-9_ .,*+/()-]+)\]")


def legend() -> set[str]:
    """The letters that the model's docstring explains, in its paragraph "Letters"."""
    docstring = ast.get_docstring(TREES[ROOT / "ipt_jax/model/decoder.py"]) or ""
    paragraph = docstring[docstring.index("Letters") :].split("\n\n")[0]
    return set(re.findall(r"\b[A-Z]\b", paragraph))


def test_one_legend_of_tensor_letters() -> None:
    """Shape comments beside arrays use no capital letter that the legend does not explain."""
    assert set("BTSDFNKGHVL") <= legend()
    arrays = (
        "ipt_jax.model",
        "ipt_jax.train",
        "ipt_jax.hf",
        "ipt_jax.inference",
        "ipt_jax.parallel.fsdp",
        "ipt_jax.data",
    )
    for path in SOURCES:
        if not module_name(path).startswith(arrays):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for shape in SHAPE.findall(line.partition("#")[2]):
                odd = set(re.findall(r"\b[A-Z]\b", shape)) - legend()
                assert not odd, f"{path}:{number}: {sorted(odd)} in [{shape}] are not in the legend of model/decoder.py"

"""What may import what, checked on the sources and in fresh processes."""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import dipgo_deploy

PACKAGE = Path(dipgo_deploy.__file__).parent
TORCH_FREE = ("page", "runtime", "bundle", "backends", "lora", "plan", "schedule", "serve")
# The rooms from the ground up. Each imports from those before it, never from one behind it.
LAYERS = (
    "page",
    "schedule",
    "plan",
    "bundle",
    "backends",
    "lora",
    "runtime",
    "serve",
    "engine",
    "sampler",
    "models",
    "supernet",
    "reference",
    "compare",
    "export",
    "quality",
    "search",
    "calibrate",
    "bench",
    "report",
    "optimize",
    "integrations",
    "cli",
)
EXPORT_ONLY = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript"}


def names_in(text: str, package: tuple[str, ...]) -> Iterator[str]:
    """Absolute names of all that a module of ``package`` imports, anywhere in it, lazily or for types too."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)


def imported_modules(source: Path) -> Iterator[str]:
    yield from names_in(source.read_text(encoding="utf-8"), source.relative_to(PACKAGE.parent).parts[:-1])


def sources(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def test_the_reader_of_imports_sees_them_all() -> None:
    text = """
import torch.nn
def f():
    from diffusers import DDIMScheduler
    from ..models import dit
    from . import graph
    import_module("onnx")
"""
    assert set(names_in(text, ("dipgo_deploy", "plan"))) == {
        "torch.nn",
        "diffusers.DDIMScheduler",
        "dipgo_deploy.models.dit",
        "dipgo_deploy.plan.graph",
        "onnx",
    }


def own_imports() -> dict[str, set[str]]:
    """For each module of the package the modules of it that it imports, whether at its head, in a function or for
    types only."""
    paths = {source: source.relative_to(PACKAGE.parent).with_suffix("").parts for source in PACKAGE.rglob("*.py")}
    names = {source: ".".join(parts).removesuffix(".__init__") for source, parts in paths.items()}
    modules = set(names.values())

    def module_of(name: str) -> str:
        """``a.b.c`` is a module, or something in the module ``a.b``."""
        return name if name in modules else name.rpartition(".")[0]

    return {names[source]: {*map(module_of, imported_modules(source))} & modules for source in paths}


def room(module: str) -> str:
    """The folder of the package that a module lies in; empty for a module beside the folders."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else ""


def test_every_room_has_its_place() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == set(LAYERS)


def test_no_module_imports_from_a_room_above_its_own() -> None:
    imports = own_imports()
    places = {name: place for place, name in enumerate(("", *LAYERS))}
    height = {module: places[room(module)] for module in imports}
    height["dipgo_deploy"] = len(LAYERS) + 1  # it gives out names of several rooms, so none of them may import it
    height["dipgo_deploy.__main__"] = height["dipgo_deploy.cli.main"]
    assert not [f"{one} imports {name}" for one in imports for name in imports[one] if height[name] > height[one]]


def test_no_module_imports_itself_through_others() -> None:
    """graphlib raises CycleError, which names the modules of a circle."""
    tuple(graphlib.TopologicalSorter(own_imports()).static_order())


@pytest.mark.parametrize("folder", TORCH_FREE)
def test_the_runtime_side_never_imports_what_only_the_export_has(folder: str) -> None:
    assert sources(folder)
    for source in sources(folder):
        foreign = {name for name in imported_modules(source) if name.partition(".")[0] in EXPORT_ONLY}
        assert not foreign, f"{source.relative_to(PACKAGE.parent)} imports {sorted(foreign)}"


@pytest.mark.parametrize("folder", TORCH_FREE)
def test_the_runtime_side_never_imports_the_export_side(folder: str) -> None:
    # These modules import torch or diffusers themselves.
    export_side = ("supernet", "reference", "export", "compare", "search", "sampler")
    for source in sources(folder):
        for name in imported_modules(source):
            assert not any(f"{name}.".startswith(f"dipgo_deploy.{room}.") for room in export_side), (source, name)


def test_plan_imports_only_schedule_errors_and_the_standard_library() -> None:
    own = ("dipgo_deploy.plan", "dipgo_deploy.schedule", "dipgo_deploy.errors")
    for source in sources("plan"):
        for name in imported_modules(source):
            top = name.partition(".")[0]
            if top == "dipgo_deploy":
                assert any(f"{name}.".startswith(f"{room}.") for room in own), (source, name)
            else:
                assert top in sys.stdlib_module_names, (source, name)


def modules_after(statement: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a fresh process that ran ``statement``."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    loaded = modules_after("import dipgo_deploy; dipgo_deploy.__version__; dir(dipgo_deploy)")
    own = {"numpy", "pydantic", "PIL", "rich", "click", "tokenizers", "safetensors"}
    heavy = {*own, "onnxruntime", "polygraphy", *EXPORT_ONLY}
    assert not loaded & heavy


def test_importing_the_package_is_quick(record_property) -> None:
    # Shown, not asserted: a busy machine must not fail the test above, which asserts the reason.
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import dipgo_deploy"], check=True, timeout=120)
    elapsed = time.perf_counter() - start
    record_property("import_seconds_with_the_interpreter", round(elapsed, 3))
    print(f"a fresh interpreter with import dipgo_deploy: {elapsed:.3f} s")


def test_a_schedule_is_read_without_numpy_or_torch() -> None:
    loaded = modules_after("from dipgo_deploy import Schedule; import dipgo_deploy.schedule.importers.dipgo_gates")
    assert "pydantic" in loaded
    assert not loaded & {"numpy", *EXPORT_ONLY}


@pytest.mark.parametrize("verb", ["export", "run", "compare"])
def test_the_help_of_dipgo_imports_no_verb(verb: str) -> None:
    code = "from dipgo_deploy.cli.main import main; main(['--help'])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint('dipgo_deploy.cli.{verb}' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_lazy_names() -> None:
    assert importlib.util.find_spec("dipgo_deploy.runtime") is not None
    assert set(dipgo_deploy.__all__) <= set(dir(dipgo_deploy))
    assert dipgo_deploy.Schedule.__module__ == "dipgo_deploy.schedule.document"
    assert dipgo_deploy.Pipeline.__module__ == "dipgo_deploy.integrations.pretrained"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        dipgo_deploy.Nothing  # noqa: B018


@pytest.mark.parametrize("folder", ["dipgo_deploy", "tools"])
def test_onnxruntime_is_imported_after_this_package(folder: str) -> None:
    """Importing this package turns its telemetry off, so no module may import it while it is itself imported."""
    for path in (Path(__file__).parents[1] / folder).rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.partition(".")[0] == "onnxruntime"], path

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import flexjax

ROOT = pathlib.Path(flexjax.__file__).parent
HOUSES = [ROOT, ROOT.parent / "checkpoints_tools", ROOT.parent / "bench"]
TOOLS = "checkpoints_tools"
# The modules of flexjax/, and those of checkpoints_tools/ by their full names, the
# lowest first: each may import only those before it. A new module goes as early into
# the list as its imports let it.
STAIRS = [
    # words
    "sizes",
    "cache_folder",
    "safe_files",
    "host_facts",
    "policy",
    "policy_args",
    "workload",
    "arrangement",
    "sampling_params",
    "sampling_args",
    "outputs",
    "models.config",
    # paper
    "schedule.ops",
    "schedule.emit",
    "schedule.check",
    "schedule.footprint",
    "schedule.resources",
    "schedule.simulate",
    # numbers
    "kernels.compiled",
    "quant",
    "kernels.products",
    "attention",
    "kernels.decode_attention",
    "sparse",
    "logprobs",
    "sampling",
    "stopping",
    "cached_attention",
    "models.opt",
    "checkpoints_tools.training",
    # memory
    "extents",
    "store_format",
    "checkpoints_tools.progress",
    "checkpoints_tools.random_weights",
    "checkpoints_tools.source",
    "checkpoints_tools.safetensors_file",
    "checkpoints_tools.safetensors_writer",
    "checkpoints_tools.tensor_pickle",
    "checkpoints_tools.torch_bin",
    "checkpoints_tools.hugging_face",
    "checkpoints_tools.hub",
    "checkpoint",
    "store_writer",
    "memory.ledger",
    "memory.lanes",
    "trace",
    "memory.disk_queue",
    "memory.placement",
    "memory.processor",
    "memory.head_blocks",
    "memory.routes",
    "memory.layout",
    "memory.pool",
    "memory.buffers",
    "memory.link",
    "checkpoints_tools.store_conversion",
    "checkpoints_tools.orbax_checkpoint",
    "checkpoints_tools.open_source",
    "checkpoints_tools.resolve",
    "memory.widened",
    "memory.transport",
    "memory.tier",
    "memory.device",
    "memory.host",
    "memory.spill",
    "memory.spilled",
    "memory.disk",
    "memory.placed",
    "memory.weights",
    "memory.capacity",
    "memory.room",
    "memory.footprint",
    "memory.most_bytes",
    # run
    "value_sums",
    "steps",
    "attention_apart",
    "layer_calls",
    "executor",
    "stage",
    "metrics",
    "padded_prompts",
    "blocks",
    "score_rows",
    "preemption",
    "runner",
    "engine",
    # plan
    "plan.hardware",
    "plan.scratch",
    "plan.this_machine",
    "plan.step_rates",
    "plan.calibrate",
    "plan.costs",
    "plan.peak",
    "plan.closed_form",
    "plan.program",
    "plan.job",
    "plan.predict",
    "plan.candidates",
    "plan.search",
    "plan.planner",
    "plan.parts",
    "plan.report",
    "plan.auto",
    # doors
    "cli",
    "checkpoints_tools.synthesize",
    "checkpoints_tools.convert",
    "tokenizer",
    "checkpoints_tools.train_embedded",
    "prompts",
    "prompt_file",
    "shared_prefixes",
    "row_maker",
    "prompt_lengths",
    "placement_report",
    "planned_engine",
    "llm",
    "answer_file",
    "file_job",
    "generate",
    "harness",
    "evaluate",
    "plan.__main__",
]
MAX_FILE_LINES = 350
MAX_BODY_LINES = 50
MAX_ARGUMENTS = 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts)


def modules(root: pathlib.Path) -> dict[str, ast.Module]:
    """Every module below `root` but the `__init__`s, by its name inside `root`."""
    return {
        module_name(path, root): ast.parse(path.read_text(), str(path))
        for path in sorted(root.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imported(tree: ast.Module) -> Iterator[str]:
    """Full names of what `tree` imports anywhere, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            yield from (f"{dots}{node.module or ''}.{a.name}" for a in node.names)


def on_the_stairs() -> dict[str, ast.Module]:
    """Every module that has a place in `STAIRS`, by its name there."""
    tools = modules(ROOT.parent / TOOLS)
    return modules(ROOT) | {f"{TOOLS}.{name}": tree for name, tree in tools.items()}


def offences(name: str, tree: ast.Module, stairs: list[str]) -> list[str]:
    """What module `name` of the stairs imports against the rules."""
    found = []
    for full in imported(tree):
        if full.startswith("."):
            found.append(f"{name}: relative import of {full}")
        if full.split(".")[0] not in ("flexjax", TOOLS):
            continue
        inside = full.removeprefix("flexjax").lstrip(".")
        used = next(
            (m for m in (inside, inside.rpartition(".")[0]) if m in stairs), None
        )
        if used is None:
            found.append(f"{name}: {full} is in no module of STAIRS")
        elif stairs.index(used) >= stairs.index(name):
            found.append(f"{name}: imports {used}, which is not below it")
    return found


def functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    body = function.body[ast.get_docstring(function) is not None :]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def num_arguments(function: Function) -> int:
    spec = function.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    stars = [a for a in (spec.vararg, spec.kwarg) if a is not None]
    return len([name for name in names if name not in ("self", "cls")]) + len(stars)


def test_every_module_has_a_stair():
    found = set(on_the_stairs())
    assert len(STAIRS) == len(set(STAIRS))
    assert not found - set(STAIRS), "these modules have no place in STAIRS"
    assert not set(STAIRS) - found, "STAIRS names modules that do not exist"


def test_imports_go_down():
    trees = on_the_stairs()
    stairs = [m for m in STAIRS if m in trees]
    found = [
        offence
        for name, tree in trees.items()
        if name in stairs
        for offence in offences(name, tree, stairs)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import flexjax.b", "imports b"),
        ("from flexjax.b import thing", "imports b"),
        ("from flexjax import b", "imports b"),
        ("from flexjax.b import thing as other, more", "imports b"),
        ("from flexjax.p import c", "imports p.c"),
        ("def f():\n    from flexjax.b import thing", "imports b"),
        ("import flexjax", "flexjax is in no module"),
        ("from flexjax import LLM", "flexjax.LLM is in no module"),
        ("from . import b", "relative import"),
        ("from .b import thing", "relative import"),
        ("from flexjax.a import itself", "imports a"),
        ("from checkpoints_tools.t import thing", "imports checkpoints_tools.t"),
        ("from checkpoints_tools import thing", "is in no module"),
    ],
)
def test_an_import_upwards_is_seen(source, message):
    (first, *_) = offences(
        "a", ast.parse(source), ["z", "a", "b", "p.c", "checkpoints_tools.t"]
    )
    assert message in first


@pytest.mark.parametrize(
    "source",
    ["import numpy", "from flexjax.z import x", "from flexjax import z", "import jax"],
)
def test_an_import_downwards_is_fine(source):
    assert not offences("a", ast.parse(source), ["z", "a", "b"])


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
def test_only_the_front_door_has_an_init(house):
    for path in house.rglob("__init__.py"):
        if path != ROOT / "__init__.py":
            assert not path.read_text().strip(), f"{path} is not empty"


@pytest.mark.parametrize("house", HOUSES, ids=lambda house: house.name)
def test_files_and_functions_stay_small(house):
    found = []
    for path in sorted(house.rglob("*.py")):
        text = path.read_text()
        where = path.relative_to(house.parent)
        if (lines := text.count("\n")) > MAX_FILE_LINES:
            found.append(f"{where}: {lines} lines, at most {MAX_FILE_LINES}")
        for function in functions(ast.parse(text)):
            at = f"{where}:{function.lineno} {function.name}"
            if (lines := body_lines(function)) > MAX_BODY_LINES:
                found.append(f"{at}: body of {lines} lines, at most {MAX_BODY_LINES}")
            if (count := num_arguments(function)) > MAX_ARGUMENTS:
                found.append(f"{at}: {count} arguments, at most {MAX_ARGUMENTS}")
    assert not found, "\n".join(found)


def test_importing_the_package_loads_no_other_package():
    program = (
        "import sys; before = set(sys.modules); import flexjax; dir(flexjax);"
        "loaded = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(*sorted(loaded - sys.stdlib_module_names))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["flexjax"]


@pytest.mark.parametrize("name", flexjax.__all__)
def test_a_public_name_comes_from_the_module_that_defines_it(name):
    assert name in dir(flexjax)
    value = getattr(flexjax, name)
    assert value.__name__ == name
    assert value.__module__.startswith("flexjax.")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flexjax.nonsense  # noqa: B018

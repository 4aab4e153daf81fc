"""Who may import whom: schemas <- maths <- a domain's stage <- run and engines <- cli."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "prerank_tools"
# Domain files that may hold frames: a stage, and the frames that stages share.
STAGE_FILE = re.compile(r"(^|_)(stage|frames)\.py$|^stage_")


def imports(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def files(*folders: str) -> list[Path]:
    """Python files of top-level folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_schemas_import_nothing_of_ours() -> None:
    for path in files("schemas"):
        assert not {name for name in imports(path) if name.startswith(("prerank_", "cli"))}, path


def test_only_the_command_line_imports_the_command_line() -> None:
    for path in files("prerank_tools", "schemas"):
        assert not {name for name in imports(path) if name.startswith("prerank_cli")}, path


def test_domains_never_import_the_run_or_an_engine() -> None:
    above = {"run", "engines"}
    for path in files("prerank_tools"):
        if path.relative_to(TOOLS).parts[0] in above:
            continue
        banned = {f"prerank_tools.{name}" for name in above}
        assert not {name for name in imports(path) if name.startswith(tuple(banned))}, path


def test_the_run_knows_no_domain() -> None:
    domains = {path.name for path in TOOLS.iterdir() if path.is_dir()} - {"run", "engines", "tables"}
    banned = tuple(f"prerank_tools.{name}" for name in domains)
    for path in files("prerank_tools/run", "prerank_tools/engines"):
        assert not {name for name in imports(path) if name.startswith(banned)}, path


def test_maths_files_know_no_frame() -> None:
    for path in files("prerank_tools"):
        folder = path.relative_to(TOOLS).parts[0]
        if folder in {"run", "engines", "tables", "data", "export"} or path.parent == TOOLS:
            continue
        if STAGE_FILE.search(path.name):
            continue
        assert "polars" not in imports(path), path


def test_one_file_each_renames_writes_parquet_and_imports_ray() -> None:
    rules = {
        r"os\.(replace|rename)\(|\.rename\(Path|\.replace\(path\)": "run/commit.py",
        r"\.(write|sink)_parquet\(": "tables/parquet.py",
        r"^\s*import ray|from ray": "engines/ray.py",
    }
    for pattern, allowed in rules.items():
        for path in files("prerank_tools", "cli"):
            if str(path).endswith(allowed):
                continue
            assert not re.search(pattern, path.read_text(), re.MULTILINE), f"{path}: only {allowed} may"


def test_heavy_libraries_load_inside_commands_only() -> None:
    heavy = {"torch", "faiss", "transformers", "sklearn", "polars", "numpy", "numba"}
    for path in files("cli"):
        top = ast.parse(path.read_text()).body
        names = {
            alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names
        } | {
            (node.module or "").split(".")[0]
            for node in top
            if isinstance(node, ast.ImportFrom) and not node.level
        }
        assert not names & heavy, path


def test_only_the_console_prints() -> None:
    for path in files("prerank_tools", "cli"):
        if path.name == "console.py":
            continue
        calls = [
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "print" not in calls, path


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    banned = re.compile(
        r"pickle\.load|trust_remote_code=True|joblib\.load|yaml\.load\(|[^.\w]eval\(|[^.\w]exec\("
    )
    for path in files("prerank_tools", "cli", "schemas"):
        text = path.read_text()
        assert not banned.search(text), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^)]*\)", text)), path

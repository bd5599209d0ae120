"""Scripts that no other test runs (benchmarks, results, tiny/make.py) name nothing that is gone."""
import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "results").glob("*.py"), ROOT / "tiny" / "make.py"]
ROOT_MODULES = {path.stem for path in ROOT.glob("*.py")}


def absent(source):
    """Names of the project's modules that a script uses and that are not there (list of str)."""
    tree, modules, missing = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: alias.name for alias in node.names if alias.name in ROOT_MODULES}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {*ROOT_MODULES, "utils", "tiny"}:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if node.module in ("utils", "tiny"):
                    modules[alias.asname or alias.name] = name
                elif not hasattr(importlib.import_module(node.module), alias.name):
                    missing.append(name)
    hidden = set()                      # uses of a function's local of the same name
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        local = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        hidden |= {id(node) for node in names if node.id in local}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules \
                and id(node.value) not in hidden:
            name = modules[node.value.id]
            try:
                module = importlib.import_module(name)
            except ImportError:
                missing.append(name)
                continue
            if not hasattr(module, node.attr):
                missing.append(f"{name}.{node.attr}")
    return missing


def test_a_name_that_is_gone_is_noticed():
    assert absent("import data\nfrom utils import cli\ndata.load\ncli.no_such_name") == ["utils.cli.no_such_name"]
    assert absent("from catts import Controller, Nobody") == ["catts.Nobody"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_name_nothing_that_is_gone(script, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    assert not absent(script.read_text())

"""How far a reader walks through one training step, and the README's figures that would go stale by hand.

    python tests/walk.py                    # the walk of a step, and the lines of the root files
    python tests/walk.py --list             # and every function on the way
    python tests/walk.py --update-readme    # write these, the recipe and the page of --explain into README.md

The walk starts at the loop of train_cdrl.py that steps the optimizer. Each function of the project that is
called before `backward()` counts once, and so do those that it calls. Four boxes stay closed: sampling, scoring,
CLIP's maps, the judge, the disk. A method is followed where its name belongs to one class: a lower bound.
"""
import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READING_ORDER = ("train_cdrl.py", "reward.py", "noise.py", "vlm.py", "data.py", "catts.py", "policy.py",
                 "eval.py")
CLOSED = {"sample", "score", "contrast", "maps", "map", "pictures", "is_correct", "accepts", "prompt_length",
          "encode", "boxes", "extract_answer", "InputError", "forward", "write_step",
          "open_pictures"}
# The command of --explain in the README, and below it what it prints.
PAGE = re.compile(r"(\n\$ (python train_cdrl\.py --explain[^\n]*)\n)(.*?)(```\n)", re.S)
# Tensors, lists, files and dicts have methods of these names.
BUILT_IN = {"append", "add", "update", "items", "keys", "values", "get", "load", "save", "split", "step",
            "to", "mean", "sum", "detach", "view", "exp", "close", "reshape", "float", "double", "backward",
            "cpu", "clamp", "std", "numel", "tolist", "count", "index", "pop", "sort", "copy", "draw",
            "write", "read"}


class Project:
    """Every function and class of the root files and of the folders beside them that hold modules."""

    def __init__(self, root=ROOT):
        paths = [*root.glob("*.py"), *(root / "utils").glob("*.py")]
        names = [".".join(path.relative_to(root).with_suffix("").parts) for path in paths]
        self.trees = {name: ast.parse(path.read_text()) for name, path in zip(names, paths)}
        self.definitions, self.imports, self.owners = {}, defaultdict(dict), defaultdict(list)
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                    for alias in node.names:
                        is_module = not package or package + alias.name in self.trees
                        self.imports[module][alias.asname or alias.name] = (
                            (package + alias.name, None) if is_module else (node.module, alias.name))
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    self.definitions[module, node.name] = node
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) \
                        and ast.unparse(node.value.func) == "partial":
                    function = ast.unparse(node.value.args[0])
                    self.imports[module][node.targets[0].id] = self.imports[module].get(
                        function, (module, function))
                if isinstance(node, ast.ClassDef):
                    for method in (child for child in node.body if isinstance(child, ast.FunctionDef)):
                        self.definitions[module, f"{node.name}.{method.name}"] = method
                        self.owners[method.name].append((module, f"{node.name}.{method.name}"))

    def references(self, module, node, cls, last_line):
        """What a function names or calls -> keys of `definitions`. A local of the same name hides one."""
        nodes = [child for child in ast.walk(node) if getattr(child, "lineno", 0) <= last_line]
        names = [child for child in ast.walk(node) if isinstance(child, ast.Name)]
        local = {child.id for child in names if isinstance(child.ctx, ast.Store)}
        local |= {child.arg for child in ast.walk(node) if isinstance(child, ast.arg)}
        calls = {id(child.func) for child in ast.walk(node) if isinstance(child, ast.Call)}
        for child in nodes:
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Load) and child.id not in local:
                target, name = self.imports[module].get(child.id, (module, child.id))
                yield target, name or child.id
            elif isinstance(child, ast.Attribute):
                base = ast.unparse(child.value)
                target, name = self.imports[module].get(base, (None, ""))
                if target and name is None:
                    yield target, child.attr
                elif base == "self" and cls:
                    yield module, f"{cls}.{child.attr}"
                elif id(child) in calls and child.attr not in BUILT_IN and len(self.owners[child.attr]) == 1:
                    yield self.owners[child.attr][0]

    def walk(self, module, node, cls=None, last_line=10**9, depth=1, visited=None):
        """-> {(module, name): depth} of everything that is reached, each once."""
        visited = {} if visited is None else visited
        for key in self.references(module, node, cls, last_line):
            if key in self.definitions and key not in visited and key[1].split(".")[-1] not in CLOSED:
                visited[key] = depth
                if isinstance(self.definitions[key], ast.FunctionDef):
                    owner = key[1].rpartition(".")[0]
                    self.walk(key[0], self.definitions[key], owner, depth=depth + 1, visited=visited)
        return visited

    def lines(self, key):
        node = self.definitions[key]
        return node.end_lineno - min([node.lineno, *(d.lineno for d in node.decorator_list)]) + 1


def step_walk(project):
    """The walk of one training step (dict)."""
    loops = [node for node in ast.walk(project.trees["train_cdrl"]) if isinstance(node, ast.For)
             and "optimizer.step(" in ast.unparse(node)]
    loop = max(loops, key=lambda node: node.end_lineno - node.lineno)
    backward = {name for (module, name), node in project.definitions.items()
                if module == "train_cdrl" and ".backward(" in ast.unparse(node)}
    call = next(node for node in ast.walk(loop) if isinstance(node, ast.Call)
                and ast.unparse(node.func) in backward)
    visited = project.walk("train_cdrl", loop, last_line=call.end_lineno)
    # What the loop calls by a name of its function: a lambda or a nested function (the next step's pictures).
    loaded = {node.id for node in ast.walk(loop) if isinstance(node, ast.Name)}
    train = next(node for node in project.trees["train_cdrl"].body if isinstance(node, ast.FunctionDef)
                 and loop in ast.walk(node))
    for node in ast.walk(train):
        if isinstance(node, ast.Assign) and {name.id for name in node.targets if isinstance(name, ast.Name)} & loaded:
            for body in (child for child in ast.walk(node.value) if isinstance(child, ast.Lambda)):
                project.walk("train_cdrl", body, visited=visited)
        elif isinstance(node, ast.FunctionDef) and node.name in loaded:
            project.walk("train_cdrl", node, visited=visited)
    return visited


def walk_sentence(project):
    """The figure of the README."""
    visited = step_walk(project)
    functions = [key for key in visited if isinstance(project.definitions[key], ast.FunctionDef)]
    files = {key[0] for key in functions} | {"train_cdrl"}
    return (f"one training step: {len(functions)} functions in {len(files)} files, "
            f"{sum(project.lines(key) for key in visited)} lines")


def line_counts():
    """{root file: lines}, in reading order."""
    paths = [ROOT / name for name in READING_ORDER if (ROOT / name).exists()]
    return {path.name: len(path.read_text().splitlines()) for path in paths}


def explain_page(text):
    """The page that the README's command of --explain prints."""
    command = PAGE.search(text)[2].split()
    run = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout


def recipe_flags():
    """{flag: value} of what `ours` changes, and of alpha and beta."""
    sys.path.insert(0, str(ROOT))
    from train_cdrl import RECIPES, Args
    values = {**RECIPES["ours"], "alpha": Args.alpha, "beta": Args.beta}
    return {name: f"{value:g}" if isinstance(value, float) else value for name, value in values.items()}


def updated(text, project):
    """README.md with today's figures (str)."""
    flags = recipe_flags()
    for name, value in flags.items():
        text = re.sub(rf"`--{name} [^`]*`", f"`--{name} {value}`", text)
    ours = f"alpha {flags['alpha']} and beta {flags['beta']} are ours"
    text = re.sub(r"alpha \S+ and beta \S+ are ours", ours, text)
    for name, lines in line_counts().items():
        text = re.sub(rf"(\| `{re.escape(name)}` \| )\d+( \|)", rf"\g<1>{lines}\2", text)
    text = re.sub(r"one training step: \d+ functions in \d+ files, \d+ lines", walk_sentence(project), text)
    page = explain_page(text)
    return re.sub(PAGE, lambda match: match[1] + page + match[4], text)


def main():
    project = Project()
    print(walk_sentence(project))
    print(*(f"{lines:5} {name}" for name, lines in line_counts().items()), sep="\n")
    if "--list" in sys.argv:
        for key, depth in step_walk(project).items():
            print("  " * depth + ".".join(key), project.lines(key))
    if "--update-readme" in sys.argv:
        path = ROOT / "README.md"
        path.write_text(updated(path.read_text(), project))


if __name__ == "__main__":
    main()

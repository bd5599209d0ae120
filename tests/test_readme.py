"""README.md says what the code is. The root files import utils, never the reverse."""
import ast
import math
import re
from collections import defaultdict

import pytest
import torch
import walk
from conftest import ROOT, ahead

import train_cdrl
from utils import explain
from utils.cli import InputError

README = (ROOT / "README.md").read_text()
# Two machines differ in rounding, and in what they call the same.
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?:e-?\d+)?")


@pytest.fixture(scope="module")
def project():
    return walk.Project()


def equations(text):
    """The equations that a text names: "Eq. 5-9", "Eq. 6, 7" (set of ints)."""
    named = set()
    for low, high, more in re.findall(r"Eq\. (\d+)(?:-(\d+))?((?:, \d+)*)", text):
        named |= {*range(int(low), int(high or low) + 1), *map(int, re.findall(r"\d+", more))}
    return named


def map_rows():
    """[(what the paper has, functions)] of the README's map. A ; separates pairs within a row."""
    rows, table = [], README.split("| paper | here |")[1].split("\n\n")[0]
    for paper, here in re.findall(r"^\| (.*) \| (.*) \|$", table, re.M):
        papers, heres = paper.split("; "), here.split("; ")
        assert len(papers) == len(heres), paper
        rows += [(paper, re.findall(r"`([\w.]+)`", here)) for paper, here in zip(papers, heres)]
    return [(paper, functions) for paper, functions in rows if functions]


def test_the_readme_is_short_and_plain():
    assert len(README.splitlines()) <= 170
    # without code, tables and headings
    apart = re.compile(r"```.*?```|^\|.*?$|^#.*?$|^- |!?\[([^\]]*)\]\([^)]*\)|`[^`]*`", re.S | re.M)
    sentences = re.split(r"(?<=[.!?])\s+|\n\n", apart.sub(r"\1", README))
    lengths = [len(sentence.split()) for sentence in sentences if len(sentence.split()) > 2]
    assert sum(lengths) / len(lengths) <= 25


def test_line_counts_and_walk_are_todays(project):
    listed = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert [(name, int(lines)) for name, lines in listed.items()] == list(walk.line_counts().items())
    assert {*listed} == {path.name for path in ROOT.glob("*.py")}
    assert walk.walk_sentence(project) in README


def test_the_recipe_is_todays():
    flags = walk.recipe_flags()
    listed = re.findall(r"^\| `--(\w+) (\S+)` \|", README, re.M)
    assert dict(listed) == {name: value for name, value in flags.items() if name not in ("alpha", "beta")}
    assert f"alpha {flags['alpha']} and beta {flags['beta']} are ours" in README
    assert len(listed) <= 5


@pytest.mark.parametrize("paper, functions", map_rows())
def test_each_function_of_the_map_exists_and_names_its_equation(project, paper, functions):
    for name in functions:
        module, function = re.fullmatch(r"((?:utils\.)?\w+)\.(.+)", name).groups()
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        text = ast.get_source_segment(source, project.definitions[module, function])
        words = set(re.findall(r"`([^`]*)`", paper)) | set(re.findall(r"\b3\.2\.\d", paper))
        assert equations(paper) <= equations(text), name
        assert all(word in text for word in words), (name, words)


def test_the_map_has_every_equation_of_the_paper():
    assert set().union(*(equations(paper) for paper, _ in map_rows())) == {3, 4, 5, 6, 7, 8, 9, 10}


@ahead
def explained(folder):
    """What the README's command prints now."""
    return walk.explain_page(README)


def test_one_step_in_numbers_is_what_the_command_prints(explained):
    printed = walk.PAGE.search(README)[3]
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", explained)
    for stated, actual in zip(NUMBER.findall(printed), NUMBER.findall(explained)):
        assert float(stated) == pytest.approx(float(actual), rel=0.02, abs=0.02)


@pytest.mark.parametrize("flags", ["", "--recipe paper", "--recipe ours --calibration none",
                                   "--recipe paper --pathwise 1 --cnorm range", "--recipe grpo",
                                   "--recipe ours --adv_norm std --controls 1 --calibration log"])
def test_the_page_adds_up(flags, tmp_path, capsys):
    """The reward is the sum of its terms, and the loss of its halves, as printed."""
    quick = "--scale_questions 4 --batch_size 4 --group_size 3 --eval_size 0"
    args = train_cdrl.parse(["--explain", "train-0-41", *flags.split(), *quick.split(),
                             "--output", str(tmp_path / "run")])
    lines = train_cdrl.train(args)
    assert capsys.readouterr().out.splitlines() == lines
    assert (tmp_path / "explain.png").exists() and not (tmp_path / "run").exists()
    rewards = [line.split("  ", 2)[2] for line in lines if re.match(r"  y\d'?  .* = \d+\.\d{3}$", line)]
    assert len(rewards) == 3 * (1 + args.noised_learns)
    for formula in rewards:
        terms, total = formula.rsplit(" = ", 1)
        if "score" not in terms:
            python = re.sub(r"(\d|\)) (?=[(ct0])", r"\1 * ", terms).replace("^", "**")
            names = {"tanh": math.tanh, "clip": lambda x: min(max(x, 0), 1)}
            assert eval(python, names) == pytest.approx(float(total), abs=0.01), formula
    halves = [float(re.search(r"= (-?\d+\.\d{4})", line)[1]) for line in lines if " half " in line]
    losses = [float(line.split()[1]) for line in lines if line.startswith("  loss")]
    assert losses == [pytest.approx(sum(halves), abs=2e-4)]


def test_an_unknown_question_is_named(tmp_path):
    with pytest.raises(InputError, match="'nope': no question has this id"):
        train_cdrl.train(train_cdrl.parse(["--explain", "nope", "--output", str(tmp_path / "run")]))


def test_the_pages_update_is_adamws_first(tmp_path):
    torch.manual_seed(0)
    weights = [torch.randn(3, 4), torch.randn(5)]
    mine, theirs = ([torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    for parameters in (mine, theirs):
        sum((p**2).sum() for p in parameters).backward()
    explain.first_update(mine, 1e-3, 0.5)
    torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.0).step()
    for p, q in zip(mine, theirs):
        torch.testing.assert_close(p, q)


def imports():
    """{module: modules of the project that it imports}, {module: names that it takes from them}."""
    modules, names = defaultdict(set), defaultdict(set)
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
             for folder in ("", "utils", "tiny") for path in (ROOT / folder).glob("*.py")}
    for module, path in files.items():
        tree = ast.parse(path.read_text())
        aliases = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules[module] |= {alias.name for alias in node.names} & {*files}
                aliases |= {alias.asname or alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & {*files}
                aliases |= {name.rpartition(".")[2] for name in submodules}
                modules[module] |= submodules or {node.module} & {*files}
                if node.module in files:
                    names[module] |= {alias.name for alias in node.names}
        names[module] |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
                          and isinstance(node.value, ast.Name) and node.value.id in aliases}
    return modules, names


def test_the_folder_never_imports_a_root_file():
    root = {path.stem for path in ROOT.glob("*.py")}
    for module, imported in imports()[0].items():
        if module.startswith("utils."):
            assert not imported & root, module


def test_no_circle_of_imports():
    modules = imports()[0]

    def reach(module, path):
        assert module not in path, " -> ".join([*path, module])
        for imported in modules.get(module, ()):
            reach(imported, [*path, module])
    for module in [*modules]:
        reach(module, [])


def test_nobody_imports_a_private_name():
    for module, names in imports()[1].items():
        assert not [name for name in names if name.startswith("_")], module

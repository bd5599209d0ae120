"""Every family of models in tests/families.py against every check of tests/test_models.py, as a table.

    python benchmarks/families.py --output results/families.md        # all families; some ten minutes of one core
    python benchmarks/families.py llama4 gemma4                       # these alone

Each family is a tiny random model of transformers' own class. `ok`: the check passes; `no`: it fails, and pytest has printed why;
`-`: a package is absent (torchvision, num2words). Families that `VLM.load` must refuse are rows of their own.
"""
import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers
from common import ROOT

from utils import cli

CHECKS = {
    "greedy_equals_generate": "greedy = generate", "sampled_equals_scored": "sampled = scored = one forward",
    "a_prompt_alone": "alone = in a batch", "rows_of_encoded": "rows of a batch", "every_picture": "each picture counts",
    "saved_and_loaded": "save, load", "contrast": "contrast", "state_of_training": "resume", "gradient": "gradient, a step",
    "two_ranks": "two ranks = one", "plan_counts_what": "plan: vision", "plan_counts_the_cache": "plan: cache", "cannot_work": "refused in a sentence"}


class Outcomes:
    """A plugin of pytest: family -> {check: outcome}."""

    def __init__(self):
        self.table = defaultdict(dict)

    def pytest_runtest_logreport(self, report):
        name, _, family = report.nodeid.rpartition("::")[2].partition("[")
        check = next((words for part, words in CHECKS.items() if part in name), None)
        if family and check and (report.when == "call" or not report.passed):
            outcome = {"passed": "ok", "failed": "no", "skipped": "-"}[report.outcome]
            self.table[family.rstrip("]")][check] = outcome


def markdown(table):
    """The table of outcomes, and a line of how many families pass everything (str)."""
    columns = [check for check in CHECKS.values() if any(check in row for row in table.values())]
    lines = [["family", *columns], ["---"] * (1 + len(columns))]
    lines += [[family, *(row.get(check, "") for check in columns)] for family, row in table.items()]
    passed = sum("no" not in row.values() and "ok" in row.values() for row in table.values())
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + \
        f"\n\n{passed} of {len(table)} families pass everything that could be tried.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("families", nargs="*", help="names in tests/families.py; none: all")
    parser.add_argument("--output", help="write the table to this file")
    args = parser.parse_args()
    os.environ["FAMILIES"] = ",".join(args.families) or "all"
    outcomes = Outcomes()
    pytest.main(["-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_models.py")], plugins=[outcomes])
    text = markdown(outcomes.table)
    print(text)
    if args.output:
        command = " ".join(["python benchmarks/families.py", *args.families, "--output", args.output])
        cli.write_atomically(Path(args.output), f"# Families of models against the checks of tests/test_models.py\n\n`{command}`, "
                             f"torch {torch.__version__}, transformers {transformers.__version__}, tiny random models, CPU.\n\n"
                             + text)
    return int(any("no" in row.values() for row in outcomes.table.values()))


if __name__ == "__main__":
    sys.exit(main())

"""What the tests share: the shipped tiny models, the optional folder of real questions, and runs that start ahead."""
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")          # nothing here may reach for a network
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
from programs import ENVIRONMENT  # noqa: E402, F401  # a test beside a program may set variables for itself

import data  # noqa: E402
from noise import ClipAttention  # noqa: E402
from utils.experts import LocalExpert  # noqa: E402
from vlm import VLM  # noqa: E402

TAUS = {"samples": 1.0, "voter": 0.5, "self_reflection": 0.5, "self_check": 0.5}
KEY = "sk-very-secret-0123"             # of an Expert's server

# One core for the tests of this process, the other for what starts ahead; two threads of the tiny model gain little.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
REAL = ROOT.parent / "shared" / "data"
AHEAD, FOUND, POOL, SCRATCH = {}, {}, ThreadPoolExecutor(1), tempfile.TemporaryDirectory(prefix="cdrl-tests-")


def ahead(scenario):
    """A scenario of whole programs, function(folder) -> what a test compares, as a fixture of its name. Those that the chosen
    tests ask for run one after another from the start of the session, beside the tests of this process."""
    name = scenario.__name__
    AHEAD[name] = scenario

    @pytest.fixture(scope="session", name=name)
    def outcome():
        return FOUND[name].result()
    return outcome


def pytest_collection_modifyitems(items):
    """Tests that wait for a scenario go last."""
    items.sort(key=lambda item: any(name in AHEAD for name in item.fixturenames))


def pytest_collection_finish(session):
    wanted = {name for item in session.items for name in item.fixturenames}
    for name, scenario in AHEAD.items():
        if name in wanted and not session.config.option.collectonly:
            (folder := Path(SCRATCH.name) / name).mkdir()
            FOUND[name] = POOL.submit(scenario, folder)


def pytest_sessionfinish():
    POOL.shutdown(wait=False, cancel_futures=True)


def recorded(folder, run):
    """The Python commands of a shell script, which records them and runs none -> list of words behind `python` or `torchrun`.
    run: a function that runs the script with the variables it is given."""
    shims, record = folder / "shims", folder / "commands"
    shims.mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (shims / name).write_text('#!/bin/bash\nprintf "%s\\0" "$@" >> "$RECORD"; printf "\\n" >> "$RECORD"\n')
        (shims / name).chmod(0o755)
    record.write_text("")
    run(PATH=f"{shims}:{os.environ['PATH']}", RECORD=str(record))
    return [line.split("\0")[:-1] for line in record.read_text().splitlines()]


@pytest.fixture(scope="session")
def base():
    return VLM.load(ROOT / "tiny" / "base")


@pytest.fixture
def fresh():
    """A model of its own for a test that changes weights."""
    return VLM.load(ROOT / "tiny" / "base")


@pytest.fixture(scope="session")
def clip():
    return ClipAttention.from_pretrained()


@pytest.fixture(scope="session")
def real():
    if not REAL.is_dir():
        pytest.skip(f"the real questions are not here ({REAL}); this test checks against them")
    return REAL


@pytest.fixture(scope="session")
def mixed():
    """Questions of different prompt lengths, image sizes and numbers of images -> (images, prompts)."""
    samples = [data.synthetic("val", 0, i) for i in range(5)]
    images = [list(s.images) for s in samples]
    images[1] = [images[1][0].resize((60, 180))]
    images[2] = [images[2][0], images[0][0].resize((200, 90))]
    return images, [data.prompt(s) for s in samples]


@pytest.fixture(scope="session")
def expert():
    return LocalExpert(VLM.load(ROOT / "tiny" / "expert"), 192)

"""What the tests share: the shipped tiny models, a random one, and the optional folder of real questions."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")          # nothing here may reach for a network
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
from noise import ClipAttention  # noqa: E402
from vlm import VLM  # noqa: E402

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
REAL = ROOT.parent / "shared" / "data"


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

"""What the programs import from elsewhere, for `programs.py`: their own modules are forgotten again, and read anew by each."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pytest  # noqa: E402, F401

import catts  # noqa: E402, F401
import eval  # noqa: E402, F401
import train_cdrl  # noqa: E402, F401

for name, module in list(sys.modules.items()):
    if name != __name__ and ROOT in Path(getattr(module, "__file__", None) or "/").parents:
        del sys.modules[name]

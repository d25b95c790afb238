"""The data and the run that the tests of run/ share, and the benchmarks, which are no part of the package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "run"))
sys.path.insert(0, str(Path(__file__).parents[2]))

from run_helpers import data, data_path, finished, shared

__all__ = ["data", "data_path", "finished", "shared"]

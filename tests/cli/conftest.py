"""The run that these tests share with those of run/, and the shell."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "run"))

from cli_helpers import shell
from run_helpers import data, data_path, finished, shared

__all__ = ["data", "data_path", "finished", "shared", "shell"]

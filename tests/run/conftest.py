"""The run that these tests share; see run_helpers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from run_helpers import data, data_path, finished, record, session, shared

__all__ = ["data", "data_path", "finished", "record", "session", "shared"]

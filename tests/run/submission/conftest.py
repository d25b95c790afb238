"""The runs and the record folder that these tests share; see record_helpers."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from record_helpers import good, record, runs

__all__ = ["good", "record", "runs"]

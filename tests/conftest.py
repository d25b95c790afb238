"""Tests run on one thread each: several run at a time, and small tensors gain nothing from more."""

import sys
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent / "model"))  # golden_model is shared by several folders

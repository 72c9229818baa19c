"""Measurements against what people use today: ``python -m benchmarks [NAME...]``."""

import sys
from pathlib import Path

# The victims and the cgroups are those of the tests.
sys.path.append(str(Path(__file__).parent.parent / "tests"))

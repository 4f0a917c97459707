"""The degradation experiment (fusedres/tools/demo.py), drawn as README shows it.

Run: python examples/degradation.py
"""

import sys
from pathlib import Path

from fusedres.tools import demo

PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "degradation.png"

if __name__ == "__main__":
    sys.exit(1 if demo.run(PICTURE) else 0)

"""Submit a job to a Ray cluster, show its log, and end with its exit code.

    python jobs/submit.py [--address http://HOST:8265] [--working-dir DIR] [--no-wait] -- python jobs/run_dpa.py ...

As `ray job submit`, but a recipe is checked before anything is started, and the exit code tells how the job ended. Exit
code 0: done; 1: failed; 2: the recipe is wrong; 3: the job was stopped; 130: Ctrl-C, after which the job goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from dpa_ray.cluster.submit import main  # noqa: E402 (found by the path above)

if __name__ == "__main__":
    sys.exit(main())

"""Is what a command printed, and what it has to do at exit, done when it leaves?"""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_exit_functions_run_and_all_is_written() -> None:
    done = run(
        "import atexit, sys; from dpa_ray.leaving import leave; atexit.register(print, 'at exit')\n"
        "print('out'); print('err', file=sys.stderr); leave(3)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\nat exit\n", "err\n")


def test_nothing_that_fails_at_exit_changes_the_code() -> None:
    done = run(
        "import atexit, sys; from dpa_ray.leaving import leave; atexit.register(lambda: 1 / 0)\nsys.stdout = None; leave(0)"
    )
    assert done.returncode == 0
    assert "ZeroDivisionError" in done.stderr


def test_threads_are_not_waited_for() -> None:
    done = run(
        "import threading, time; from dpa_ray.leaving import leave\n"
        "threading.Thread(target=time.sleep, args=(600,)).start(); leave(1)"
    )
    assert done.returncode == 1

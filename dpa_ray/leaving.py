"""How does a command end, so that its exit code is its own?"""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with `code`: after what Python has to do at exit, without C++'s destructors.

    Ray leaves threads of its own behind (telemetry, gRPC) that wake up now and then; what they use is taken away from them
    while a process ends, and one that had done all its work could die of that, by a segmentation fault.
    """
    try:
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # whoever read it is gone, or it never was
                stream.flush()
        os._exit(code)

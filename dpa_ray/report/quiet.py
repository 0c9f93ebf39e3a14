"""How is a job kept from drowning in what libraries print?"""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Before they are imported: what they print at import would stand between a job's own lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # of the driver; workers are told theirs
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)

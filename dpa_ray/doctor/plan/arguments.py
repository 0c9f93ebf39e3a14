"""Which arguments of jobs/doctor.py are a plan's, and what do they say? Loads nothing heavy: a help text should not wait."""

from __future__ import annotations

import argparse
import math
from typing import Any

from dpa_ray.doctor.plan import options
from dpa_ray.doctor.plan.options import BYTES_PER_S, PlanOptions

PLAN_ONLY = (
    "--gpus", "--from", "--gpu", "--peak-tflops", "--mfu", "--bytes-per-sample", "--tokens-per-sample", "--gpus-per-node",
    "--network-gbyte-s", "--store-gbyte-s", "--store-latency-ms", "--measure",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that only a plan has."""
    group = parser.add_argument_group("with --plan")
    group.add_argument("--plan", action="store_true", help="steps, hours, bytes and limits on other numbers of GPUs")
    group.add_argument(
        "--gpus", metavar="N,N|N-N", help=f"e.g. 1,8,64, or a range that doubles (default: {options.DEFAULT_GPUS})"
    )
    group.add_argument("--from", metavar="RUN_URI", help="a run whose step times are taken")
    group.add_argument("--gpu", metavar="TYPE", help=f"for times from FLOPs: {', '.join(options.PEAK_TFLOPS)}")
    group.add_argument("--peak-tflops", type=positive, metavar="N", help="of one GPU, instead of --gpu")
    group.add_argument("--mfu", type=positive, metavar="N", help=f"share of the peak that is reached {_of('mfu')}")
    group.add_argument(
        "--bytes-per-sample", type=positive, metavar="N", help="in the prepared shards (default: as in the data)"
    )
    group.add_argument(
        "--tokens-per-sample", action="append", default=[], metavar="[STAGE=]N",
        help="image tokens counted (default: as in the run or the data)",
    )  # fmt: skip
    group.add_argument("--gpus-per-node", type=_natural, metavar="N", help=_of("gpus_per_node"))
    group.add_argument(
        "--network-gbyte-s", type=positive, metavar="N",
        help=f"of one GPU, between nodes {_of('network_bytes_per_s', BYTES_PER_S)}",
    )  # fmt: skip
    group.add_argument(
        "--store-gbyte-s", type=positive, metavar="N",
        help=f"that the store gives in all {_of('store_bytes_per_s', BYTES_PER_S)}",
    )  # fmt: skip
    group.add_argument(
        "--store-latency-ms", type=positive, metavar="N", help=f"of a small call {_of('store_latency_s', 1e-3)}"
    )
    group.add_argument(
        "--measure", action="store_true", help="the driver's and the head's costs, on a Ray started here"
    )


def _of(name: str, unit: float = 1) -> str:
    """The default of `PlanOptions`, in the argument's unit."""
    return f"(default: {getattr(PlanOptions, name) / unit:g})"


def refuse_without_plan(arguments: argparse.Namespace) -> None:
    """Raises: ValueError where something is told that only a plan reads, and none is asked for."""
    found = [flag for flag in PLAN_ONLY if getattr(arguments, _dest(flag)) not in (None, [], False)]
    if found and not arguments.plan:
        raise ValueError(f"expected --plan beside {', '.join(found)}, which only a plan reads, found none")


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def read(arguments: argparse.Namespace, stages: tuple[str, ...]) -> PlanOptions:
    """Raises: ValueError with what is wrong."""
    if arguments.mfu is not None and arguments.mfu > 1:
        raise ValueError(f"--mfu: expected a share of at most 1, found {arguments.mfu:g}")
    units = {"network_gbyte_s": BYTES_PER_S, "store_gbyte_s": BYTES_PER_S, "store_latency_ms": 1e-3}
    rates = {name: unit * value for name, unit in units.items() if (value := getattr(arguments, name)) is not None}
    told: dict[str, Any] = {
        "from_run": getattr(arguments, "from"),
        "bytes_per_sample": arguments.bytes_per_sample,
        "gpu": arguments.gpu,
        "mfu": arguments.mfu,
        "gpus_per_node": arguments.gpus_per_node,
        "network_bytes_per_s": rates.get("network_gbyte_s"),
        "store_bytes_per_s": rates.get("store_gbyte_s"),
        "store_latency_s": rates.get("store_latency_ms"),
    }
    return PlanOptions(
        gpus=options.gpu_list(arguments.gpus or options.DEFAULT_GPUS),
        step_times=options.step_times(arguments.step_time, stages),
        samples=options.whole_per_stage("--samples", arguments.samples, stages),
        tokens_per_sample=options.per_stage("--tokens-per-sample", arguments.tokens_per_sample, stages),
        peak_flops=options.peak_flops(arguments.gpu or "", arguments.peak_tflops or 0.0),
        **{name: value for name, value in told.items() if value is not None},
    )


def positive(text: str) -> float:
    """The number that an argument gives. Raises: argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, without a unit, found {text!r}")
    return value


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, found {text!r}")
    return int(text)

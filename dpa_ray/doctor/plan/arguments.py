"""Which arguments of jobs/doctor.py are a plan's, and what do they say? Loads nothing heavy: a help text should not wait."""

from __future__ import annotations

import argparse
import math

from dpa_ray.doctor.plan import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that only a plan has."""
    group = parser.add_argument_group("with --plan")
    group.add_argument("--plan", action="store_true", help="steps, hours, bytes and limits on other numbers of GPUs")
    group.add_argument(
        "--gpus", default=options.DEFAULT_GPUS, metavar="N,N|N-N", help="e.g. 1,8,64, or a range that doubles"
    )
    group.add_argument(
        "--from", dest="from_run", default="", metavar="RUN_URI", help="a run whose step times are taken"
    )
    group.add_argument(
        "--gpu", default="", metavar="TYPE", help=f"for times from FLOPs: {', '.join(options.PEAK_TFLOPS)}"
    )
    group.add_argument("--peak-tflops", type=_positive, default=0.0, metavar="N", help="of one GPU, instead of --gpu")
    group.add_argument("--mfu", type=_positive, default=0.4, metavar="N", help="share of the peak that is reached")
    group.add_argument("--bytes-per-sample", type=_positive, default=0.0, metavar="N", help="in the prepared shards")
    group.add_argument(
        "--tokens-per-sample", action="append", default=[], metavar="[STAGE=]N", help="image tokens counted"
    )
    group.add_argument("--gpus-per-node", type=_natural, default=8, metavar="N")
    group.add_argument("--network-gbyte-s", type=_positive, default=50.0, metavar="N", help="of one GPU, between nodes")
    group.add_argument("--store-gbyte-s", type=_positive, default=25.0, metavar="N", help="that the store gives in all")
    group.add_argument("--store-latency-ms", type=_positive, default=30.0, metavar="N", help="of a small call")
    group.add_argument(
        "--measure", action="store_true", help="the driver's and the head's costs, on a Ray started here"
    )


def read(arguments: argparse.Namespace, stages: tuple[str, ...]) -> options.PlanOptions:
    """Raises: ValueError with what is wrong."""
    if arguments.mfu > 1:
        raise ValueError(f"--mfu: expected a share of at most 1, found {arguments.mfu:g}")
    return options.PlanOptions(
        gpus=options.gpu_list(arguments.gpus),
        step_times=options.step_times(arguments.step_time, stages),
        from_run=arguments.from_run,
        samples=options.whole_per_stage("--samples", arguments.samples, stages),
        tokens_per_sample=options.per_stage("--tokens-per-sample", arguments.tokens_per_sample, stages),
        bytes_per_sample=arguments.bytes_per_sample,
        gpu=arguments.gpu,
        peak_flops=options.peak_flops(arguments.gpu, arguments.peak_tflops),
        mfu=arguments.mfu,
        gpus_per_node=arguments.gpus_per_node,
        network_bytes_per_s=arguments.network_gbyte_s * options.BYTES_PER_S,
        store_bytes_per_s=arguments.store_gbyte_s * options.BYTES_PER_S,
        store_latency_s=arguments.store_latency_ms / 1e3,
    )


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def _natural(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value

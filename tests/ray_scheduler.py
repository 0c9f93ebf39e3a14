"""Which nodes would Ray's autoscaler launch for a demand? Its own scheduler, asked with a cluster's config and no cloud."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest


def launched(
    config: dict[str, Any],
    *,
    tasks: Sequence[dict[str, float]] = (),
    gang: Sequence[dict[str, float]] = (),
    failed: Sequence[str] = (),
) -> dict[str, int]:
    """Node type -> number launched, of a cluster that has no worker nodes yet.

    Args:
        config: as the autoscaler reads it, defaults filled in.
        tasks: resources asked for one by one.
        gang: the bundles of a placement group.
        failed: node types of which none could be had just now.
    """
    read = AutoscalingConfig(config, skip_content_hash=True)
    down = dict.fromkeys(failed, 0.0)
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=read.get_node_type_configs(),
            max_num_nodes=read.get_max_num_worker_nodes(),
            idle_timeout_s=read.get_idle_timeout_s(),
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(each) for each in tasks]),
            gang_resource_requests=[
                GangResourceRequest(requests=[ResourceRequestUtil.make(each) for each in gang])
            ] if gang else [],
            cloud_resource_availabilities=down,
            recoverable_resource_availabilities=down,
        )
    )  # fmt: skip
    assert not reply.infeasible_resource_requests, reply.infeasible_resource_requests
    assert not reply.infeasible_gang_resource_requests, reply.infeasible_gang_resource_requests
    counts: Counter[str] = Counter()
    for request in reply.to_launch:
        counts[request.instance_type] += request.count
    counts.pop(read.get_head_node_type(), None)
    return dict(counts)

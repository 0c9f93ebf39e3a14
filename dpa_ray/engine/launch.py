"""How tasks get to workers: Ray, and one TorchTrainer for all tasks that are still to do."""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.train import FailureConfig, RunConfig, ScalingConfig

from dpa_ray.data.ray_tasks import RETRY_ENVIRONMENT
from dpa_ray.engine import stopping
from dpa_ray.engine.failures import SAVE_WITHIN_S, Failures, first_line, for_user, root_causes
from dpa_ray.engine.interface import RaysInterface
from dpa_ray.engine.messages import FAILED, STARTED, Board, Orders
from dpa_ray.engine.placing import Labels, matches, on_labels, worker_resources
from dpa_ray.engine.pulse import Standstill
from dpa_ray.engine.relaunching import Fit, Relaunches, here
from dpa_ray.engine.worker import run_worker
from dpa_ray.errors import UserError
from dpa_ray.recipe_running import ClusterSection
from dpa_ray.stages.spec import Task
from dpa_ray.store.fs import Store

WORKER_ENVIRONMENT = {
    **RETRY_ENVIRONMENT,
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else workers' prints appear twice
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # of workers that are given up; one that is stopped would take 30
}
DRIVER_ENVIRONMENT = {
    **RETRY_ENVIRONMENT,
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",  # a fit of a tiny model takes 15 s instead of 35
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",  # some clouds' notice is 30 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Of a Ray started here: else a data task's process is ended after a second without a task, and the next one imports anew.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
}
CHECKSUM_VARIABLES = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
"""What the store set for S3 servers other than AWS's; Ray Train's own S3 clients in the workers need it too."""

SILENT_WORKER = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
TRAIN_COLLECTIVE = "RAY_TRAIN_COLLECTIVE_TIMEOUT_S"
"""How long Ray Train's controller waits for a worker that does not answer, and its own barriers for one that does not come;
it passes them on from the driver."""

PLACING = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
PLACING_S = {"elastic": "5", "fixed": "60"}
"""How long Ray Train's controller waits for a placement group before it counts the nodes anew. Elastic workers are asked for
where there is room: if they find none, a node has died that was still counted. Workers of a fixed number may wait for nodes that
an autoscaler starts."""

LOCAL = "DPA_RAY_LOCAL"
"""Set in the workers of a Ray that `connect` started on this machine. (RAY_ADDRESS is set for the driver of a cluster, but
not for its workers, some of which are drivers of a sweep's trials.)"""

ANSWER_S = 120.0
"""How long the Board, which is on the driver's own node and never at work for long, may take to answer."""
POLL_S = 0.2
LOOK_EVERY_S = 5.0
"""How often the driver looks whether workers wait for one that does not come."""


def connect(cluster: ClusterSection, *, num_cpus: float | None = None, dashboard: bool = False) -> str:
    """Join the cluster that RAY_ADDRESS names (`ray job submit` sets it), or start Ray on this machine.

    Args:
        num_cpus: logical CPUs of a Ray started here, if more than this recipe's workers ask for.
        dashboard: start it there too (Tune's stops need it).
    Returns: what was joined, for people. Raises: UserError where the named cluster does not answer.
    """
    for name, value in DRIVER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    checksums = {name: value for name, value in os.environ.items() if name in CHECKSUM_VARIABLES}
    accelerator = "cuda" if cluster.gpus_per_worker else "cpu"  # else DeepSpeed guesses, and says so at every import
    environment = {"env_vars": {**WORKER_ENVIRONMENT, **checksums, "DS_ACCELERATOR": accelerator}}
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = dict(log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment)
    if ray.is_initialized():
        return "the Ray already there"
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as err:
            raise UserError(f"RAY_ADDRESS {address}: no Ray cluster answers there: {first_line(err)}") from None
        stopping.heed_sigterm()
        return f"cluster at {address}"
    environment["env_vars"][LOCAL] = "1"
    wanted = math.ceil(max(local_cpus(cluster), num_cpus or 0))
    ray.init(address="local", num_cpus=wanted, include_dashboard=dashboard, **quiet)
    stopping.heed_sigterm()
    return "local Ray"


def local_cpus(cluster: ClusterSection) -> int:
    """CPUs that a local Ray is told to have. They only say what may run at once: training workers wait for data tasks, and
    must leave room for one."""
    wanted = cluster.max_workers * cluster.cpus_per_worker + 1
    return max(os.cpu_count() or 1, int(-(-wanted // 1)))


def launch(
    tasks: Sequence[Task],
    store: Store,
    cluster: ClusterSection,
    handle: Callable[[str, dict[str, Any], float], None],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Run `tasks` on the workers of one TorchTrainer; their events go to `handle`, in order, with the time (time.time) of each.

    `check` is called now and then; what it raises ends the work.

    One worker group does all tasks: starting one costs more than a short stage, and GPUs stay warm in between.
    Raises: UserError with what a worker said, or where workers cannot be started (again) in time.
    """
    board: Any = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here()).remote()
    # Ray Train's own state, of no use to anybody: what is finished is known from the artifacts, and checkpoints are ours.
    # Beside its controller, not in the store, whose outages it would not wait out.
    storage = tempfile.mkdtemp(prefix="dpa_ray-train-")
    order = ray.put(tuple(tasks))
    limit_s = tasks[0].recipe.collective_limit_s
    os.environ[SILENT_WORKER] = str(cluster.collective_timeout_s)
    os.environ[TRAIN_COLLECTIVE] = str(limit_s)
    os.environ[PLACING] = PLACING_S["fixed" if cluster.min_workers == cluster.max_workers else "elastic"]
    trainer = dict(
        train_loop_per_worker=run_worker,
        train_loop_config=Orders(store.uri, order, board, uuid.uuid4().hex, socket.gethostname()),
        torch_config=RaysInterface(backend="nccl" if cluster.gpus_per_worker else "gloo", timeout_s=math.ceil(limit_s)),
        scaling_config=ScalingConfig(
            num_workers=_num_workers(cluster),
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=worker_resources(cluster),
            placement_strategy="PACK",  # on as few nodes as will do: NCCL is fastest inside one
            label_selector=cluster.label_selector or None,
            elastic_resize_monitor_interval_s=cluster.grow_every_s,
        ),
        run_config=RunConfig(
            name="fit",
            storage_path=storage,
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[Failures(board, cluster.max_failures, cluster.max_preemptions, cluster.collective_timeout_s)],
        ),
    )

    def note(text: str) -> None:
        handle("note", {"text": text}, time.time())

    def ask(method: Any) -> Any:
        return ray.get(method.remote(), timeout=ANSWER_S)

    fit, starting, standstill = Fit(**trainer), Starting(cluster, note), Standstill(cluster.collective_timeout_s)
    relaunches = Relaunches(cluster.max_failures)
    looked_at = time.monotonic()
    try:
        while True:
            ended = fit.ended
            for kind, values, at_s in ask(board.take):
                starting.saw(kind)
                handle(kind, values, at_s)
            if ended:
                if not relaunches.recovers(fit, ask(board.progress)):
                    break
                note(relaunches.text)
                starting.saw(FAILED)
                handle(FAILED, {"why": "failure"}, time.time())
                fit = Fit(**trainer)
            starting.check()
            if time.monotonic() - looked_at >= LOOK_EVERY_S:
                looked_at = time.monotonic()
                told = (
                    standstill.look(ask(board.last_beats)),
                    fit.look(limit_s + cluster.collective_timeout_s + SAVE_WITHIN_S),
                )
                for text in filter(None, told):
                    note(text)
            check()
            fit.join(POLL_S)
        if fit.error is not None:
            raise _for_user(fit.error) from fit.error
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as err:  # of the Board
        raise _of_board(err) from err
    finally:
        starting.end()
        if not fit.ended or fit.error is not None:
            fit.end()  # before anybody else may take the run over
        ray.kill(board)
        shutil.rmtree(storage, ignore_errors=True)


ASK_AGAIN_S = 60.0
"""How often other nodes are asked for while there are no workers."""


class Starting:
    """Are there workers, or are they waited for, at first and after each failure? Ray would wait for ever."""

    def __init__(self, cluster: ClusterSection, note: Callable[[str], None]):
        self.cluster, self.note = cluster, note
        self.since: float | None = time.monotonic()
        self.asks_for_others = False
        self.asked_at = -math.inf

    def saw(self, kind: str) -> None:
        """An event: FAILED begins the wait for new workers; only theirs that they are there ends it, as what is left of
        the old ones may still tell something."""
        if kind == FAILED:
            self.since = time.monotonic()
        elif kind == STARTED:
            self.since = None
            self.end()

    def end(self) -> None:
        """Other nodes are no longer asked for: those that are there stay as long as they are used."""
        if self.asks_for_others:
            self.asks_for_others = False
            request_resources(bundles=[])

    def check(self) -> None:
        """Asks for other nodes where there have been no workers for `cluster.fallback_after_s`. Raises: UserError where there
        have been none for `cluster.start_timeout_s`."""
        if self.since is None:
            return
        waited_s, other = time.monotonic() - self.since, self.cluster.fallback_label_selector
        if other and waited_s >= self.cluster.fallback_after_s and time.monotonic() >= self.asked_at + ASK_AGAIN_S:
            self._ask_for_others(other, tell=not self.asks_for_others)
            self.asks_for_others, self.asked_at = True, time.monotonic()
        if waited_s < self.cluster.start_timeout_s:
            return
        raise UserError(
            f"no workers for {self.cluster.start_timeout_s:g} s (cluster.start_timeout_s): {_asked_and_found(self.cluster)} "
            f"in all; {_there(self.cluster, ray.available_resources())} free in the whole cluster. Add nodes (or give those that an "
            "autoscaler starts more time), or ask for less: cluster.workers, cluster.gpus_per_worker (0 trains on CPUs), "
            "cluster.cpus_per_worker, cluster.label_selector. What was saved stays, and the same command goes on from there"
        )

    def _ask_for_others(self, other: Labels, *, tell: bool) -> None:
        """Ray's autoscaler goes on asking for nodes that a cloud refuses (it counts only those that came and never joined), and
        workers fit on whatever comes: so nodes of a kind that the recipe names are asked for by name.

        The request is one for the whole cluster, and what is there counts, in use or not: so it is for room beside what others
        use, and made again, as another run's, or its end, takes this one's place.
        """
        labels = {**self.cluster.label_selector, **other}
        wanted = worker_resources(self.cluster)
        num = self.cluster.min_workers + workers_in_use(labels, wanted)
        request_resources(bundles=[wanted] * num, bundle_label_selectors=[labels] * num)
        if not tell:
            return
        named = ", ".join(f"{label}: {condition}" for label, condition in labels.items())
        self.note(
            f"no workers for {self.cluster.fallback_after_s:g} s (cluster.fallback_after_s): the autoscaler is asked for nodes labelled {{{named}}}"
        )


def check_resources(cluster: ClusterSection) -> None:
    """Has a local Ray, which does not grow, what all workers (of an elastic run, the fewest) need?

    A cluster's autoscaler brings nodes when workers are asked for, not before: there `launch` waits for them.
    Raises: UserError with what was asked for and what there is. (Ray itself would wait for ever, without a word.)
    """
    if not _is_local():
        return
    there = resources_of(node_resources(cluster.label_selector))
    if any(there.get(k, 0.0) + 1e-9 < v for k, v in _needed(cluster).items()):
        raise UserError(
            f"this machine cannot place {cluster.min_workers} workers: {_asked_and_found(cluster)}. Set cluster.workers, "
            "cluster.gpus_per_worker (0 trains on CPUs), cluster.cpus_per_worker or cluster.label_selector to fit"
        )


def _is_local() -> bool:
    """Is this the driver of a Ray that was started on this machine, or a trial's in it?"""
    if ray.get_runtime_context().get_actor_id() is not None:
        return LOCAL in os.environ
    return not os.environ.get("RAY_ADDRESS")


def node_resources(selector: Labels | None = None) -> list[dict[str, float]]:
    """What each node that lives (and has the labels that `selector` asks for) has, by Ray's names."""
    return [node["Resources"] for node in _nodes() if matches(node["Labels"], selector or {})]


def node_labels() -> list[dict[str, str]]:
    """Of each node that lives, in the order of `node_resources()`."""
    return [node["Labels"] for node in _nodes()]


def workers_in_use(selector: Labels, wanted: dict[str, float]) -> int:
    """Of how many workers that ask for `wanted` somebody has the room, on nodes with these labels."""
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    found = 0
    for node in _nodes():
        if matches(node["Labels"], selector):
            whole, left = node["Resources"], free.get(node["NodeID"], {})
            slots = [int(min(n.get(k, 0.0) / amount for k, amount in wanted.items())) for n in (whole, left)]
            found += max(0, slots[0] - slots[1])
    return found


def has_autoscaler() -> bool:
    """Does the cluster that was joined bring nodes for what waits? (Ray's autoscaler v2, which `ray up` and KubeRay start,
    tells the head what it does.)"""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    address = ray.get_runtime_context().gcs_address
    reply.ParseFromString(GcsClient(address=address).get_cluster_status(timeout_s=10))
    return bool(reply.autoscaling_state.autoscaler_state_version > 0)


def check_reach(store: Store) -> None:
    """Raises: UserError where the store is a folder and the cluster has nodes on several machines."""
    machines = sorted({str(node["NodeManagerHostname"]) for node in _nodes()})
    if store.is_local and len(machines) > 1:
        raise UserError(
            f"store: expected one that all {len(machines)} machines of the cluster reach ({', '.join(machines[:4])}"
            f"{', ...' if len(machines) > 4 else ''}), found the folder {store.uri}; take s3:// or gs://"
        )


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def resources_of(nodes: Sequence[dict[str, float]]) -> dict[str, float]:
    """All together."""
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in {name for node in nodes for name in node}}


def _needed(cluster: ClusterSection) -> dict[str, float]:
    return {k: v * cluster.min_workers for k, v in worker_resources(cluster).items()}


def _asked_and_found(cluster: ClusterSection) -> str:
    asked = ", ".join(f"{v:g} {k}" for k, v in _needed(cluster).items()) + on_labels(cluster)
    return f"expected {asked}, found {_there(cluster, resources_of(node_resources(cluster.label_selector)))}"


def _there(cluster: ClusterSection, resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(k, 0.0):g} {k}" for k in _needed(cluster))


def _num_workers(cluster: ClusterSection) -> int | tuple[int, int]:
    return cluster.workers if isinstance(cluster.workers, int) else (cluster.min_workers, cluster.max_workers)


def _of_board(err: Exception) -> UserError:
    what = f"died: it was killed, or its node's memory was full ({first_line(err)})"
    if isinstance(err, ray.exceptions.GetTimeoutError):
        what = f"has not answered for {ANSWER_S:g} s"
    return UserError(
        f"the process that takes what the workers tell (ray::Board, on the job's node) {what}. What was saved stays, and the same "
        "command goes on from there"
    )


def _for_user(err: Exception) -> Exception:
    """What a worker said to the user, out of Ray's wrapping; else the error with its first cause in one line."""
    failures = getattr(err, "worker_failures", None) or {}
    causes = [cause for failure in (*failures.values(), err) for cause in root_causes(failure)]
    told = next((c for c in causes if isinstance(c, UserError)), None)
    if told is not None:
        return for_user(told)
    if isinstance(err, ray.exceptions.ActorDiedError):  # not a worker's: those come as failures of the group
        return UserError(
            "Ray Train's controller died: it was killed, or its node's memory was full. What was saved stays, and the same "
            "command goes on from there"
        )
    if (given_up := getattr(err, "controller_failure", None)) is not None:
        return RuntimeError(first_line(given_up))
    ranks = ", ".join(str(r) for r in failures)
    where = f"worker {ranks}: " if ranks else ""
    return RuntimeError(f"{where}{causes[0]}")

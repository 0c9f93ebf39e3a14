"""How is this machine's Ray node told to Ray as one that will go? One request to the cluster's GCS.

A process of its own, started when it is needed: Ray's client ends the process that it is in where the GCS stays away.
"""

from __future__ import annotations

import argparse
import socket
import sys
from typing import Any

ANSWER_WITHIN_S = 10.0


class NoNode(Exception):
    """Nothing could be drained, for now."""


def drain(address: str | None, node_id: str | None, message: str, deadline_ms: int) -> list[str]:
    """Ask Ray to drain this machine's nodes (the one with `node_id`, where that is given), as to be preempted.

    Args:
        address: HOST:PORT of the GCS; None: of the Ray that was started on this machine.
        deadline_ms: when the machine goes, UNIX time in milliseconds; 0: nobody knows.
    Returns: ids of the nodes. Raises: NoNode.
    """
    from ray._private.services import canonicalize_bootstrap_address
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    found = canonicalize_bootstrap_address(address)
    if found is None:
        raise NoNode("no Ray was started on this machine; give its --address")
    client = GcsClient(address=found)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    nodes = [node_id] if node_id else _own_nodes(client, found)
    for node in nodes:
        is_accepted, why = client.drain_node(node, reason, message, deadline_ms, timeout=ANSWER_WITHIN_S)
        if not is_accepted:
            raise NoNode(f"Ray does not drain node {node}: {why}")
    return nodes


def _own_nodes(client: Any, address: str) -> list[str]:
    """Ids of the nodes that live on this machine: all of them go with it."""
    from ray.core.generated.gcs_pb2 import GcsNodeInfo

    host, _, port = address.rpartition(":")
    own = _own_address(host.strip("[]"), int(port))
    infos = client.get_all_node_info(timeout=ANSWER_WITHIN_S).values()
    alive = [info for info in infos if info.state == GcsNodeInfo.ALIVE]
    mine = [info for info in alive if info.node_manager_address == own]
    mine = mine or [info for info in alive if info.node_manager_hostname == socket.gethostname()]
    if not mine:
        places = ", ".join(sorted(info.node_manager_address for info in alive)) or "none"
        raise NoNode(f"no node of the cluster at {address} has this machine's address {own}; those that live: {places}")
    return [info.node_id.hex() for info in mine]


def _own_address(host: str, port: int) -> str:
    """This machine's address on the way to the GCS, which is how Ray's nodes choose theirs."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="draining", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--address", help="HOST:PORT of the GCS (default: of the Ray started on this machine)")
    parser.add_argument("--node-id", help="the node, in hex (default: all nodes that live on this machine)")
    parser.add_argument("--message", required=True, help="why, for Ray's logs")
    parser.add_argument("--deadline-ms", type=int, default=0, help="UNIX time in milliseconds; 0: not known")
    arguments = parser.parse_args(argv)
    try:
        nodes = drain(arguments.address, arguments.node_id, arguments.message, arguments.deadline_ms)
    except Exception as err:  # Ray's errors have no common type
        lines = str(err).strip().splitlines() or [type(err).__name__]
        print(lines[0] if isinstance(err, NoNode) else f"{type(err).__name__}: {lines[0]}", file=sys.stderr)
        return 1
    print(" ".join(nodes))
    return 0


if __name__ == "__main__":
    sys.exit(main())

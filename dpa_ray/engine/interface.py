"""Over which network interface do workers talk? The one whose address Ray knows the node by.

Gloo would take the one that the host's own name stands for, which on Debian and Ubuntu is 127.0.1.1: other hosts do not
come through there. NCCL takes the first that looks right, which may be a container bridge.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Left as they are where they are set."""

_SIOCGIFADDR = 0x8915


class RaysInterface(TorchConfig):
    """A process group whose workers first choose their interface."""

    @property
    def backend_cls(self) -> Any:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(choose)
        super().on_start(worker_group, backend_config)


def choose() -> None:
    """On each worker. Where Ray's address is no interface's (behind NAT, say), nothing is chosen."""
    name = interface_of(ray.util.get_node_ip_address())
    for variable in VARIABLES if name else ():
        os.environ.setdefault(variable, name)


def interface_of(address: str) -> str:
    """The name of this machine's interface with this IPv4 address; empty where there is none."""
    if sys.platform != "linux":
        return ""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                request = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
            except OSError:  # it has no IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return ""

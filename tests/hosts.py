"""Hosts on one machine: each with network, name and Ray of its own, on a bridge; a link may be cut. Needs root on Linux.

A host is a process in namespaces of its own (network, mounts, names), which end with it. Files are shared, but /tmp/ray and
/etc/hosts are not.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("ip", "unshare", "nsenter", "mount", "hostname")
NET = "10.77.0"
GATEWAY = f"{NET}.254"
PORT = 6379


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "namespaces need root on Linux"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(absent)} (Debian: iproute2, util-linux, mount, hostname)"
    for command in (
        ["unshare", "--net", "--mount", "--uts", "true"],
        ["ip", "link", "add", "dpa-try", "type", "bridge"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{' '.join(command)}: {done.stderr.strip()}"
    subprocess.run(["ip", "link", "del", "dpa-try"], check=True)
    return ""


@dataclass
class Host:
    """A host that is up. `enter` before a command runs it there."""

    name: str
    address: str
    pid: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def enter(self) -> list[str]:
        return ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", f"--wd={ROOT}", "--"]

    @property
    def link(self) -> str:
        """This machine's end of it."""
        return f"{_prefix()}-{self.name}"[:15]  # the kernel's limit

    def cut(self) -> None:
        """As when a cable is pulled: nobody is told."""
        _run("ip", "link", "set", self.link, "down")

    def start(self, command: list[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            process = subprocess.Popen([*self.enter, *command], env=dict(env), stdout=output, stderr=output)
        self.processes.append(process)
        return process

    def start_ray(self, head: Host, env: Mapping[str, str], folder: Path, *options: str) -> None:
        """A Ray node; of the cluster whose head is `head`, which may be this host."""
        where = [f"--port={PORT}", "--head"] if head is self else [f"--address={head.address}:{PORT}"]
        ray = str(Path(sys.executable).parent / "ray")
        command = [ray, "start", *where, f"--node-ip-address={self.address}", "--block", "--include-dashboard=false"]
        command += ["--disable-usage-stats", "--object-store-memory=100000000", *options]
        if head is not self:
            command.remove("--include-dashboard=false")
        self.start(command, env, folder / f"{self.name}.log")


@contextmanager
def network(folder: Path, names: list[str]) -> Iterator[dict[str, Host]]:
    """Hosts of these names on one bridge, where this machine is GATEWAY. All ends with the block, whatever runs on them.

    A host's own name stands for 127.0.1.1 there, as Debian and Ubuntu have it.
    """
    bridge = f"{_prefix()}-net"
    _run("ip", "link", "add", bridge, "type", "bridge")
    hosts: dict[str, Host] = {}
    keepers = []
    try:
        _run("ip", "address", "add", f"{GATEWAY}/24", "dev", bridge)
        _run("ip", "link", "set", bridge, "up")
        for number, name in enumerate(names, 1):
            own = folder / name
            (own / "ray").mkdir(parents=True)
            Path("/tmp/ray").mkdir(exist_ok=True)
            known = [f"{NET}.{n} {other}" for n, other in enumerate(names, 1) if other != name]
            (own / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *known, ""]))
            setup = f"hostname {name}; mount --bind {own}/ray /tmp/ray; mount --bind {own}/hosts /etc/hosts; exec sleep infinity"
            keeper = subprocess.Popen(["unshare", "--net", "--mount", "--uts", "sh", "-ec", setup])
            keepers.append(keeper)
            host = hosts[name] = Host(name, f"{NET}.{number}", keeper.pid)
            _wait_for_namespace(keeper.pid)
            _run("ip", "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", str(keeper.pid))
            _run("ip", "link", "set", host.link, "master", bridge, "up")
            for command in (
                "link set lo up",
                f"address add {host.address}/24 dev eth0",
                "link set eth0 up",
                f"route add default via {GATEWAY}",
            ):
                _run(*host.enter, "ip", *command.split())
        yield hosts
    finally:
        for host in hosts.values():
            _end_all_of(host)
        for keeper in keepers:
            keeper.kill()
            keeper.wait()
        for link in (*(host.link for host in hosts.values()), bridge):  # the kernel takes its time where nobody asks
            subprocess.run(["ip", "link", "del", link], check=False, capture_output=True)


def _prefix() -> str:
    """Of this process's links, so that two test runs do not meet."""
    return f"dpa{os.getpid() % 100_000}"


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"


def _namespace(pid: int | str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _wait_for_namespace(pid: int) -> None:
    """Until the process has gone into its own, and come to its end of the setup."""
    until = time.monotonic() + 20
    while _namespace(pid) == _namespace("self") or b"sleep" not in Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < until, "a host did not come up"
        time.sleep(0.02)


def _end_all_of(host: Host) -> None:
    """SIGKILL to whatever runs in the host's network namespace."""
    with suppress(OSError):
        own = _namespace(host.pid)
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):
                if int(folder.name) != host.pid and _namespace(folder.name) == own:
                    os.kill(int(folder.name), signal.SIGKILL)
    for process in host.processes:
        process.kill()
        process.wait()

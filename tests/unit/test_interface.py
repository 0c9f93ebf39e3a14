"""Do workers find the interface that has Ray's address?"""

from __future__ import annotations

import os
import sys

import pytest
import ray

from dpa_ray.engine import interface


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in interface.VARIABLES:
        monkeypatch.setenv(variable, "")  # so that what is set here is undone
        monkeypatch.delenv(variable)


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are asked for as on Linux")
def test_the_interface_with_an_address_is_named_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interface.interface_of("127.0.0.1") == "lo"
    assert interface.interface_of("203.0.113.77") == ""
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    interface.choose()
    assert [os.environ[variable] for variable in interface.VARIABLES] == ["lo", "lo"]


def test_what_is_set_stays_and_an_unknown_address_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.77")
    interface.choose()
    assert not any(variable in os.environ for variable in interface.VARIABLES)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    interface.choose()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"

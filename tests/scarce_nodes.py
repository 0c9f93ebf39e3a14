"""A provider of nodes for Ray's autoscaler that has not always what is asked for: Ray's own fake nodes (raylets on this
machine), of which some types cannot be had, and all take their time. It writes down what came and went.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import TAG_RAY_USER_NODE_TYPE


class ScarceNodes(FakeMultiNodeProvider):
    """`provider` of the cluster's YAML has `scarce` (types that cannot be had), `boot_s`, and `log`, a file."""

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, float], labels: Any
    ) -> None:
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        if kind in self.provider_config["scarce"]:
            self._note("refused", kind)
            raise RuntimeError(f"InsufficientInstanceCapacity: no {kind}")
        self._note("asked", kind)
        time.sleep(self.provider_config["boot_s"])
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
        for _ in range(count):
            self._note("came", kind)

    def terminate_node(self, node_id: str) -> None:
        kind = self.node_tags(node_id)[TAG_RAY_USER_NODE_TYPE]
        super().terminate_node(node_id)
        self._note("went", kind)

    def _note(self, what: str, kind: str) -> None:
        with Path(self.provider_config["log"]).open("a") as log:
            log.write(json.dumps({"at": time.time(), "what": what, "kind": kind}) + "\n")

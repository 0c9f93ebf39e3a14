"""What is wrong with a manifest, by the fields that Kubernetes and KubeRay know? Strict: a field that is not known is an error.

Kubernetes' own types are lightkube's models, which are made from its API's description. KubeRay's are below, for RayCluster and
RayJob: the fields by the Go types that its CRDs (ray.io/v1, KubeRay 1.7) are generated from, and what its operator refuses
although every field is known, by its validation of a RayCluster's and a RayJob's specification.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import msgspec
from lightkube.models.core_v1 import (
    EnvFromSource,
    EnvVar,
    PodTemplateSpec,
    ResourceRequirements,
    SecurityContext,
    Service,
    ServiceAccount,
    VolumeMount,
)
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.models.networking_v1 import NetworkPolicy

Strings = dict[str, str]


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A string out of these."""

    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Fields:
    """An object with these fields (name -> type), of which some must be there."""

    known: dict[str, Any]
    required: tuple[str, ...] = ()


AUTOSCALER = Fields({
    "resources": ResourceRequirements, "image": str, "imagePullPolicy": OneOf(("Always", "Never", "IfNotPresent")),
    "securityContext": SecurityContext, "idleTimeoutSeconds": int, "upscalingMode": OneOf(("Default", "Aggressive", "Conservative")),
    "version": OneOf(("v1", "v2")), "env": list[EnvVar], "envFrom": list[EnvFromSource], "volumeMounts": list[VolumeMount],
    "command": list[str], "args": list[str],
})  # fmt: skip
MANAGERS = OneOf(("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue"))
AUTH = Fields({"mode": OneOf(("disabled", "token")), "secretName": str, "enableK8sTokenAuth": bool})
GROUP: dict[str, Any] = {
    "template": PodTemplateSpec,
    "rayStartParams": Strings,
    "resources": Strings,
    "labels": Strings,
}
HEAD = Fields(
    {
        **GROUP,
        "headService": Service,
        "enableIngress": bool,
        "serviceType": OneOf(("ClusterIP", "NodePort", "LoadBalancer")),
    },
    ("template",),
)
WORKERS = Fields(
    {**GROUP, "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "idleTimeoutSeconds": int,
     "numOfHosts": int, "priority": int, "suspend": bool,
     "scaleStrategy": Fields({"workersToDelete": list[str]})},
    ("groupName", "minReplicas", "maxReplicas", "template"),
)  # fmt: skip
CLUSTER_SPEC = Fields(
    {"rayVersion": str, "authOptions": AUTH, "enableInTreeAutoscaling": bool, "autoscalerOptions": AUTOSCALER,
     "headGroupSpec": HEAD, "workerGroupSpecs": [WORKERS], "suspend": bool, "managedBy": MANAGERS,
     "headServiceAnnotations": Strings, "upgradeStrategy": Fields({"type": OneOf(("Recreate", "None"))})},
    ("headGroupSpec",),
)  # fmt: skip
JOB_SPEC = Fields({
    "entrypoint": str, "runtimeEnvYAML": str, "jobId": str, "metadata": Strings, "rayClusterSpec": CLUSTER_SPEC,
    "clusterSelector": Strings, "submitterPodTemplate": PodTemplateSpec, "submitterConfig": Fields({"backoffLimit": int}),
    "submissionMode": OneOf(("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")), "backoffLimit": int,
    "activeDeadlineSeconds": int, "ttlSecondsAfterFinished": int, "shutdownAfterJobFinishes": bool, "suspend": bool,
    "entrypointNumCpus": float, "entrypointNumGpus": float, "entrypointResources": str, "managedBy": MANAGERS,
    "preRunningDeadlineSeconds": int,
})  # fmt: skip


def _kind(spec: Any) -> Fields:
    return Fields({"apiVersion": OneOf(("ray.io/v1",)), "kind": str, "metadata": ObjectMeta, "spec": spec}, ("spec",))


KINDS: dict[str, Any] = {
    "RayCluster": _kind(CLUSTER_SPEC), "RayJob": _kind(JOB_SPEC), "ServiceAccount": ServiceAccount, "NetworkPolicy": NetworkPolicy,
}  # fmt: skip


def problems(manifest: dict[str, Any]) -> list[str]:
    """Each with its path; none where all is well."""
    return _check(manifest, KINDS[manifest["kind"]], manifest["kind"])


def refusals(manifest: dict[str, Any]) -> list[str]:
    """What KubeRay's operator says of a RayCluster or RayJob whose fields are all known; none where it would start it."""
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    longest = {"RayCluster": 53, "RayJob": 47}.get(kind)
    if longest is None:
        return []
    spec = manifest["spec"]
    found = [] if len(name) <= longest else [f"{kind} {name}: more than {longest} characters"]
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"{kind} {name}: no DNS label")
    return found + (_of_job(spec) if kind == "RayJob" else _of_cluster(spec))


def _of_job(spec: dict[str, Any]) -> list[str]:
    ends, tries = spec.get("shutdownAfterJobFinishes", False), spec.get("backoffLimit", 0)
    cluster = spec.get("rayClusterSpec", {})
    rules = {
        "suspend without shutdownAfterJobFinishes": spec.get("suspend", False) and not ends,
        "ttlSecondsAfterFinished without shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished", 0) > 0
        and not ends,
        "ttlSecondsAfterFinished below 0": spec.get("ttlSecondsAfterFinished", 0) < 0,
        "neither rayClusterSpec nor clusterSelector": not (cluster or spec.get("clusterSelector")),
        "backoffLimit below 0": tries < 0,
        "backoffLimit with clusterSelector": tries > 0 and bool(spec.get("clusterSelector")),
        "backoffLimit in InteractiveMode": tries > 0 and spec.get("submissionMode") == "InteractiveMode",
        "activeDeadlineSeconds not above 0": spec.get("activeDeadlineSeconds", 1) <= 0,
        "preRunningDeadlineSeconds not above 0": spec.get("preRunningDeadlineSeconds", 1) <= 0,
        "submitter settings in SidecarMode": spec.get("submissionMode") == "SidecarMode"
        and bool({"submitterPodTemplate", "submitterConfig"} & set(spec)),
        "enableK8sTokenAuth of a RayJob": cluster.get("authOptions", {}).get("enableK8sTokenAuth", False),
    }
    return [text for text, broken in rules.items() if broken] + (_of_cluster(cluster) if cluster else [])


def _of_cluster(spec: dict[str, Any]) -> list[str]:
    found = []
    version = tuple(int(part) for part in re.findall(r"\d+", spec.get("rayVersion", ""))[:3])
    if "authOptions" in spec and spec["authOptions"].get("mode", "token") == "token" and version < (2, 52):
        found.append("authOptions.mode token of a rayVersion below 2.52")
    grows = spec.get("enableInTreeAutoscaling", False)
    is_v2 = grows and spec.get("autoscalerOptions", {}).get("version") == "v2"
    if spec.get("autoscalerOptions", {}).get("idleTimeoutSeconds", 0) < 0:
        found.append("autoscalerOptions.idleTimeoutSeconds below 0")
    for group in (spec.get("headGroupSpec", {}), *spec.get("workerGroupSpecs", [])):
        name = group.get("groupName", "head")
        pod, start = group.get("template", {}).get("spec", {}), group.get("rayStartParams", {})
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        rules = {
            "no container": not pod.get("containers"),
            "resources in both rayStartParams and resources": bool(group.get("resources"))
            and bool({"num-cpus", "num-gpus", "memory", "resources"} & set(start)),
            "labels in rayStartParams": "labels" in start,
            "a label that Kubernetes does not take": not all(_is_label(*each) for each in group.get("labels", {}).items()),
            "fewest below 0, or above the most": not 0 <= least <= most,
            "restartPolicy other than Never": is_v2 and pod.get("restartPolicy", "Never") != "Never",
            "suspend of a group that grows": grows and group.get("suspend", False),
            "priority without autoscaler v2 and a rayVersion from 2.56": bool(group.get("priority"))
            and not (is_v2 and version >= (2, 56)),
            "idleTimeoutSeconds without autoscaler v2, or below 0": "idleTimeoutSeconds" in group
            and not (is_v2 and group["idleTimeoutSeconds"] >= 0),
        }  # fmt: skip
        found += [f"{name}: {text}" for text, broken in rules.items() if broken]
    return found


def _is_label(key: str, value: str) -> bool:
    prefix, _, name = key.rpartition("/")
    word = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
    return bool(
        re.fullmatch(word, name)
        and re.fullmatch(f"({word})?", value)
        and re.fullmatch(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?", prefix)
    )


def _check(value: Any, kind: Any, path: str) -> list[str]:
    if isinstance(kind, OneOf):
        return [] if value in kind.values else [f"{path}: expected one of {kind.values}, found {value!r}"]
    if isinstance(kind, Fields):
        return _object(value, kind.known, kind.required, path)
    if isinstance(kind, list):
        return _list(value, kind[0], path)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        fields = msgspec.structs.fields(kind)
        return _object(
            value, {f.encode_name: f.type for f in fields}, tuple(f.encode_name for f in fields if f.required), path
        )
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is list:
        return _list(value, arguments[0], path)
    if origin is dict:
        if not isinstance(value, dict):
            return [f"{path}: expected an object, found {value!r}"]
        return [text for key, each in value.items() for text in _check(each, arguments[1], f"{path}.{key}")]
    if origin is not None:  # X | Y
        each = [_check(value, alternative, path) for alternative in arguments if alternative is not type(None)]
        return [] if [] in each else each[0]
    if kind in (dict, list):
        return [] if isinstance(value, kind) else [f"{path}: expected {kind.__name__}, found {value!r}"]
    if kind in (str, int, bool, float):
        same = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        return [] if same else [f"{path}: expected {kind.__name__}, found {value!r}"]
    return []  # int or string, a quantity, a time


def _list(value: Any, kind: Any, path: str) -> list[str]:
    if not isinstance(value, list):
        return [f"{path}: expected a list, found {value!r}"]
    return [text for i, each in enumerate(value) for text in _check(each, kind, f"{path}[{i}]")]


def _object(value: Any, known: dict[str, Any], required: tuple[str, ...], path: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{path}: expected an object, found {value!r}"]
    found = [f"{path}.{name}: no such field" for name in value if name not in known]
    found += [f"{path}: expected {name}" for name in required if name not in value]
    return found + [
        text for name, each in value.items() if name in known for text in _check(each, known[name], f"{path}.{name}")
    ]

"""What is wrong with a manifest, by the fields that Kubernetes and KubeRay know? Strict: a field that is not known is an error.

Kubernetes' own types are lightkube's models, which are made from its API's description. KubeRay's are below, by the field
reference of its CRDs (ray.io/v1, KubeRay 1.7), for RayCluster and RayJob.
"""

from __future__ import annotations

import dataclasses
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
})  # fmt: skip
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
     "headGroupSpec": HEAD, "workerGroupSpecs": [WORKERS], "suspend": bool, "managedBy": str,
     "headServiceAnnotations": Strings},
    ("headGroupSpec",),
)  # fmt: skip
JOB_SPEC = Fields({
    "entrypoint": str, "runtimeEnvYAML": str, "jobId": str, "metadata": Strings, "rayClusterSpec": CLUSTER_SPEC,
    "clusterSelector": Strings, "submitterPodTemplate": PodTemplateSpec, "submitterConfig": Fields({"backoffLimit": int}),
    "submissionMode": OneOf(("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")), "backoffLimit": int,
    "activeDeadlineSeconds": int, "ttlSecondsAfterFinished": int, "shutdownAfterJobFinishes": bool, "suspend": bool,
    "entrypointNumCpus": float, "entrypointNumGpus": float, "entrypointResources": str, "managedBy": str,
})  # fmt: skip


def _kind(spec: Any) -> Fields:
    return Fields({"apiVersion": OneOf(("ray.io/v1",)), "kind": str, "metadata": ObjectMeta, "spec": spec}, ("spec",))


KINDS: dict[str, Any] = {
    "RayCluster": _kind(CLUSTER_SPEC), "RayJob": _kind(JOB_SPEC), "ServiceAccount": ServiceAccount, "NetworkPolicy": NetworkPolicy,
}  # fmt: skip


def problems(manifest: dict[str, Any]) -> list[str]:
    """Each with its path; none where all is well."""
    return _check(manifest, KINDS[manifest["kind"]], manifest["kind"])


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

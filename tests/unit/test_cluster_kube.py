"""Are the manifests of cluster/kuberay, as kustomize renders them, what Kubernetes, KubeRay and Ray's autoscaler know?"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from tests.kube_fields import problems, refusals
from tests.ray_scheduler import launched

KUBERAY = Path(__file__).resolve().parents[2] / "cluster" / "kuberay"
RENDERED = ("spot", "on-demand", "small")
GIB = {"Gi": 2**30, "Mi": 2**20}

needs_kustomize = pytest.mark.skipif(
    not (shutil.which("kubectl") or shutil.which("kustomize")), reason="kubectl or kustomize renders the overlays"
)


def render(folder: Path) -> list[dict[str, Any]]:
    command = ["kubectl", "kustomize"] if shutil.which("kubectl") else ["kustomize", "build"]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def base() -> list[dict[str, Any]]:
    """The base's own files, as they are written."""
    files = yaml.safe_load((KUBERAY / "base/kustomization.yaml").read_text())["resources"]
    return [each for file in files for each in yaml.safe_load_all((KUBERAY / "base" / file).read_text())]


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [each for each in manifests if each["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return of_kind(base(), "RayCluster")


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[dict[str, Any]]]:
    """overlays/NAME and jobs/NAME -> manifests."""
    return {f"{kind}/{name}": render(KUBERAY / kind / name) for kind in ("overlays", "jobs") for name in RENDERED}


def changed(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    made = copy.deepcopy(manifest)
    place: Any = made
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return made


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def autoscaling(spec: dict[str, Any]) -> dict[str, Any]:
    """What Ray's autoscaler makes of a RayCluster's spec, by its own function; it checks the outcome too."""
    found: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "dpa-ray", "namespace": "dpa-ray"}, "spec": spec}
    )
    return found


def size(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(\w*)", text).groups()  # type: ignore[union-attr]
    return int(number) * GIB.get(unit, 1)


# -- the base, which needs nothing to be read


def test_the_bases_fields_are_known_and_the_operator_takes_them() -> None:
    assert [text for manifest in base() for text in problems(manifest) + refusals(manifest)] == []


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("spec", "authOption"), {}, "RayCluster.spec.authOption: no such field"),
        (("spec", "authOptions", "mode"), "tokens", "spec.authOptions.mode: expected one of"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0, "num-cpus: expected str, found 0"),
        (("spec", "workerGroupSpecs", 0, "priority"), "10", r"workerGroupSpecs\[0\].priority: expected int"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "lifecycle", "prestop"), {}, "prestop: no such"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_found(cluster: dict[str, Any], path: tuple[Any, ...], value: Any, words: str) -> None:
    (text,) = problems(changed(cluster, path, value))
    assert re.search(words, text)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("metadata", "name"), "x" * 54, "more than 53"),
        (("metadata", "name"), "DPA", "no DNS label"),
        (("spec", "rayVersion"), "2.51.0", "authOptions.mode token of a rayVersion below 2.52"),
        (("spec", "headGroupSpec", "resources"), {"CPU": "0"}, "head: resources in both"),
        (("spec", "headGroupSpec", "template", "spec", "restartPolicy"), "Always", "head: restartPolicy"),
        (("spec", "workerGroupSpecs", 0, "rayStartParams", "labels"), "a=b", "gpu-spot: labels in rayStartParams"),
        (("spec", "workerGroupSpecs", 0, "labels", "ray.io/market-type"), "spot or not", "gpu-spot: a label that"),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), 5, "gpu-spot: fewest"),
        (("spec", "workerGroupSpecs", 0, "suspend"), True, "gpu-spot: suspend"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers"), [], "gpu-spot: no container"),
        (("spec", "autoscalerOptions", "version"), "v1", "gpu-spot: priority without autoscaler v2"),
    ],
)
def test_what_the_operator_refuses_is_found(
    cluster: dict[str, Any], path: tuple[Any, ...], value: Any, words: str
) -> None:
    wrong = changed(cluster, path, value)
    assert problems(wrong) == [], "its fields are known"
    assert re.search(words, refusals(wrong)[0])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("metadata", "name"), "x" * 48, "more than 47"),
        (("spec", "shutdownAfterJobFinishes"), False, "ttlSecondsAfterFinished without"),
        (("spec", "backoffLimit"), -1, "backoffLimit below 0"),
        (("spec", "submissionMode"), "InteractiveMode", "backoffLimit in InteractiveMode"),
        (("spec", "submissionMode"), "SidecarMode", "submitter settings in SidecarMode"),
        (("spec", "rayClusterSpec", "authOptions", "enableK8sTokenAuth"), True, "enableK8sTokenAuth of a RayJob"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "idleTimeoutSeconds"), -1, "gpu-spot: idleTimeoutSeconds"),
    ],
)
@needs_kustomize
def test_what_the_operator_refuses_of_a_job_is_found(
    rendered: dict[str, list[dict[str, Any]]], path: tuple[Any, ...], value: Any, words: str
) -> None:
    wrong = changed(of_kind(rendered["jobs/spot"], "RayJob"), path, value)
    assert problems(wrong) == [], "its fields are known"
    assert re.search(words, refusals(wrong)[0])


def test_spot_comes_first_and_on_demand_where_there_is_none(cluster: dict[str, Any]) -> None:
    config = autoscaling(cluster["spec"])
    workers = [{"CPU": 0.5, "GPU": 1.0}] * 8
    assert launched(config, gang=workers) == {"gpu-spot": 1}
    assert launched(config, gang=workers, failed=["gpu-spot"]) == {"gpu-on-demand": 1}
    assert launched(config, tasks=[{"CPU": 1.0}] * 16) == {"cpu-spot": 1}
    assert launched(config) == {}
    assert config["available_node_types"]["headgroup"]["resources"]["CPU"] == 0
    assert config["available_node_types"]["gpu-spot"]["labels"]["ray.io/market-type"] == "spot"


def test_priorities_are_read_by_the_autoscaler_that_is_chosen(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    for group in spec["workerGroupSpecs"]:
        assert (group["replicas"], group["minReplicas"]) == (0, 0)
        capacity = group["groupName"].partition("-")[2]
        assert group["priority"] == {"spot": 10, "on-demand": 5}[capacity]
        pod = group["template"]["spec"]
        assert pod["nodeSelector"] == {"dpa-ray/node": group["groupName"]}
        assert group["labels"]["ray.io/market-type"] == capacity


def test_groups_that_replace_one_another_differ_in_where_they_run_alone(cluster: dict[str, Any]) -> None:
    found = groups(cluster["spec"])
    for kind in ("gpu", "cpu"):
        pods = []
        for capacity in ("spot", "on-demand"):
            group = copy.deepcopy(found[f"{kind}-{capacity}"])
            for key in ("groupName", "priority", "maxReplicas"):
                del group[key]
            pods.append(yaml.safe_dump(group).replace(capacity, "ANY"))
        assert pods[0] == pods[1]


def test_a_pod_has_longer_to_end_than_the_run_to_move_on(cluster: dict[str, Any]) -> None:
    for group in cluster["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        script, seconds = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert script == "/opt/dpa_ray/cluster/kuberay/pre_stop.sh"
        assert 30 <= int(seconds) <= pod["terminationGracePeriodSeconds"] - 20


def test_the_object_store_fits_into_shared_memory_and_that_into_the_pod(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        check_memory(group)


def check_memory(group: dict[str, Any]) -> None:
    """Shared memory counts as the container's."""
    pod = group["template"]["spec"]
    (shm,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == "shm"]
    assert shm["medium"] == "Memory"
    (container,) = pod["containers"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    store, limit = int(group["rayStartParams"]["object-store-memory"]), container["resources"]["limits"]["memory"]
    assert store < size(shm["sizeLimit"]) <= size(limit) / 2
    assert container["resources"]["limits"] == container["resources"]["requests"], (
        "guaranteed: not the first to be evicted"
    )


def test_ray_knows_the_options_that_it_is_started_with(cluster: dict[str, Any]) -> None:
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_pods_run_as_nobody_special(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    accounts = {group["template"]["spec"]["serviceAccountName"] for group in spec["workerGroupSpecs"]}
    assert accounts == {"dpa-ray-worker"}, "only the head may ask Kubernetes for pods"
    assert spec["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "dpa-ray-head"


def test_secrets_are_named_and_not_held(cluster: dict[str, Any]) -> None:
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "dpa-ray-token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        (token,) = [e for e in group["template"]["spec"]["containers"][0]["env"] if e["name"] == "HF_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"] == {"name": "dpa-ray-hf", "key": "token", "optional": True}
    assert not any(manifest["kind"] == "Secret" for manifest in base())


def test_ray_is_reached_by_its_own_pods_the_operator_and_prometheus_alone(cluster: dict[str, Any]) -> None:
    policy = of_kind(base(), "NetworkPolicy")["spec"]
    own = {"matchLabels": {"app.kubernetes.io/part-of": "dpa-ray"}}
    assert policy["podSelector"] == own
    assert policy["policyTypes"] == ["Ingress"]
    inside, operator, prometheus = policy["ingress"]
    assert inside == {"from": [{"podSelector": own}]}
    assert operator["from"][0]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}
    assert operator["ports"] == [{"port": 8265, "protocol": "TCP"}]
    assert prometheus["from"][0]["podSelector"] == {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}
    spec = cluster["spec"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    (port,) = [port["containerPort"] for port in head["ports"] if port["name"] == "metrics"]
    assert prometheus["ports"] == [{"port": port, "protocol": "TCP"}]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"].items() >= own["matchLabels"].items(), (
            "else the policy is not theirs"
        )
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


# -- what kustomize makes of it


@needs_kustomize
def test_every_overlay_and_job_renders_to_what_the_operator_takes(rendered: dict[str, list[dict[str, Any]]]) -> None:
    for name, manifests in rendered.items():
        assert [text for manifest in manifests for text in problems(manifest) + refusals(manifest)] == [], name
        assert {m["metadata"]["namespace"] for m in manifests} == {"dpa-ray"}
        kinds = sorted(m["kind"] for m in manifests)
        main = "RayJob" if name.startswith("jobs/") else "RayCluster"
        assert kinds == sorted(["NetworkPolicy", "ServiceAccount", "ServiceAccount", main])


@needs_kustomize
@pytest.mark.parametrize("name", RENDERED)
def test_a_job_brings_the_cluster_of_its_overlay(name: str, rendered: dict[str, list[dict[str, Any]]]) -> None:
    job, alone = of_kind(rendered[f"jobs/{name}"], "RayJob"), of_kind(rendered[f"overlays/{name}"], "RayCluster")
    assert job["spec"]["rayClusterSpec"] == alone["spec"]
    images = {
        pod["containers"][0]["image"]
        for pod in (
            job["spec"]["submitterPodTemplate"]["spec"], alone["spec"]["headGroupSpec"]["template"]["spec"],
            *(g["template"]["spec"] for g in alone["spec"]["workerGroupSpecs"]),
        )
    }  # fmt: skip
    assert len(images) == 1
    assert not any(image == "dpa_ray" for image in images), "the base says which image"


@needs_kustomize
def test_a_retry_goes_on_with_the_same_run(rendered: dict[str, list[dict[str, Any]]]) -> None:
    from dpa_ray.recipe import load

    for name in RENDERED:
        spec = of_kind(rendered[f"jobs/{name}"], "RayJob")["spec"]
        assert spec["backoffLimit"] > 0
        assert spec["shutdownAfterJobFinishes"] is True
        python, script, recipe, *options = spec["entrypoint"].split()
        assert (python, script) == ("python", "/opt/dpa_ray/jobs/run_dpa.py")
        assert options == ["--name", recipe, "--store", "s3://my-bucket/dpa"], "nothing in it changes from try to try"
        load(recipe)


@needs_kustomize
def test_on_demand_has_no_spot_and_small_has_one_gpu(rendered: dict[str, list[dict[str, Any]]]) -> None:
    from dpa_ray.recipe import load

    spec = of_kind(rendered["overlays/on-demand"], "RayCluster")["spec"]
    assert set(groups(spec)) == {"gpu-on-demand", "cpu-on-demand"}
    assert launched(autoscaling(spec), gang=[{"CPU": 0.5, "GPU": 1.0}] * 8) == {"gpu-on-demand": 1}
    small = of_kind(rendered["overlays/small"], "RayCluster")["spec"]
    for group in small["workerGroupSpecs"]:
        check_memory(group)
    recipe = load("qwen25-1.5b")
    assert launched(autoscaling(small), gang=[{"CPU": 0.5, "GPU": 1.0}] * recipe.cluster.max_workers) == {"gpu-spot": 1}
    assert autoscaling(small)["available_node_types"]["gpu-spot"]["resources"]["GPU"] == 1


@needs_kustomize
def test_kueue_is_a_component_that_suspends(tmp_path: Path, rendered: dict[str, list[dict[str, Any]]]) -> None:
    copied = tmp_path / "kuberay"
    shutil.copytree(KUBERAY, copied)
    file = copied / "jobs/spot/kustomization.yaml"
    file.write_text(file.read_text() + "  - ../../components/kueue\n")
    manifests = render(copied / "jobs/spot")
    assert [text for manifest in manifests for text in problems(manifest) + refusals(manifest)] == []
    job = of_kind(manifests, "RayJob")
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "dpa-ray"}
    assert job["spec"].pop("suspend") is True
    assert job["spec"] == of_kind(rendered["jobs/spot"], "RayJob")["spec"]


# -- what a pod does before it ends


def run_pre_stop(
    folder: Path, *, polls_with_work: int, seconds: int = 60, after_drain: str = ":"
) -> tuple[list[str], int]:
    """(arguments of the drain, seconds slept) of pre_stop.sh with the machine's commands in its place."""
    commands = {
        "python": f'echo "$@" > {folder}/drain; {after_drain}',
        "pgrep": f'echo x >> {folder}/polls; [ "$(wc -l < {folder}/polls)" -le {polls_with_work} ]',
        "sleep": f'echo "$1" >> {folder}/slept',
    }
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(
        [KUBERAY / "pre_stop.sh", str(seconds)], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    slept = folder / "slept"
    return (folder / "drain").read_text().split(), len(slept.read_text().split()) if slept.exists() else 0


def test_a_pod_drains_its_node_and_waits_for_its_work(tmp_path: Path) -> None:
    before = time.time()
    drain, slept = run_pre_stop(tmp_path, polls_with_work=3)
    assert drain[:3] == ["-m", "dpa_ray.cluster.draining", "--message"]
    deadline_s = int(drain[drain.index("--deadline-ms") + 1]) / 1000
    assert before + 59 <= deadline_s <= time.time() + 60
    assert slept == 3


def test_an_idle_pod_waits_for_nothing(tmp_path: Path) -> None:
    assert run_pre_stop(tmp_path, polls_with_work=0)[1] == 0


def test_a_pod_whose_ray_does_not_answer_ends_in_time(tmp_path: Path) -> None:
    begun = time.monotonic()
    run_pre_stop(tmp_path, polls_with_work=100, seconds=1, after_drain="exec /bin/sleep 25")
    assert time.monotonic() - begun < 20

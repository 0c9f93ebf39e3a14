"""Does Ray read cluster/aws.yaml and cluster/gcp.yaml as they are meant: what grows first, what is closed, what is stated?"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config

from tests import image
from tests.ray_scheduler import launched

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
CLOUDS = ("aws", "gcp")
WORKERS = ("gpu_spot", "gpu_on_demand", "cpu_spot", "cpu_on_demand")
RECIPE_WORKERS = [{"CPU": 0.5, "GPU": 1.0}] * 8  # cluster.workers of the 8B recipes, as Ray Train asks for them


def read(cloud: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CLUSTER / f"{cloud}.yaml").read_text())
    return values


@pytest.fixture(scope="module", params=CLOUDS)
def cloud(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def config(cloud: str) -> dict[str, Any]:
    return read(cloud)


@pytest.fixture(scope="module")
def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` makes it of the file: Ray's defaults filled in."""
    made: dict[str, Any] = prepare_config(config)
    return made


def test_ray_accepts_the_file(prepared: dict[str, Any]) -> None:
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert set(types) == {"head", *WORKERS}
    assert all(types[name]["min_workers"] == 0 for name in WORKERS)
    assert sum(types[name]["max_workers"] for name in WORKERS) <= prepared["max_workers"]
    assert 0 < prepared["idle_timeout_minutes"] <= 15


def ec2_problems(node_config: dict[str, Any]) -> str:
    """What is wrong with a node as Ray asks EC2 for it, by botocore's description of that request; empty where all is well."""
    from botocore.session import Session
    from botocore.validate import ParamValidator

    request = {k: v for k, v in node_config.items() if k != "SubnetIds"}
    request |= {"SubnetId": node_config["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}
    shape = Session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report: str = ParamValidator().validate(request, shape).generate_report()
    return report


def test_ec2_knows_what_it_is_asked_for() -> None:
    for name, node in read("aws")["available_node_types"].items():
        assert ec2_problems(node["node_config"]) == "", name
    wrong = {**read("aws")["available_node_types"]["head"]["node_config"], "InstanceTyp": "m7i.large"}
    assert "InstanceTyp" in ec2_problems(wrong)


def test_ray_refuses_a_key_that_is_misspelt(config: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    wrong = prepare_config(config)
    wrong["available_node_types"]["gpu_spot"]["prority"] = 1
    with pytest.raises(ValidationError, match="prority"):
        validate_config(wrong)


def test_no_default_of_rays_installs_anything(prepared: dict[str, Any]) -> None:
    """Ray's own defaults install another Ray, and a client library, on each node."""
    commands = [
        *prepared["initialization_commands"], *prepared["setup_commands"], *prepared["head_setup_commands"],
        *prepared["worker_setup_commands"],
    ]  # fmt: skip
    assert commands == []


def test_spot_comes_first_and_on_demand_where_there_is_none(prepared: dict[str, Any]) -> None:
    assert launched(prepared, gang=RECIPE_WORKERS) == {"gpu_spot": 1}
    assert launched(prepared, gang=RECIPE_WORKERS, failed=["gpu_spot"]) == {"gpu_on_demand": 1}
    assert launched(prepared, gang=RECIPE_WORKERS * 2) == {"gpu_spot": 2}
    assert launched(prepared, tasks=[{"CPU": 1.0}] * 16) == {"cpu_spot": 1}
    assert launched(prepared, tasks=[{"CPU": 1.0}] * 16, failed=["cpu_spot"]) == {"cpu_on_demand": 1}


def test_no_demand_is_no_node(prepared: dict[str, Any]) -> None:
    assert launched(prepared) == {}


def test_a_task_without_a_gpu_never_starts_a_gpu_node(prepared: dict[str, Any]) -> None:
    assert not any("gpu" in name for name in launched(prepared, tasks=[{"CPU": 1.0}] * 150))


def test_spot_machines_are_spot_and_the_others_are_not(cloud: str, config: dict[str, Any]) -> None:
    for name, node in config["available_node_types"].items():
        own = node["node_config"]
        if cloud == "aws":
            is_spot = own.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        else:
            is_spot = own.get("scheduling", {}).get("provisioningModel") == "SPOT"
        assert is_spot == name.endswith("_spot"), name
        if name != "head":
            assert node["labels"]["ray.io/market-type"] == ("spot" if is_spot else "on-demand")


def test_types_that_replace_one_another_differ_in_price_alone(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    for kind in ("gpu", "cpu"):
        spot, other = types[f"{kind}_spot"], types[f"{kind}_on_demand"]
        assert spot["resources"] == other["resources"]
        assert spot["docker"] == other["docker"]
        drop = ("InstanceMarketOptions", "scheduling")
        spot_node, other_node = ({k: v for k, v in t["node_config"].items() if k not in drop} for t in (spot, other))
        assert spot_node == other_node


def test_the_head_does_no_work(config: dict[str, Any]) -> None:
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}
    (start,) = [c for c in config["head_start_ray_commands"] if "ray start" in c]
    assert "--num-cpus=0 --num-gpus=0" in start


def test_nothing_listens_to_the_world(cloud: str, config: dict[str, Any]) -> None:
    assert config["provider"]["use_internal_ips"] is True
    assert "IpPermissions" not in str(config)
    starts = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    hosts = re.findall(r"--dashboard-host=(\S+)", " ".join(starts))
    assert hosts == ["127.0.0.1"], "the head's, and it alone has a dashboard"
    assert not re.search(r"0\.0\.0\.0|--ray-client-server-port", " ".join(starts))
    for node in config["available_node_types"].values():
        own = node["node_config"]
        if cloud == "aws":
            assert own["MetadataOptions"]["HttpTokens"] == "required", "IMDSv2"
            assert own["SecurityGroupIds"]
            assert own["SubnetIds"]
        else:
            assert all("accessConfigs" not in interface for interface in own["networkInterfaces"])


def test_every_node_has_a_role_and_the_head_another_than_workers(cloud: str, config: dict[str, Any]) -> None:
    """Only the head may start and end machines."""
    roles = {}
    for name, node in config["available_node_types"].items():
        own = node["node_config"]
        roles[name] = own["IamInstanceProfile"]["Name"] if cloud == "aws" else own["serviceAccounts"][0]["email"]
    assert len({roles[name] for name in WORKERS}) == 1
    assert roles["head"] != roles["gpu_spot"]


def test_token_auth_is_on_and_the_token_comes_from_the_users_machine(config: dict[str, Any]) -> None:
    assert "--env=RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}


def shared_memory(options: list[str]) -> tuple[int, int]:
    """(/dev/shm, object store) in bytes, as `docker run` and `ray start` are told."""
    text = " ".join(options)
    (shm,), (store,) = re.findall(r"--shm-size=(\d+)g", text), re.findall(r"--env=OBJECT_STORE_BYTES=(\d+)", text)
    return int(shm) * 2**30, int(store)


def test_the_object_store_fits_into_shared_memory(config: dict[str, Any]) -> None:
    """A larger one would go to the disk, silently and at a tenth of the speed."""
    options = {"head": config["docker"]["head_run_options"]}
    for name in WORKERS:
        options[name] = config["available_node_types"][name]["docker"]["worker_run_options"]
    for name, own in options.items():
        shm, store = shared_memory(own)
        assert store < shm, name
    for start in (config["head_start_ray_commands"][1], config["worker_start_ray_commands"][1]):
        assert "--object-store-memory=$OBJECT_STORE_BYTES" in start


def test_options_reach_docker_as_they_are_written(config: dict[str, Any]) -> None:
    """No option has a blank or a sign that the shell takes for its own."""
    for name in WORKERS:
        options = config["docker"]["run_options"] + config["available_node_types"][name]["docker"]["worker_run_options"]
        command = docker_start_cmds(
            "ubuntu",
            "image",
            config["file_mounts"],
            "dpa_ray",
            options,
            "dpa-ray",
            image.environment()["HOME"],
            "docker",
        )
        for option in options:
            assert re.fullmatch(r"--[\w.-]+=[\w.,:/=^-]+", option), option
            assert f" {option} " in command
        assert ":/home/ray/.ray/auth_token " in command  # where Ray looks for it: the home of the image's user


def ray_start_options(command: str) -> dict[str, Any]:
    """What Ray's own command line makes of `command`, which starts no node. Raises: click's error for a wrong option."""
    from ray.scripts.scripts import start

    words = shlex.split(command.partition("ray start")[2].replace("$OBJECT_STORE_BYTES", "2000000000"))
    options: dict[str, Any] = start.make_context("start", words).params
    return options


def test_ray_knows_the_options_that_it_is_started_with(config: dict[str, Any]) -> None:
    head = ray_start_options(config["head_start_ray_commands"][1])
    assert (head["head"], head["num_cpus"], head["num_gpus"]) == (True, 0, 0)
    assert (head["dashboard_host"], head["metrics_export_port"]) == ("127.0.0.1", 8080)
    assert head["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    worker = ray_start_options(config["worker_start_ray_commands"][1])
    assert (worker["head"], worker["address"]) == (False, "$RAY_HEAD_IP:6379")
    assert head["object_store_memory"] == worker["object_store_memory"] == 2_000_000_000


def test_bash_reads_every_command(config: dict[str, Any]) -> None:
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr


def test_workers_watch_for_notices_and_the_head_does_not(cloud: str, config: dict[str, Any]) -> None:
    watcher = f"python -m dpa_ray.cluster.drain_watcher --provider {cloud}"
    assert [watcher in command for command in config["worker_start_ray_commands"]] == [False, False, True]
    assert not any("drain_watcher" in command for command in config["head_start_ray_commands"])

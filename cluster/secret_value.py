"""What is the value of a secret, asked by a machine with the role that its cloud gave it, so that no file needs to hold it?

    export HF_TOKEN="$(python cluster/secret_value.py aws|gcp NAME)"

Prints the value, or nothing with the reason on stderr: a run whose models are open needs none. Exit code 0 in both cases.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import urllib.request

TIMEOUT_S = 10.0


def aws(name: str) -> str:
    """From Secrets Manager, in the region of the environment, with the instance's role. (boto3 does not read AWS_REGION.)"""
    import boto3

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    value: str = boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=name)["SecretString"]
    return value


def gcp(name: str) -> str:
    """The latest version in this project's Secret Manager, with the instance's service account."""
    metadata = f"http://{os.environ.get('GCE_METADATA_HOST', 'metadata.google.internal')}/computeMetadata/v1"
    flavor = {"Metadata-Flavor": "Google"}
    project = _get(f"{metadata}/project/project-id", flavor).decode()
    token = json.loads(_get(f"{metadata}/instance/service-accounts/default/token", flavor))["access_token"]
    api = os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_SECRETMANAGER", "https://secretmanager.googleapis.com/")
    url = f"{api.rstrip('/')}/v1/projects/{project}/secrets/{name}/versions/latest:access"
    answer = json.loads(_get(url, {"Authorization": f"Bearer {token}"}))
    return base64.b64decode(answer["payload"]["data"]).decode()


def _get(url: str, headers: dict[str, str]) -> bytes:
    """The metadata server is the machine's own (http): no proxy can reach it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({} if url.startswith("http://") else None))
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    with opener.open(request, timeout=TIMEOUT_S) as answer:
        body: bytes = answer.read()
    return body


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="secret_value.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cloud", choices=("aws", "gcp"))
    parser.add_argument("name")
    arguments = parser.parse_args(argv)
    try:
        print({"aws": aws, "gcp": gcp}[arguments.cloud](arguments.name))
    except Exception as err:  # whatever it is, the node starts, and a gated model says later that it needs a token
        print(f"no secret {arguments.name}: {type(err).__name__}: {err}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

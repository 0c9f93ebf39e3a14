"""How S3 is reached: endpoint and region from the environment, boto3 clients, Arrow's file system, their limits."""

from __future__ import annotations

import functools
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Literal

from dpa_ray.credentials import has_credentials, without_credentials
from dpa_ray.errors import UserError

ENV_NAMES = (
    "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
)  # fmt: skip
"""What a client is made of: when one of these changes, a new client is made."""

CHECKSUM_NAMES = ("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")
MAX_POOL_CONNECTIONS = 64

Patience = Literal["brief", "quick", "usual", "long"]
# Attempts: (connect s, read s, attempts). botocore waits 0.05 s, doubled each time, at random up to that: 8 attempts
# bridge about 6 s. "brief" is for signs of life, which are no longer any when they are late; "quick" tells a wrong
# endpoint soon; "long" is for copies that the server makes before it answers.
LIMITS: dict[Patience, tuple[float, float, int]] = {
    "brief": (3, 7, 1), "quick": (3, 5, 3), "usual": (5, 30, 8), "long": (5, 900, 3),
}  # fmt: skip
ARROW_CONNECT_S, ARROW_STALLED_S, ARROW_ATTEMPTS = 5, 30, 5  # refused connections: given up after 5-8 s

METADATA_LIMITS = {"metadata_service_timeout": 5, "metadata_service_num_attempts": 3}
"""On EC2, where every process of a node asks its metadata server for the role's credentials as a run starts; botocore's
own 1 s and 1 attempt are for machines that may have none, and stay elsewhere."""
METADATA_URL = "http://169.254.169.254"
FIRMWARE = ("sys_vendor", "bios_vendor", "bios_version")  # "Amazon EC2", or (Xen) a version "4.11.amazon"


def configure_endpoint() -> str | None:
    """The custom S3 server's URL (AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL), or None for AWS itself.

    For a custom server it also sets both clients' checksum settings to `when_required`, unless the user has set them:
    Ceph, rclone and others answer HTTP 411 to the chunked uploads that the default leads to. To be called in each
    process before its first S3 client; making or unpickling a Store does it.
    Raises: UserError where the URL is none.
    """
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return None
    if has_credentials(url):
        raise UserError(
            f"AWS_ENDPOINT_URL: expected an address without user and password, found {without_credentials(url)}; give them "
            "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    scheme, _, host = url.partition("://")
    if scheme not in ("http", "https") or not host.strip("/"):
        raise UserError(f"AWS_ENDPOINT_URL: expected http://HOST[:PORT] or https://HOST[:PORT], found {url!r}")
    for name in CHECKSUM_NAMES:
        os.environ.setdefault(name, "when_required")
    return url.rstrip("/")


def endpoint_name() -> str:
    """The server, for messages."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return f"{url} (AWS_ENDPOINT_URL)" if url else "AWS S3 (AWS_ENDPOINT_URL is not set)"


def _environment() -> tuple[str | None, ...]:
    """What a cached client depends on, with the process: neither client survives a fork."""
    return (str(os.getpid()), *(os.environ.get(name) for name in ENV_NAMES))


def _region(session: Any) -> str:
    # boto3 itself does not read AWS_REGION, Arrow does
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or session.region_name or "us-east-1"


def client(patience: Patience = "usual") -> Any:
    """A boto3 S3 client of this process; threads may share it. Raises: botocore's NoCredentialsError."""
    endpoint = configure_endpoint()
    return _client(patience, endpoint, _environment())


@functools.lru_cache(maxsize=16)
def _client(patience: Patience, endpoint: str | None, env: tuple[str | None, ...]) -> Any:
    import boto3
    from botocore.config import Config
    from botocore.exceptions import NoCredentialsError

    connect_s, read_s, attempts = LIMITS[patience]
    config = Config(
        connect_timeout=connect_s,
        read_timeout=read_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=MAX_POOL_CONNECTIONS,
        s3={"addressing_style": "path"} if endpoint else None,
    )
    session = boto3.session.Session(botocore_session=_patient_session())
    if (
        session.get_credentials() is None
    ):  # a client would keep that; what raises is not cached, and the next call asks anew
        raise NoCredentialsError
    _given.add(env)
    return session.client("s3", endpoint_url=endpoint, region_name=_region(session), config=config)


_given: set[tuple[str | None, ...]] = set()
"""The environments in which this process has had credentials."""


def _patient_session() -> Any:
    """botocore's session, patient with EC2's metadata server as far as the user has not said how."""
    import botocore.session

    session = botocore.session.get_session()
    for name, value in METADATA_LIMITS.items() if on_ec2() else ():
        if f"AWS_{name.upper()}" not in os.environ and name not in session.get_scoped_config():
            session.set_config_variable(name, value)
    return session


def on_ec2() -> bool:
    """Is this a machine that a metadata server may give credentials? By its firmware: nobody is asked."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    return bool(os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")) or _has_amazon_firmware()


@functools.cache
def _has_amazon_firmware() -> bool:
    found = (Path("/sys/devices/virtual/dmi/id") / name for name in FIRMWARE)
    return any("amazon" in path.read_text(errors="replace").lower() for path in found if os.access(path, os.R_OK))


def keys_may_come() -> bool:
    """Of a process that finds no credentials: may it find some later? They were there before, or this machine may have a
    role of which its metadata server does not say now."""
    return _environment() in _given or (on_ec2() and not _has_no_role())


def _has_no_role() -> bool:
    """Does EC2's metadata server say that this machine has no role?"""
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA_URL).rstrip("/")
    timeout_s = METADATA_LIMITS["metadata_service_timeout"]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    try:
        token = urllib.request.Request(f"{base}/latest/api/token", headers=lifetime, method="PUT")  # noqa: S310
        with opener.open(token, timeout=timeout_s) as answer:
            headers = {"X-aws-ec2-metadata-token": answer.read().decode()}
        url = f"{base}/latest/meta-data/iam/security-credentials/"
        opener.open(urllib.request.Request(url, headers=headers), timeout=timeout_s).close()  # noqa: S310
    except urllib.error.HTTPError as err:
        return err.code == 404
    except OSError:
        pass
    return False


def arrow_filesystem(bucket: str) -> Any:
    """Arrow's S3 file system for `bucket`, with the same endpoint and region as `client`."""
    endpoint = configure_endpoint()
    return _arrow_filesystem(bucket if endpoint is None else None, endpoint, _environment())


@functools.lru_cache(maxsize=16)
def _arrow_filesystem(bucket: str | None, endpoint: str | None, _env: tuple[str | None, ...]) -> Any:
    import boto3
    from pyarrow import fs

    options: dict[str, Any] = {}
    if endpoint is not None:
        options["scheme"], _, options["endpoint_override"] = endpoint.partition("://")
    return fs.S3FileSystem(
        region=_region(boto3.session.Session()) if bucket is None else bucket_region(bucket),
        connect_timeout=ARROW_CONNECT_S,
        request_timeout=ARROW_STALLED_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ARROW_ATTEMPTS),
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE"),
        **options,
    )


def bucket_region(bucket: str) -> str:
    """The AWS region that `bucket` is in: boto3 follows AWS's redirect to it by itself, Arrow does not."""
    from botocore.exceptions import ClientError

    s3 = client("quick")
    try:
        answer = s3.head_bucket(Bucket=bucket)
    except ClientError as err:  # the header also comes with 301 and 403
        answer = err.response
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return str(headers.get("x-amz-bucket-region") or s3.meta.region_name)

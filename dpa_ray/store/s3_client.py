"""How S3 is reached: endpoint and region from the environment, boto3 clients, Arrow's file system, their limits."""

from __future__ import annotations

import functools
import os
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
    """A boto3 S3 client of this process; threads may share it."""
    endpoint = configure_endpoint()
    return _client(patience, endpoint, _environment())


@functools.lru_cache(maxsize=16)
def _client(patience: Patience, endpoint: str | None, _env: tuple[str | None, ...]) -> Any:
    import boto3
    from botocore.config import Config

    connect_s, read_s, attempts = LIMITS[patience]
    config = Config(
        connect_timeout=connect_s,
        read_timeout=read_s,
        retries={"mode": "standard", "total_max_attempts": attempts},
        max_pool_connections=MAX_POOL_CONNECTIONS,
        s3={"addressing_style": "path"} if endpoint else None,
    )
    session = boto3.session.Session()
    return session.client("s3", endpoint_url=endpoint, region_name=_region(session), config=config)


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

"""What a failed read or write means to the user: client exceptions turned into one clear message."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from dpa_ray.errors import NoAnswer, Unreachable, UserError
from dpa_ray.outages import told_by_arrow
from dpa_ray.store import gcs_client
from dpa_ray.store.s3_client import endpoint_name, keys_may_come

REMOTE = ("s3://", "gs://")
NOT_FOUND = ("404", "NoSuchKey", "NotFound")
DENIED = ("401", "403", "AccessDenied", "Forbidden", "AllAccessDisabled")
FULL = ("QuotaExceeded", "StorageFull", "XMinioStorageFull", "InsufficientCapacity")
FULL_STATUS = 507
BAD_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")


@contextmanager
def told(where: str, doing: str = "") -> Iterator[None]:
    """Turn what the S3 clients and the operating system raise into errors that name `where` (a URI or local path), and
    what was to be done there ("reading").

    Raises: FileNotFoundError where the file is absent; UserError for everything else that is not our own bug.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as err:
        if err.filename is not None or not where.startswith(REMOTE):
            raise
        raise FileNotFoundError(errno.ENOENT, "no such file", where) from err  # Arrow's own names no URI
    except Exception as err:
        meant = _meaning(where, doing, err)
        if meant is None:
            raise
        raise meant from err


def _meaning(where: str, doing: str, err: Exception) -> Exception | None:
    """The error to raise for `err`; None for what is our own bug."""
    if where.startswith("gs://") and (meant := _gcs(where, doing, err)) is not None:
        return meant
    on_s3 = where.startswith("s3://")
    if on_s3 and (meant := _boto(where, doing, err)) is not None:  # first: some of boto3's are OSErrors too
        return meant
    if isinstance(err, OSError):
        # Arrow's carry no errno; one that has it is about the local file at the other end
        return _arrow(where, doing, str(err)) if on_s3 and err.errno is None else UserError(_local(where, err))
    return None


def _gcs(where: str, doing: str, err: Exception) -> Exception | None:
    """The error for what Cloud Storage's API, or Arrow on its behalf, said; None for what is neither's."""
    server, bucket = gcs_client.endpoint_name(), _bucket(where)
    if isinstance(err, gcs_client.NoAccount):
        return Unreachable(
            f"{where}: no usable account for {server}, bucket {bucket!r} ({err}); give this machine a service account, or "
            "set GOOGLE_APPLICATION_CREDENTIALS"
        )
    if isinstance(err, gcs_client.NoReply) or (isinstance(err, OSError) and told_by_arrow(str(err))):
        reason = _during(str(err).partition(" error_info")[0], doing)
        return NoAnswer(
            f"{where}: no answer from {server} for bucket {bucket!r} ({reason}); "
            "check that it can be reached from this machine"
        )
    if isinstance(err, OSError):
        return UserError(f"{where}: {err} (server: {server}, bucket {bucket!r})") if err.errno is None else None
    if not isinstance(err, gcs_client.Refused):
        return None
    reason = _during(str(err), doing)
    if err.no_bucket:
        return UserError(f"{where}: there is no bucket {bucket!r} at {server}; create it, or name one that exists")
    if err.status == 404:
        return FileNotFoundError(errno.ENOENT, "no such file", where)
    if err.status in (401, 403):
        return UserError(
            f"{where}: {server} refused access to bucket {bucket!r} ({reason}); check that this machine's account may "
            "list, read, write and delete under this address"
        )
    again = err.status in gcs_client.AGAIN
    return (NoAnswer if again else UserError)(f"{where}: {reason} (server: {server}, bucket {bucket!r})")


def _bucket(where: str) -> str:
    return where.partition("://")[2].partition("/")[0]


def no_bucket(where: str) -> UserError:
    return UserError(
        f"{where}: there is no bucket {_bucket(where)!r} at {endpoint_name()}; create it, or name one that exists"
    )


def _during(reason: str, doing: str) -> str:
    return f"{reason}, {doing}" if doing else reason


def _unreachable(where: str, reason: str) -> NoAnswer:
    return NoAnswer(
        f"{where}: no answer from {endpoint_name()} for bucket {_bucket(where)!r} ({reason}); "
        "check that the server runs and can be reached from this machine"
    )


def _no_keys(where: str, why: str = "") -> str:
    reason = f" ({why})" if why else ""
    return (
        f"{where}: no usable credentials for {endpoint_name()}, bucket {_bucket(where)!r}{reason}; set AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role"
    )


def _denied(where: str, reason: str) -> str:
    return (
        f"{where}: {endpoint_name()} refused access to bucket {_bucket(where)!r} ({reason}); "
        "check the credentials, and that they may list, read, write and delete under this address"
    )


def _full(where: str, reason: str) -> UserError:
    return UserError(
        f"{where}: {endpoint_name()} has no room left for bucket {_bucket(where)!r} ({reason}); free some space, or raise "
        "the quota, and start again"
    )


def _local(where: str, err: OSError) -> str:
    hint = {
        errno.ENOSPC: "; free some space, or name another store",
        errno.EDQUOT: "; free some space, or name another store",
        errno.EFBIG: "; raise the limit on file sizes (ulimit -f), or name another store",
        errno.EACCES: "; check who may read and write there",
        errno.EROFS: "; name a store that can be written to",
    }.get(err.errno or 0, "")
    place = str(err.filename) if err.filename is not None and str(err.filename) != where else ""
    return f"{where}: {err.strerror or err}{f' ({place})' if place else ''}{hint}"


def _arrow(where: str, doing: str, text: str) -> UserError:
    """The error for Arrow's OSError, which carries its kind in its text only."""
    if "NO_SUCH_BUCKET" in text or "NoSuchBucket" in text:
        return no_bucket(where)
    if told_by_arrow(text):
        return _unreachable(where, _during(text.rpartition("Details: ")[2], doing))
    if "NETWORK_CONNECTION" in text:
        return UserError(str(_unreachable(where, _during(text.rpartition("Details: ")[2], doing))))
    if "ACCESS_DENIED" in text or "INVALID_ACCESS_KEY_ID" in text or "SIGNATURE_DOES_NOT_MATCH" in text:
        return UserError(_denied(where, _during(text, doing)))
    return UserError(f"{where}: {text} (server: {endpoint_name()}, bucket {_bucket(where)!r})")


def _boto(where: str, doing: str, err: BaseException) -> Exception | None:
    """The error for what boto3 raised; None for what is not boto3's."""
    from boto3.exceptions import Boto3Error
    from botocore import exceptions as botocore

    if isinstance(err, Boto3Error):  # a failed transfer hides its cause
        inner = err.__cause__ or err.__context__
        return (_boto(where, doing, inner) if inner is not None else None) or UserError(f"{where}: {err}")
    if isinstance(err, botocore.ClientError):
        code, status = client_error(err)
        if code == "NoSuchBucket":
            return no_bucket(where)
        if code in NOT_FOUND or status == 404:
            return FileNotFoundError(errno.ENOENT, "no such file", where)
        if code in FULL or status == FULL_STATUS:
            return _full(where, _during(code, doing))
        if code in BAD_KEYS or code in DENIED or status in (401, 403):
            return UserError(_denied(where, _during(code, doing)))
        kind = NoAnswer if status == 429 or status >= 500 else UserError
        return kind(f"{where}: {err} (server: {endpoint_name()}, bucket {_bucket(where)!r})")
    if isinstance(err, botocore.CredentialRetrievalError):  # of what is there to give them
        return NoAnswer(_no_keys(where, str(err)))
    if isinstance(err, botocore.NoCredentialsError | botocore.PartialCredentialsError):
        late = isinstance(err, botocore.NoCredentialsError) and keys_may_come()
        return NoAnswer(_no_keys(where, "what gives them does not answer")) if late else Unreachable(_no_keys(where))
    if isinstance(err, botocore.ConnectionError | botocore.HTTPClientError | botocore.IncompleteReadError):
        trust = ": AWS_CA_BUNDLE names the authorities to trust" if isinstance(err, botocore.SSLError) else ""
        unreachable = _unreachable(where, _during(type(err).__name__ + trust, doing))
        return UserError(str(unreachable)) if trust else unreachable  # a wrong certificate is not a matter of time
    if isinstance(err, botocore.BotoCoreError):
        return UserError(f"{where}: {err} (server: {endpoint_name()}, bucket {_bucket(where)!r})")
    return None


def client_error(err: BaseException) -> tuple[str, int]:
    """(error code, HTTP status) of a boto3 ClientError."""
    response = getattr(err, "response", {})
    return str(response.get("Error", {}).get("Code", "")), int(
        response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    )

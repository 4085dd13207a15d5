"""Write an S3 object only if it does not exist, or only if it is unchanged since it was read.

pyarrow does not offer conditional writes. AWS and SeaweedFS support them.
"""

import logging
import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from infra import storage

if TYPE_CHECKING:
    from botocore.config import Config

logging.getLogger("botocore.credentials").setLevel(logging.WARNING)  # it logs what it found

REFUSED = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
ABSENT = ("NoSuchKey", "404")


def put_if(uri: str, data: bytes, **condition: str) -> str | None:
    """Write if IfNoneMatch or IfMatch holds and return the new ETag; return None if it does not.

    Raises:
        StorageError: The store cannot be used.
    """
    try:
        written = s3_client().put_object(**_place(uri), Body=data, **condition)
    except (ClientError, BotoCoreError) as error:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] in REFUSED:
            return None
        raise storage.StorageError(f"cannot write {uri}: {error}") from error
    return str(written["ETag"])


def get(uri: str) -> dict[str, Any] | None:
    """Return S3's answer (Body, ETag, LastModified, headers), or None if there is no such object.

    Raises:
        StorageError: The store cannot be used.
    """
    try:
        found = s3_client().get_object(**_place(uri))
        return {**found, "Body": found["Body"].read()}
    except (ClientError, BotoCoreError) as error:
        if isinstance(error, ClientError) and error.response["Error"]["Code"] in ABSENT:
            return None
        raise storage.StorageError(f"cannot read {uri}: {error}") from error


def _place(uri: str) -> dict[str, str]:
    bucket, _, key = storage.absolute(uri).removeprefix(storage.S3_SCHEME).partition("/")
    return {"Bucket": bucket, "Key": key}


def open_client(patience: "Config") -> Any:
    """Open a client of the S3 store that the environment names, with keys read anew."""
    import boto3

    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    # A separate session, because the default one keeps the first keys that it saw.
    return boto3.Session().client(
        "s3",
        endpoint_url=os.environ.get("AWS_ENDPOINT_URL") or None,
        region_name=region,
        config=patience,
    )


def s3_client() -> Any:
    names = (
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
    )
    return _client_of(*(os.environ.get(name) or None for name in names))


@lru_cache(maxsize=4)
def _client_of(*_settings: str | None) -> Any:
    from botocore.config import Config

    # No request may last so long that others consider a lease stale.
    return open_client(
        Config(connect_timeout=3, read_timeout=10, retries={"total_max_attempts": 2})
    )

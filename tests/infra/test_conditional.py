import io
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from infra import conditional
from infra.conditional import get, put_if
from infra.storage import StorageError

URI = "s3://mae/runs/a/lease"


class FakeS3:
    """Answers each request with an error, or with the next ETag."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.requests: list[dict[str, Any]] = []

    def put_object(self, **request: Any) -> dict[str, Any]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        return {"ETag": '"tag"'}

    def get_object(self, **request: Any) -> dict[str, Any]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        return {"ETag": '"tag"', "Body": io.BytesIO(b"held")}


def answer(code: str) -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": "no"}}, "Request")


def use(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> FakeS3:
    monkeypatch.setattr(conditional, "s3_client", lambda: fake)
    return fake


def test_a_write_sends_the_bytes_under_its_condition(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = use(FakeS3(), monkeypatch)
    assert put_if(URI, b"x", IfNoneMatch="*") == '"tag"'
    wanted = {"Bucket": "mae", "Key": "runs/a/lease", "Body": b"x", "IfNoneMatch": "*"}
    assert fake.requests == [wanted]


@pytest.mark.parametrize("code", ["PreconditionFailed", "412", "ConditionalRequestConflict", "409"])
def test_a_condition_that_does_not_hold_is_no_error(
    code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(FakeS3(answer(code)), monkeypatch)
    assert put_if(URI, b"x", IfMatch='"old"') is None


@pytest.mark.parametrize(
    "error", [answer("AccessDenied"), EndpointConnectionError(endpoint_url="http://127.0.0.1:1")]
)
def test_a_store_that_cannot_be_used_is_named(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(FakeS3(error), monkeypatch)
    with pytest.raises(StorageError, match=f"cannot write {URI}"):
        put_if(URI, b"x", IfNoneMatch="*")
    with pytest.raises(StorageError, match=f"cannot read {URI}"):
        get(URI)


def test_an_object_comes_with_its_bytes_and_its_etag(monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeS3(), monkeypatch)
    assert get(URI) == {"ETag": '"tag"', "Body": b"held"}


@pytest.mark.parametrize("code", ["NoSuchKey", "404"])
def test_an_object_that_does_not_exist_is_none(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(FakeS3(answer(code)), monkeypatch)
    assert get(URI) is None


def test_a_client_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "first")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    first = conditional.s3_client()
    assert conditional.s3_client() is first
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "second")
    second = conditional.s3_client()
    assert second is not first
    assert second._request_signer._credentials.access_key == "second"

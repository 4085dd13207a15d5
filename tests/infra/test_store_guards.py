"""Without a key, no port of the object store reads or writes anything."""

import http.client
from contextlib import closing
from urllib.parse import urlsplit

import grpc
import pytest

from infra import services, storage

SECRET = b"a picture that is nobody else's"
# Reading and writing by way of S3, the filer, the master and a volume server.
PATHS = (
    "/data",
    "/data/private.txt",
    "/buckets/data/private.txt",
    "/buckets/data/",
    "/etc/",
    "/dir/assign",
    "/dir/lookup?volumeId=1",
    "/dir/lookup?fileId=1,01637037d6",
    "/submit",
    "/col/delete?collection=data",
    "/1,01637037d6",
    "/admin/assign_volume?volume=9",
)
CALLS = (
    "/filer_pb.SeaweedFiler/ListEntries",
    "/filer_pb.SeaweedFiler/DeleteEntry",
    "/master_pb.Seaweed/Assign",
    "/volume_server_pb.VolumeServer/ReadAllNeedles",
    "/iam_pb.SeaweedIdentityAccessManagement/ListUsers",
)


@pytest.fixture
def first_port(object_store_env: dict[str, str], s3: None) -> int:
    storage.write_bytes("s3://data/private.txt", SECRET)
    port = urlsplit(object_store_env["AWS_ENDPOINT_URL"]).port
    assert port is not None
    return port


@pytest.mark.services
def test_http_without_a_key_reads_and_writes_nothing(first_port: int) -> None:
    told = {}
    for port in range(first_port, first_port + services.NUM_S3_PORTS):
        for method in ("GET", "PUT", "POST", "DELETE"):
            for path in PATHS:
                with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as server:
                    server.request(method, path, b"overwritten")
                    response = server.getresponse()
                    body = response.read()
                assert SECRET not in body
                told[port, method, path] = response.status
    # Refused, or no such page. A volume server's 204 answers a question of no consequence.
    assert {key: status for key, status in told.items() if status < 400} == {}
    assert storage.read_bytes("s3://data/private.txt") == SECRET


@pytest.mark.services
def test_grpc_without_the_certificate_is_refused(first_port: int) -> None:
    first = first_port + services.GRPC_OFFSET
    for port in range(first, first + services.NUM_S3_PORTS):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            for call in CALLS:
                with pytest.raises(grpc.RpcError) as caught:
                    list(channel.unary_stream(call)(b"", timeout=20))
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

"""Reads are right even if the network between us and a real S3 server is bad."""

import logging
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from infra import patience, storage
from infra.storage import StorageError
from mae_core.data.order import RunOrder
from pipelines import prepare
from pipelines.config.prepare import PrepareConfig
from pipelines.reading import shards
from pipelines.reading.sequence import SequencePlan, read_window
from pipelines.reading.shards import open_shards
from tests.infra.fault_proxy import FaultProxy

pytestmark = [pytest.mark.services, pytest.mark.timeout(120)]

OBJECT = "s3://data/faults/object"
CONTENT = random.Random(0).randbytes(2**20)
# What a network or a server does; a flipped byte is for checksums to find.
NETWORK = ("500", "503", "429", "reset", "cut", "hang", "slow")

MakeProxy = Callable[..., FaultProxy]


@pytest.fixture(scope="module")
def stored_object(object_store_env: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_store_env.items():
            patch.setenv(name, value)
        storage.write_bytes(OBJECT, CONTENT)


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 1)
    monkeypatch.setattr(patience, "READ_BACKOFF_MAX_S", 0.2)
    storage._s3_filesystem.cache_clear()
    yield
    # Its clients are not for other tests.
    storage._s3_filesystem.cache_clear()


@pytest.fixture
def make_proxy(
    object_store_env: dict[str, str],
    s3: None,
    stored_object: None,
    short_waits: None,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[MakeProxy]:
    """Put a proxy between this process and the S3 server."""
    with ExitStack() as stack:

        def make(*kinds: str, rate: float, seed: int = 0) -> FaultProxy:
            upstream = object_store_env["AWS_ENDPOINT_URL"]
            proxy = stack.enter_context(FaultProxy(upstream, rate=rate, kinds=kinds, seed=seed))
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            return proxy

        yield make


def wrong_reads(num_reads: int) -> list[tuple[int, int]]:
    """Read ranges with 8 threads and return those whose bytes are wrong."""
    draw = random.Random(1)
    starts = [draw.randrange(len(CONTENT)) for _ in range(num_reads)]
    # Also shorter than the text of an error, which pyarrow then does not recognize.
    ranges = [(start, start + draw.choice([1, 9, 100, 5_000, 50_000])) for start in starts]
    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda part: storage.read_range(OBJECT, *part), ranges))
    expected = [CONTENT[start:stop] for start, stop in ranges]
    return [ranges[i] for i in range(num_reads) if contents[i] != expected[i]]


def test_without_faults_nothing_is_asked_twice(make_proxy: MakeProxy) -> None:
    proxy = make_proxy(*NETWORK, rate=0.0)
    assert wrong_reads(50) == []
    assert proxy.injected.total() == 0
    assert proxy.requests["GET /data/faults/object"] == 50


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_each_read_is_right_at_any_rate_of_faults(rate: float, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(*NETWORK, rate=rate, seed=9)
    assert wrong_reads(200) == []
    assert set(proxy.injected) == set(NETWORK)
    assert storage.read_bytes(OBJECT) == CONTENT


def test_a_stream_is_right_at_any_rate_of_faults(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "STREAM_BUFFER_BYTES", 2**16)
    proxy = make_proxy("500", "reset", "cut", "short", rate=0.4)
    with storage.open_stream(OBJECT) as stream:
        assert b"".join(iter(lambda: stream.read(10_000), b"")) == CONTENT
    assert set(proxy.injected) == {"500", "reset", "cut", "short"}


def test_a_short_read_is_a_fault_and_read_again(
    make_proxy: MakeProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """Test that we notice: pyarrow returns it at full length, with memory contents at its end."""
    proxy = make_proxy("short", rate=0.4)
    with caplog.at_level(logging.WARNING, logger="infra.patience"):
        assert wrong_reads(50) == []
    assert proxy.injected["short"] > 20
    assert "reading s3://data/faults/object, try 1 failed: SHORT_READ" in caplog.messages[0]


@pytest.mark.parametrize("byte", [b"U", b"\xaa"])
def test_a_byte_that_equals_the_mark_of_a_short_read_is_no_fault(
    byte: bytes, make_proxy: MakeProxy
) -> None:
    proxy = make_proxy("short", rate=0.0)
    at = CONTENT.index(byte)
    assert storage.read_range(OBJECT, at, at + 1) == byte
    assert proxy.requests["GET /data/faults/object"] <= 2


def test_reading_past_the_end_is_no_fault(make_proxy: MakeProxy) -> None:
    proxy = make_proxy("cut", rate=0.0)
    end = len(CONTENT)
    assert storage.read_range(OBJECT, end - 10, end + 10) == CONTENT[-10:]
    assert storage.read_range(OBJECT, end, end + 10) == b""
    assert storage.read_range(OBJECT, end + 5, end + 10) == b""
    assert proxy.requests["GET /data/faults/object"] == 1


def test_a_client_does_not_run_out_of_retries(make_proxy: MakeProxy) -> None:
    """Under AwsStandardS3RetryStrategy it does, after 100, for as long as the process lives."""
    proxy = make_proxy("503", rate=0.3)

    def read(start: int) -> bytes:
        with storage.open_random(OBJECT) as file:
            file.seek(start)
            return file.read(1000)

    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(read, range(0, 400_000, 1000)))
    assert b"".join(contents) == CONTENT[:400_000]
    assert proxy.injected["503"] > 120


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("500", "INTERNAL_FAILURE"),
        ("503", "SERVICE_UNAVAILABLE"),
        ("429", "SLOW_DOWN"),
        ("reset", "NETWORK_CONNECTION.*reset by peer"),
        ("cut", "NETWORK_CONNECTION.*partial file"),
        ("hang", "NETWORK_CONNECTION.*Timeout was reached"),
        ("short", "SHORT_READ"),
    ],
)
@pytest.mark.parametrize("read", [storage.read_bytes, lambda uri: storage.read_range(uri, 5, 999)])
def test_a_fault_that_stays_is_an_error_in_bounded_time(
    kind: str,
    cause: str,
    read: Callable[[str], bytes],
    make_proxy: MakeProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patience, "READ_TRIES", 4)
    proxy = make_proxy(kind, rate=1.0)
    started_at_s = time.monotonic()
    message = rf"cannot read {OBJECT}: .*{cause}.*gave up after 4 tries"
    with pytest.raises(StorageError, match=message):
        read(OBJECT)
    assert time.monotonic() - started_at_s < 15
    # curl itself sends a request again when a connection that it had kept open is reset.
    # And a short read is looked at twice.
    assert 4 <= proxy.injected[kind] <= (8 if kind in ("reset", "short") else 4)


@pytest.mark.parametrize(("kind", "cause"), [("403", "denied access"), ("404", "NO_SUCH_KEY")])
def test_what_cannot_pass_is_asked_once(kind: str, cause: str, make_proxy: MakeProxy) -> None:
    proxy = make_proxy(kind, rate=1.0)
    with pytest.raises(StorageError, match=f"cannot read {OBJECT}: .*{cause}"):
        storage.read_range(OBJECT, 0, 1000)
    assert proxy.injected == {kind: 1}


def test_a_missing_object_is_looked_for_once(make_proxy: MakeProxy) -> None:
    proxy = make_proxy("500", rate=0.0)
    with pytest.raises(FileNotFoundError, match="s3://data/faults/none: it does not exist"):
        storage.read_bytes("s3://data/faults/none")
    assert proxy.requests["HEAD /data/faults/none"] == 1
    assert proxy.requests["GET /data/faults/none"] == 0


def test_refused_keys_are_tried_once(
    make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = make_proxy("500", rate=0.0)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="refused the secret"):
        storage.read_bytes(OBJECT)
    assert proxy.requests["HEAD /data/faults/object"] == 1
    assert proxy.requests["GET /data/faults/object"] == 0


def test_the_proxy_lets_writes_through_and_flips_one_byte(make_proxy: MakeProxy) -> None:
    proxy = make_proxy("flip", rate=1.0)
    storage.write_bytes("s3://data/faults/written", CONTENT)
    data = storage.read_bytes("s3://data/faults/written")
    assert [i for i in range(2**20) if data[i] != CONTENT[i]] == [2**19]
    assert proxy.injected == {"flip": 1}


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_every_sample_of_two_epochs_arrives_once_whatever_the_network_does(
    rate: float, make_proxy: MakeProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flipped bytes too: the packed shards have checksums."""
    config = PrepareConfig(
        synthetic="shapes",
        output="s3://data/faulty",
        img_size=16,
        num_train=120,
        num_val=10,
        samples_per_shard=25,
        workers=1,
    )
    prepare.run(config, fresh=False)
    shards._index.cache_clear()
    manifest = open_shards("s3://data/faulty/train", "/nowhere")
    proxy = make_proxy(*NETWORK, "short", "flip", rate=rate, seed=3)
    order = RunOrder(manifest.counts, seed=0, window=16, num_samples=240)
    plan = SequencePlan(manifest.shards, order, 0, 8)
    blocks = [block for w in range(order.num_windows) for block in read_window(plan, w)]
    rows = [
        row for b in blocks for row in b.select(["position", "epoch", "key", "error"]).to_pylist()
    ]
    assert [row["error"] for row in rows if row["error"]] == []
    assert [row["position"] for row in rows] == list(range(240))
    assert len({(row["epoch"], row["key"]) for row in rows}) == 240
    assert proxy.injected["flip"] > 0

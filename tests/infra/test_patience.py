import io
import logging

import pytest
import tenacity

from infra import patience
from infra.patience import ObjectStream, fill_patiently, patiently

CONTENT = bytes(range(256))


class ShortReads(io.BytesIO):
    """Behaves as pyarrow does on S3: reports full reads, but leaves out the end of some."""

    def __init__(self, content: bytes, num_short: int) -> None:
        super().__init__(content)
        self.num_short = num_short
        self.num_reads = 0

    def size(self) -> int:
        return len(self.getvalue())

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.num_reads += 1
        piece = self.read(len(buffer))
        if self.num_short > 0:
            self.num_short -= 1
            piece = piece[: len(piece) // 2]
        buffer[: len(piece)] = piece
        return len(buffer)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda _: None)


@pytest.mark.parametrize(
    "text",
    [
        "AWS Error NETWORK_CONNECTION",
        "SLOW_DOWN",
        "HTTP status 429",
        "HTTP status 503",
        "SHORT_READ",
    ],
)
def test_an_error_that_may_pass_is_tried_again(text: str, caplog: pytest.LogCaptureFixture) -> None:
    tries: list[int] = []

    def action() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise OSError(text)
        return "read"

    with caplog.at_level(logging.WARNING):
        assert patiently("s3://b/k", action) == "read"
    assert [record.getMessage() for record in caplog.records] == [
        f"reading s3://b/k, try 1 failed: {text}",
        f"reading s3://b/k, try 2 failed: {text}",
    ]


@pytest.mark.parametrize(
    "error", [OSError("HTTP status 404"), OSError("ACCESS_DENIED"), ValueError("SLOW_DOWN")]
)
def test_an_error_that_stays_is_raised_at_once(error: Exception) -> None:
    tries: list[int] = []

    def action() -> None:
        tries.append(1)
        raise error

    with pytest.raises(type(error)) as raised:
        patiently("s3://b/k", action)
    assert raised.value is error
    assert len(tries) == 1


def test_after_so_many_tries_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "READ_TRIES", 4)
    tries: list[int] = []

    def action() -> None:
        tries.append(1)
        raise OSError("SLOW_DOWN")

    with pytest.raises(OSError, match="SLOW_DOWN; gave up after 4 tries"):
        patiently("s3://b/k", action)
    assert len(tries) == 4


@pytest.mark.parametrize("last", [0x55, 0xAA, 0x00])
def test_a_whole_read_is_taken_whatever_its_last_byte_is(last: int) -> None:
    file = ShortReads(bytes([1, 2, last]), num_short=0)
    buffer = bytearray(3)
    fill_patiently("s3://b/k", file, 0, memoryview(buffer))
    assert bytes(buffer) == bytes([1, 2, last])
    assert file.num_reads <= 2


def test_a_short_read_is_seen_and_read_again() -> None:
    file = ShortReads(CONTENT, num_short=5)
    buffer = bytearray(100)
    fill_patiently("s3://b/k", file, 50, memoryview(buffer))
    assert bytes(buffer) == CONTENT[50:150]


def test_an_empty_range_asks_for_nothing() -> None:
    file = ShortReads(CONTENT, num_short=0)
    fill_patiently("s3://b/k", file, 0, memoryview(bytearray()))
    assert file.num_reads == 0


def test_a_stream_gives_the_object_in_order_and_ends() -> None:
    stream = ObjectStream("s3://b/k", ShortReads(CONTENT, num_short=3))
    pieces = [stream.read(100) for _ in range(4)]
    assert [len(piece or b"") for piece in pieces] == [100, 100, 56, 0]
    assert b"".join(piece or b"" for piece in pieces) == CONTENT

import errno
import io
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from infra import storage
from infra.shard_spec import expand_shards
from infra.storage import NoShardsError, StorageError


def make_shards(root: str, *names: str) -> None:
    for name in names:
        storage.write_bytes(storage.join(root, name), b"shard")


def test_what_was_written_is_read_back(root: str) -> None:
    uri = storage.join(root, "deep", "er", "file.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_range(uri, 2, 5) == b"234"
    assert storage.read_range(uri, 8, 99) == b"89"
    assert storage.file_size(uri) == 10
    with storage.open_random(uri) as file:
        file.seek(7)
        assert file.read(2) == b"78"


def test_a_second_write_replaces_the_first(root: str) -> None:
    uri = storage.join(root, "file")
    storage.write_bytes(uri, b"a long first version")
    storage.write_bytes(uri, b"short")
    assert storage.read_bytes(uri) == b"short"


def test_a_stream_serves_tarfile(root: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("a.jpg", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"jpg"))
    uri = storage.join(root, "train.tar")
    storage.write_bytes(uri, buffer.getvalue())
    with storage.open_stream(uri) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        assert [member.name for member in tar] == ["a.jpg", "b.jpg"]


def test_a_missing_file_is_a_file_not_found_error(root: str) -> None:
    storage.write_bytes(storage.join(root, "here"), b"")
    uri = storage.join(root, "not-here")
    for read in (storage.read_bytes, storage.file_size, storage.open_stream, storage.open_random):
        with pytest.raises(FileNotFoundError, match="not-here"):
            read(uri)


def test_exists_tells_files_and_folders_from_nothing(root: str) -> None:
    storage.write_bytes(storage.join(root, "folder", "file"), b"")
    assert storage.exists(root)
    assert storage.exists(storage.join(root, "folder"))
    assert storage.exists(storage.join(root, "folder", "file"))
    assert not storage.exists(storage.join(root, "folder", "fil"))


def test_listings_are_sorted_and_hold_direct_members_only(root: str) -> None:
    make_shards(root, "b", "a", "z/1", "y/2", "y/x/3")
    assert storage.list_files(root) == ["a", "b"]
    assert storage.list_folders(root) == ["y", "z"]


def test_a_tree_has_the_sizes_of_all_files_below(root: str) -> None:
    storage.write_bytes(f"{root}/tree/a.txt", b"12")
    storage.write_bytes(f"{root}/tree/deep/er/b.txt", b"123")
    found = storage.list_tree(f"{root}/tree")
    assert {name: x.num_bytes for name, x in found.items()} == {"a.txt": 2, "deep/er/b.txt": 3}
    assert all(x.changed_at_ns > 0 for x in found.values())
    assert set(storage.list_tree(f"{root}/tree", deep=False)) == {"a.txt"}
    assert {n: x.num_bytes for n, x in storage.list_tree(f"{root}/tree/a.txt").items()} == {
        "a.txt": 2
    }
    assert storage.list_tree(f"{root}/nowhere") == {}


def test_a_missing_folder_lists_nothing(root: str) -> None:
    assert storage.list_files(root) == []
    assert storage.list_folders(root) == []


def test_a_deleted_folder_is_gone_and_its_neighbour_is_not(root: str) -> None:
    make_shards(root, "step-1/a", "step-1/b/c", "step-10/a")
    storage.delete_folder(storage.join(root, "step-1"))
    storage.delete_folder(storage.join(root, "step-1"))
    assert storage.list_folders(root) == ["step-10"]
    assert storage.list_files(storage.join(root, "step-10")) == ["a"]


@pytest.mark.parametrize("uri", ["s3://mae", "s3://mae/", "/"])
def test_a_whole_bucket_or_disk_is_not_deleted(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Should the guard ever break, nothing is there that this test could delete.
    monkeypatch.setattr(storage, "_local_filesystem", object)
    monkeypatch.setattr(storage, "_s3_filesystem", lambda *_: object())
    with pytest.raises(ValueError, match="not deleted"):
        storage.delete_folder(uri)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "metrics.json")
    storage.write_bytes(uri, b"old")

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(StorageError, match=r"the disk is full .*storage\.root") as caught:
        storage.write_bytes(uri, b"new")
    assert uri in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
    assert storage.read_bytes(uri) == b"old"


def test_a_write_whose_source_breaks_off_leaves_no_part(root: str) -> None:
    def break_off() -> Iterator[bytes]:
        yield b"x" * 6 * 2**20  # more than S3 wants in a part
        raise OSError("the source is gone")

    storage.write_bytes(storage.join(root, "neighbour"), b"")
    with pytest.raises(StorageError, match="the source is gone"):
        storage.write_chunks(storage.join(root, "file"), break_off())
    assert storage.list_files(root) == ["neighbour"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EACCES, "access is denied"),
    ],
)
def test_what_a_disk_says_for_good_is_told_as_that(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=f"{message} .*storage.root") as caught:
        storage.write_bytes(str(tmp_path / "file"), b"")
    assert caught.value.is_lasting


def test_a_new_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    seen: list[bool] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(target.exists()), fsync(fd)))
    storage.write_bytes(str(target), b"data")
    # First the data, without the name; then the folder, with it.
    assert seen == [False, True]


def test_files_are_copied_from_the_command_line(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(str(tmp_path / "source"), "0.tar", "manifest.json", "sub/1.tar")
    assert storage.main(["copy", str(tmp_path / "source"), root]) == 0
    assert storage.list_files(root) == ["0.tar", "manifest.json"]
    assert storage.read_bytes(storage.join(root, "0.tar")) == b"shard"
    assert storage.main(["copy", storage.join(root, "none"), root]) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"copied 2 files to {root}\n"
        "not copied, because they are folders: sub\n"
        f"error: no files in {root}/none\n"
    )


def test_a_copy_that_takes_seconds_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shards(str(tmp_path / "source"), "0.tar", "1.tar")
    monkeypatch.setattr(storage, "TELL_EVERY_S", 0.0)
    monkeypatch.setattr(storage, "COPY_BYTES", 3)
    assert storage.main(["copy", str(tmp_path / "source"), str(tmp_path / "target")]) == 0
    assert (tmp_path / "target" / "1.tar").read_bytes() == b"shard"
    assert capsys.readouterr().err == (
        "copying file 1 of 2, 0 MB so far\n"
        "copying file 1 of 2, 0 MB so far\n"
        "copying file 2 of 2, 0 MB so far\n"
        "copying file 2 of 2, 0 MB so far\n"
        f"copied 2 files to {tmp_path}/target\n"
    )


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "s3:///"])
def test_other_schemes_and_no_bucket_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="s3://"):
        storage.open_filesystem(uri)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/a/../../b", "no meaning"),
        ("s3://bucket/./b", "no meaning"),
        ("s3://bucket/a\0b", "no meaning"),
        ("s3://AKIAKEY:hidden@bucket/b", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_an_address_that_climbs_or_holds_a_key_is_refused(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        storage.absolute(uri)
    assert "hidden" not in str(caught.value)


def test_names_that_no_file_has_are_left_out_of_listings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ["run/a", "run/../evil", "run/sub/../../evil", "run/sub/b"]
    with listing_server(keys) as port:
        set_endpoint(monkeypatch, port)
        assert set(storage.list_tree("s3://data/run")) == {"a", "sub/b"}
        assert ".." not in storage.list_folders("s3://data/run")
    assert "s3://data/run lists '../evil', which is not a file name" in caplog.text


USES: list[Callable[[str], object]] = [
    expand_shards,
    storage.read_bytes,
    storage.open_stream,
    storage.file_size,
    storage.exists,
    storage.list_files,
    storage.list_folders,
    storage.delete_folder,
    lambda uri: storage.write_bytes(uri, b"data"),
]


@pytest.mark.services
@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "refused the secret; check AWS_SECRET_ACCESS_KEY"),
        ("AWS_ACCESS_KEY_ID", "does not know the key; check AWS_ACCESS_KEY_ID"),
    ],
)
@pytest.mark.timeout(20)
def test_wrong_keys_are_told_apart_by_every_function(
    variable: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "wrong")
    for use in USES:
        with pytest.raises(StorageError, match=f"s3://data/train.*{message}"):
            use("s3://data/train")


@pytest.mark.services
@pytest.mark.usefixtures("s3")
@pytest.mark.timeout(20)
def test_a_missing_bucket_is_told_from_an_empty_one_by_every_function() -> None:
    for use in USES:
        with pytest.raises(StorageError, match=r"s3://no-such/train.*there is no bucket 'no-such'"):
            use("s3://no-such/train")
    with pytest.raises(NoShardsError, match="there is no s3://data/no-such"):
        expand_shards("s3://data/no-such")


@pytest.mark.timeout(20)
def test_an_unreachable_endpoint_is_an_error_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_endpoint(monkeypatch, port=9)
    with pytest.raises(StorageError, match=r"127\.0\.0\.1:9 cannot be reached.*AWS_ENDPOINT_URL"):
        expand_shards("s3://data/train")


def test_a_server_that_fails_twice_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with flaky_server(num_failures=2) as port:
        set_endpoint(monkeypatch, port)
        assert storage.read_bytes("s3://data/object") == b"data"


def set_endpoint(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@contextmanager
def listing_server(keys: list[str]) -> Iterator[int]:
    """Serve an S3 whose only bucket lists these keys, whatever the request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            contents = "".join(
                f"<Contents><Key>{key}</Key><Size>1</Size>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                for key in keys
            )
            body = (
                f"<ListBucketResult><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
            )
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def flaky_server(num_failures: int) -> Iterator[int]:
    """Serve an S3 with one object that answers 503 to the first requests."""
    failures_left = num_failures

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal failures_left
            failures_left -= 1
            body = b"" if failures_left >= 0 else b"data"
            self.send_response(503 if failures_left >= 0 else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()

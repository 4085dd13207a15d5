"""What is done of an unfinished file of features is kept, and the file ends up the same."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from mae_core.data.manifest import ShardInfo
from mae_core.data.samples import DataError
from pipelines import embed
from pipelines.config.embed import EmbedConfig
from pipelines.config.sections import ScalingConfig
from pipelines.embed import Piece
from pipelines.reading.shards import open_shards
from pipelines.training.run_folder import Taken
from pipelines.training.stopping import AfterStep, LocalChannel, Phase, Told


class Reader:
    """In the place of the encoder: a feature is the row's number; counts what it was given."""

    batch_size = 2

    def __init__(self, *_: Any) -> None:
        self.seen: list[int] = []
        self.fail_after = 99

    def table(self, path: str, numbered: list[tuple[int, Any]]) -> list[Any]:
        rows = [row for row, _ in numbered]
        if len(self.seen) >= self.fail_after:
            raise MemoryError
        self.seen += rows
        features = [[float(row), 1.0] for row in rows]
        return [embed.feature_table(numbered, path, embed.np.array(features))]


class Ends:
    """Decides what the test says, a decision for each batch."""

    is_asked = False

    def __init__(self, *decisions: AfterStep) -> None:
        self.decisions = list(decisions)

    def agree(self, *, is_due: bool) -> AfterStep:
        return self.decisions.pop(0) if self.decisions else AfterStep.GO_ON


@pytest.fixture
def shard(foreign: Path, tmp_path: Path) -> ShardInfo:
    """Of eight images."""
    return open_shards(str(foreign), str(tmp_path / "index")).shards[2]


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    monkeypatch.setattr(embed, "FeatureReader", Reader)

    def make(*decisions: AfterStep) -> Any:
        monkeypatch.setattr(embed, "StepEnds", lambda *_, **__: Ends(*decisions))
        config = EmbedConfig(init_from="unused", data="unused")
        return embed._Embedder(embed.EmbedJob(config, "", (4, 4), LocalChannel()), [])

    return make


def piece(shard: ShardInfo, folder: Path) -> Piece:
    name = "part-000002-00000000.parquet"
    part = f"{folder}/parts/part-000002-00000000.arrow"
    return Piece(shard, 0, 8, f"{folder}/features/{name}", part)


def test_a_stopped_file_goes_on_where_it_was_and_ends_as_if_never_stopped(
    tmp_path: Path, shard: ShardInfo, embedder: Callable[..., Any]
) -> None:
    whole = piece(shard, tmp_path / "whole")
    assert embedder()._write(whole) == 8

    cut = piece(shard, tmp_path / "cut")
    first = embedder(AfterStep.GO_ON, AfterStep.STOP)
    assert first._write(cut) is None
    assert not Path(cut.uri).exists()
    assert embed._what_is_saved([cut], 16, embed.RunFolder(str(tmp_path / "cut"))) == (
        "after 4 of 16 images; the same command goes on from there"
    )
    second = embedder()
    assert second._write(cut) == 8
    assert (first.reader.seen, second.reader.seen) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert Path(cut.uri).read_bytes() == Path(whole.uri).read_bytes()
    assert pq.read_table(cut.uri)["row"].to_pylist() == list(range(8))
    assert not Path(cut.part_uri).exists()


def test_a_stop_at_the_end_of_a_file_leaves_it_whole(
    tmp_path: Path, shard: ShardInfo, embedder: Callable[..., Any]
) -> None:
    last = embedder(*[AfterStep.GO_ON] * 3, AfterStep.STOP)
    whole = piece(shard, tmp_path)
    assert last._write(whole) == 8
    assert not Path(whole.part_uri).exists()


def test_few_images_that_cannot_be_used_are_counted_and_too_many_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_num_rows", lambda _: 1996)
    data: Any = SimpleNamespace(num_samples=2000)
    pieces: Any = [SimpleNamespace(uri="u")]
    config = EmbedConfig(init_from="unused", data="unused", max_bad_ratio=0.002)
    assert embed._count_bad(config, data, pieces) == 4
    few = EmbedConfig(init_from="unused", data="unused", max_bad_ratio=0.001)
    with pytest.raises(DataError, match="4 of 2000 images can't be used"):
        embed._count_bad(few, data, pieces)


def test_what_is_done_is_kept_by_the_clock_too(
    tmp_path: Path, shard: ShardInfo, embedder: Callable[..., Any]
) -> None:
    cut = piece(shard, tmp_path)
    killed = embedder(AfterStep.GO_ON, AfterStep.SAVE)
    killed.reader.fail_after = 4
    with pytest.raises(MemoryError):
        killed._write(cut)
    assert embed._read_part(cut)[0] == 4


def test_a_file_is_not_begun_after_the_wish_to_stop(
    tmp_path: Path, shard: ShardInfo, embedder: Callable[..., Any]
) -> None:
    late = embedder()
    late.ends.is_asked = True
    assert late._write(piece(shard, tmp_path)) is None
    assert late.reader.seen == []


def test_a_damaged_part_costs_a_warning_and_is_embedded_again(
    tmp_path: Path, shard: ShardInfo, embedder: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    cut = piece(shard, tmp_path)
    embedder(AfterStep.STOP)._write(cut)
    Path(cut.part_uri).write_bytes(b"PAR1 cut")
    again = embedder()
    assert again._write(cut) == 8
    assert again.reader.seen == list(range(8))
    assert "is damaged" in caplog.text


def test_a_single_worker_writes_in_this_process_and_tells_each_file(
    tmp_path: Path, shard: ShardInfo, embedder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder()  # puts the fake reader in place
    told: list[Told] = []
    closed: list[bool] = []
    monkeypatch.setattr(LocalChannel, "tell", lambda _, what: told.append(what))
    monkeypatch.setattr(Ends, "close", lambda _: closed.append(True), raising=False)
    whole = piece(shard, tmp_path)
    config = EmbedConfig(init_from="unused", data="unused")
    job = embed.EmbedJob(config, "", (4, 4), LocalChannel())

    embed._write_missing(job, [whole], embed.RunFolder(str(tmp_path)))

    assert pq.read_table(whole.uri)["row"].to_pylist() == list(range(8))
    assert told == [
        Told(Phase.TRAINING, what="embedding"),
        Told(Phase.TRAINING, 1, 1, "embedding, files"),
        Told(Phase.MEASURING),
    ]
    assert closed == [True]


def test_nothing_saved_is_said() -> None:
    folder = embed.RunFolder("/nowhere")
    assert embed._what_is_saved([], 16, folder) == (
        "before anything was written: the same command starts over"
    )


@pytest.mark.parametrize(("num_workers", "needs_ray"), [(1, False), (2, True)])
def test_only_several_workers_need_ray(
    monkeypatch: pytest.MonkeyPatch, num_workers: int, needs_ray: bool
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    scaling = ScalingConfig(num_workers=num_workers)
    config = EmbedConfig(init_from="unused", data="unused", scaling=scaling)
    assert embed.EmbedRun(config).needs_ray == needs_ray
    taken = Taken(embed.RunFolder("/nowhere", "s"), None)
    assert isinstance(embed._channel(config, taken), LocalChannel) != needs_ray

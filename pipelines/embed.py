#!/usr/bin/env python
"""Write the features of a frozen encoder for a shard set, and find similar images.

    python pipelines/embed.py init_from=CHECKPOINT data=SHARDS
    mae embed search IMAGE init_from=CHECKPOINT data=SHARDS

Nothing is masked. The same command continues with the files that are missing.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the package, not the files beside this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from pipelines.cli import main

    sys.exit(main(["embed", *sys.argv[1:]]))

import io
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from infra import processes, storage, tracking
from mae_core.checkpoint_manifest import WEIGHTS_FILE, CheckpointManifest
from mae_core.data.decode import decode_image
from mae_core.data.manifest import Manifest, ShardInfo
from mae_core.data.pixels import CorruptSampleError, Pixels
from mae_core.data.samples import DataError, Sample
from mae_core.data.transforms import center_crop
from mae_core.evaluation.retrieval import cosine_similarity, retrieval_picture
from pipelines import driver
from pipelines.config.embed import EmbedConfig
from pipelines.downstream.features import FeatureReader, feature_table
from pipelines.job import cluster_address, trains_in_driver
from pipelines.outcome import ConfigError, StageResult
from pipelines.reading.batches import too_many_bad
from pipelines.reading.fingerprints import fingerprint
from pipelines.reading.shards import open_shards, read_rows, read_samples
from pipelines.terminal import progress, worker_logging
from pipelines.training.checkpoints import fetch_manifest
from pipelines.training.init_from import lineage_tags
from pipelines.training.protocol import Identity, Work
from pipelines.training.run import checked, drive
from pipelines.training.run_folder import RunFolder, Taken
from pipelines.training.stopping import AfterStep, Channel, LocalChannel, Phase, StepEnds, Told
from pipelines.training.torch_state import restored_torch

logger = logging.getLogger(__name__)

STAGE = "embed"
NEXT_ROW = b"next_row"  # in the metadata of an unfinished file


class Piece(NamedTuple):
    """The part of a shard that becomes one file."""

    shard: ShardInfo
    start: int
    stop: int
    uri: str
    part_uri: str  # of the unfinished file

    @property
    def name(self) -> str:
        return self.uri.rpartition("/")[2]


class EmbedJob(NamedTuple):
    """Everything that a worker must know."""

    config: EmbedConfig
    init_uri: str
    img_size: tuple[int, int]
    channel: Channel


def run(config: EmbedConfig, *, fresh: bool) -> StageResult:
    """Embed the images that are not embedded yet; with a query, search for the most similar images.

    See `pipelines.training.run.drive`.
    """
    given = {
        "init_from": config.init_from,
        "storage.root": config.storage.root,
        "data": config.data,
        "query": config.query,
    }
    embedding = EmbedRun(checked(config, given))
    result = drive(embedding, fresh=fresh)
    opened = embedding.opened
    if config.query is not None and opened is not None:
        _search(opened.config, opened.job, opened.data, opened.folder)
    return result


class EmbedRun:
    """See `pipelines.training.protocol.Run`."""

    stage = STAGE

    def __init__(self, config: EmbedConfig) -> None:
        self.config = config
        self.needs_ray = not trains_in_driver(config.scaling)
        self.opened: OpenedEmbedding | None = None

    def open(self, folder: RunFolder) -> "OpenedEmbedding":
        config = self.config
        encoder = fetch_manifest(config.init_from)
        img_size = config.img_size or encoder.model.img_size
        if any(side % encoder.model.patch_size for side in img_size):
            raise ConfigError(
                f"img_size={img_size[0]}x{img_size[1]} is not a multiple of "
                f"{encoder.model.patch_size}, the patch_size of init_from={config.init_from}"
            )
        if config.features == "cls" and encoder.model.is_convolutional:
            raise ConfigError(
                f"features=cls: the {encoder.model.encoder} of init_from={config.init_from} has no "
                "class token; set features=mean"
            )
        index_uri = storage.join(folder.index_uri, "data")
        data = open_shards(config.data, index_uri, max_bad_ratio=config.max_bad_ratio)
        job = EmbedJob(config, storage.absolute(config.init_from), img_size, LocalChannel())
        self.opened = OpenedEmbedding(config, folder, data, encoder, job)
        return self.opened


class OpenedEmbedding(NamedTuple):
    """See `pipelines.training.protocol.OpenedRun` and `PlannedRun`: there is nothing to plan."""

    config: EmbedConfig
    folder: RunFolder
    data: Manifest
    encoder: CheckpointManifest
    job: EmbedJob

    @property
    def identity(self) -> Identity:
        config, data = self.config, self.data
        weights = self.encoder.files[WEIGHTS_FILE].sha256[:16]
        return Identity(
            f"{data.digest[:16]}-{weights}",
            inputs={"data": fingerprint(config.data), "init_from": fingerprint(config.init_from)},
            data={"data": (data.digest, str(config.data))},
            tags={
                **driver.run_tags(STAGE, seed="", output=self.folder.uri),
                **lineage_tags(config.init_from, self.encoder),
            },
        )

    def reuse(self, done: StageResult) -> StageResult | None:
        return done._replace(status="reused")

    def plan(self) -> "OpenedEmbedding":
        return self

    def work(self, taken: Taken) -> Work:
        pieces = list(_pieces(self.config, self.data, taken.folder))
        job = self.job._replace(channel=_channel(self.config, taken))
        saved = partial(_what_is_saved, pieces, self.data.num_samples, taken.folder)
        return Work(partial(_write_missing, job, pieces, taken.folder), job.channel, saved)

    def is_kept(self, taken: Taken) -> bool:
        """Return False, because a missing file is a failure of the run."""
        return False

    def finish(
        self, taken: Taken, earlier: StageResult | None, failure: Exception | None
    ) -> StageResult:
        config, data, (folder, run_id) = self.config, self.data, taken
        bad = _count_bad(config, data, list(_pieces(config, data, folder)))
        metrics = {"num_images": float(data.num_samples - bad), "data/left_out": float(bad)}
        tracking.log_final_metrics(config.tracking.uri, run_id, metrics, 0)
        result = StageResult(STAGE, "done", run_id, folder.features_uri, metrics)
        folder.write_result(result)
        return result


def _channel(config: EmbedConfig, taken: Taken) -> Channel:
    """Return the channel to the workers; a single one on this machine needs no Ray for it."""
    if trains_in_driver(config.scaling):
        return LocalChannel()
    # Imported here, as Ray Data below: a single worker is done before they would be imported.
    from pipelines.training.ray_channel import RayChannel

    return RayChannel(taken.start)


def _write_missing(job: EmbedJob, pieces: list[Piece], folder: RunFolder) -> None:
    """Write the files that do not exist yet."""
    there = set(storage.list_files(folder.features_uri))
    missing = [piece for piece in pieces if piece.name not in there]
    logger.info("%d of %d files are to be written", len(missing), len(pieces))
    if missing:
        if trains_in_driver(job.config.scaling):
            written = _written_here(job, missing)
        else:
            written = _written_by_actors(job, missing)
        _follow(job.channel, written, len(missing))


def _what_is_saved(pieces: list[Piece], num_images: int, folder: RunFolder) -> str:
    """Describe, for the user of a run that was stopped, what is saved."""
    whole, begun = (set(storage.list_files(uri)) for uri in (folder.features_uri, folder.parts_uri))
    done = 0
    for piece in pieces:
        if piece.name in whole:
            done += piece.stop - piece.start
        elif piece.part_uri.rpartition("/")[2] in begun:
            done += _read_part(piece)[0] - piece.start
    if done == 0:
        return "before anything was written: the same command starts over"
    return f"after {done} of {num_images} images; the same command goes on from there"


def _written_here(job: EmbedJob, missing: list[Piece]) -> Iterator[Mapping[str, int]]:
    """Write the files in this process, without Ray (docs/adr/0032)."""
    processes.note_working(threading.current_thread())
    with restored_torch(job.config.scaling):
        embedder = _Embedder(job, missing)
        try:
            for number in range(len(missing)):
                written = embedder({"number": [number]})
                yield {name: values[0] for name, values in written.items()}
        finally:
            embedder.ends.close()


def _written_by_actors(job: EmbedJob, missing: list[Piece]) -> Iterator[Mapping[str, int]]:
    """Write the files in as many of Ray's processes as there are workers."""
    import ray.data

    from pipelines.reading.sequence import configure_ray_data

    worker_logging.quiet_ray()  # Ray Data has set its own level when it was imported
    configure_ray_data()
    config = job.config
    numbers = ray.data.from_items([{"number": i} for i in range(len(missing))])
    written = numbers.repartition(len(missing)).map_batches(
        _Embedder,
        fn_constructor_args=(job, missing),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=config.scaling.num_workers),
        num_cpus=config.scaling.cpus_per_worker,
        num_gpus=1 if config.scaling.use_gpu else 0,
        # On one machine, an actor that is lost has run out of memory, and would again. On a cluster
        # its node may have been lost, and Ray starts the actor on another one.
        max_restarts=0 if cluster_address() is None else -1,
    )
    yield from written.iter_rows()


def _follow(channel: Channel, written: Iterable[Mapping[str, int]], total: int) -> None:
    """Report the progress after each file that a worker has written or left unfinished."""
    for number, row in enumerate(written, start=1):
        if row["is_whole"]:
            if not progress.shows_bar():
                logger.info("file %d of %d: %d images", number, total, row["num_images"])
            channel.tell(Told(Phase.TRAINING, number, total, "embedding, files"))
    channel.tell(Told(Phase.STOPPED if channel.is_asked() else Phase.MEASURING))


def _count_bad(config: EmbedConfig, data: Manifest, pieces: list[Piece]) -> int:
    """Count the images that can't be used.

    Raises:
        DataError: more than `max_bad_ratio`.
    """
    num_written = sum(_num_rows(piece.uri) for piece in pieces)
    bad = data.num_samples - num_written
    if too_many_bad(bad, data.num_samples, config.max_bad_ratio):
        raise DataError(
            f"{bad} of {data.num_samples} images can't be used, more than max_bad_ratio="
            f"{config.max_bad_ratio:g}; the workers' log names them"
        )
    return bad


def _pieces(config: EmbedConfig, data: Manifest, folder: RunFolder) -> Iterator[Piece]:
    for number, shard in enumerate(data.shards):
        for start in range(0, shard.num_samples, config.rows_per_file):
            stop = min(start + config.rows_per_file, shard.num_samples)
            name = f"part-{number:06d}-{start:08d}.parquet"
            uri = storage.join(folder.features_uri, name)
            part_uri = storage.join(folder.parts_uri, name.replace(".parquet", ".arrow"))
            yield Piece(shard, start, stop, uri, part_uri)


def _num_rows(uri: str) -> int:
    return int(pq.read_metadata(io.BytesIO(storage.read_bytes(uri))).num_rows)


class _Embedder:
    """A worker, which holds the encoder and writes one file for each piece."""

    def __init__(self, job: EmbedJob, pieces: list[Piece]) -> None:
        self.reader = FeatureReader(job.config, job.init_uri, job.img_size)
        self.pieces = pieces
        self.channel = job.channel
        self.ends = StepEnds(
            job.channel, every_minutes=job.config.checkpoint.every_minutes, rank=0, world_size=1
        )

    def __call__(self, batch: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
        if self.channel.told().phase is Phase.STARTING:
            self.channel.tell(Told(Phase.TRAINING, what="embedding"))
        counts = [self._write(self.pieces[int(number)]) for number in batch["number"]]
        return {
            "num_images": [0 if count is None else count for count in counts],
            "is_whole": [count is not None for count in counts],
        }

    def _write(self, piece: Piece) -> int | None:
        """Write the piece's file; if the run stops first, store what is done and return None."""
        if self.ends.is_asked:
            return None
        begin, tables = _read_part(piece)
        for start in range(begin, piece.stop, self.reader.batch_size):
            stop = min(start + self.reader.batch_size, piece.stop)
            rows = read_samples(piece.shard, start, stop)
            numbered = [(start + i, row) for i, row in enumerate(rows) if isinstance(row, Sample)]
            tables += self.reader.table(piece.shard.path, numbered)
            decision = self.ends.agree(is_due=False)
            if decision is not AfterStep.GO_ON and stop < piece.stop:
                _write_part(piece, stop, tables)
            if decision is AfterStep.STOP and stop < piece.stop:
                return None
        table = _whole(tables)
        storage.write_bytes(piece.uri, _parquet(table))
        storage.delete_file(piece.part_uri)
        return len(table)


# An unfinished file holds what a run keeps when it is stopped, and at intervals.


def _write_part(piece: Piece, stop: int, tables: list[pa.Table]) -> None:
    """Keep the rows of a piece up to `stop`."""
    table = _whole(tables).replace_schema_metadata({NEXT_ROW: str(stop)})
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    storage.write_bytes(piece.part_uri, buffer.getvalue())


def _read_part(piece: Piece) -> tuple[int, list[pa.Table]]:
    """Return the row to continue from, and the features of the rows before it."""
    try:
        table = pa.ipc.open_file(storage.read_bytes(piece.part_uri)).read_all()
        row = int(table.schema.metadata[NEXT_ROW])
    except FileNotFoundError:
        return piece.start, []
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); its images are embedded again", piece.part_uri, error)
        return piece.start, []
    return row, [table.replace_schema_metadata(None)] if len(table) else []


def _whole(tables: list[pa.Table]) -> pa.Table:
    """Join tables into one chunk, so that the file's bytes do not show where a run was stopped."""
    joined = pa.concat_tables(tables) if tables else feature_table([], "", np.zeros((0, 1)))
    return joined.combine_chunks()


def _parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


# Searching for similar images


def _search(config: EmbedConfig, job: EmbedJob, data: Manifest, folder: RunFolder) -> None:
    """Print the images that are most similar to the query, and draw them."""
    assert config.query is not None
    reader = FeatureReader(job.config, job.init_uri, job.img_size)
    try:
        query_bytes = storage.read_bytes(config.query)
        query = decode_image(query_bytes, reader.manifest.model.in_chans)
    except (FileNotFoundError, CorruptSampleError) as error:
        raise ConfigError(f"{config.query}: {error}") from error
    (feature,) = reader.features([center_crop(query, job.img_size)])
    wanted = config.num_neighbours + 1  # the query may be one of them
    best: list[tuple[float, dict[str, Any]]] = []
    for name in storage.list_files(folder.features_uri):
        content = storage.read_bytes(storage.join(folder.features_uri, name))
        table = pq.read_table(io.BytesIO(content))
        if not len(table):
            continue
        width = table.schema.field("feature").type.list_size
        flat = table["feature"].combine_chunks().flatten().to_numpy()
        alike = cosine_similarity(flat.reshape(-1, width), feature)
        for place in np.argsort(-alike)[:wanted]:
            row = {c: table[c][int(place)].as_py() for c in ("shard", "row", "key", "label")}
            best.append((float(alike[place]), row))
        best = sorted(best, key=lambda item: -item[0])[:wanted]
    shards = {shard.path: shard for shard in data.shards}
    pictures: list[Pixels] = []
    captions: list[str] = []
    for similarity, row in best:
        (sample,) = read_rows(shards[row["shard"]], row["row"], row["row"] + 1)
        if sample.image == query_bytes:
            logger.info("%s in %s is the query itself: left out", row["key"], row["shard"])
            continue
        if len(pictures) == config.num_neighbours:
            break
        pictures.append(decode_image(sample.image, reader.manifest.model.in_chans))
        label = "" if row["label"] is None else f", {_class_name(row['label'], data.classes)}"
        captions.append(f"{row['key'][-18:]}\n{similarity:.3f}{label}")
        logger.info("%.3f  %s  %s%s", similarity, row["shard"], row["key"], label)
    title = f"{config.run_name}: most like {Path(config.query).name}, by cosine"
    picture = retrieval_picture(query, pictures, captions, title)
    uri = folder.write_picture_file(f"search-{Path(config.query).stem}", picture)
    logger.info("picture: %s", uri)


def _class_name(label: str, classes: Sequence[str] | None) -> str:
    """Return the manifest's name for a class, or its number."""
    text = label.strip()
    is_named = classes is not None and text.isdecimal() and int(text) < len(classes)
    return classes[int(text)] if classes is not None and is_named else f"class {text}"

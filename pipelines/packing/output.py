"""The output folder of packed images: which plan it belongs to, and what is finished."""

from typing import Any, NamedTuple

from infra import storage
from infra.own_files import read_own
from mae_core.data.image_files import ImageFile
from mae_core.data.manifest import MANIFEST_NAME, Manifest, parse_manifest
from pipelines.outcome import ConfigError
from pipelines.packing.shard import CATEGORIES_NAME, STATE_FOLDER, ShardPlan, Transcode, json_bytes

SKIPPED_NAME = "skipped.jsonl"
PLAN_NAME = "plan.json"


class SetPlan(NamedTuple):
    """Everything that determines the bytes of one folder of shards."""

    output: str
    shards: tuple[ShardPlan, ...]
    classes: tuple[str, ...] | None
    in_chans: int
    transcode: Transcode | None
    facts: dict[str, int | str]  # facts that a person would compare, and the digest of everything
    categories: tuple[tuple[int, str], ...] = ()  # category_id and name, of the boxes

    @property
    def num_items(self) -> int:
        return sum(len(shard.items) for shard in self.shards)

    @property
    def counts(self) -> tuple[int, int]:
        """Number of shards and number of images."""
        return len(self.shards), self.num_items

    @property
    def source_bytes(self) -> int:
        items = (item for shard in self.shards for item in shard.items)
        return sum(item.packed_bytes for item in items if isinstance(item, ImageFile))

    @property
    def digest(self) -> str:
        return str(self.facts["digest"])


def claim_output(plan: SetPlan, *, fresh: bool) -> None:
    """Write the plan's facts into the output, or check them against those of an earlier run."""
    place = storage.join(plan.output, STATE_FOLDER, PLAN_NAME)
    if fresh:
        _clear_output(plan.output)
    if storage.exists(place):
        old = read_own(place, dict[str, Any], "start over with --fresh") or {}
        if old == plan.facts:
            return
        changed = [name for name in plan.facts if old.get(name) != plan.facts[name]]
        shown = [f"{name}: {old.get(name)} -> {plan.facts[name]}" for name in changed[:-1]]
        raise ConfigError(
            f"output={plan.output} was packed from other images or with another config "
            f"({', '.join(shown) or 'the files differ'}); choose another output, or replace it "
            "with --fresh"
        )
    names = storage.list_files(plan.output)
    alien = [name for name in names if name.endswith(".tar") or name == MANIFEST_NAME]
    if alien:
        raise ConfigError(
            f"output={plan.output} has shards from another source, such as {alien[0]}; "
            "choose another output"
        )
    storage.write_bytes(place, json_bytes(plan.facts))


def _clear_output(output: str) -> None:
    """Delete what an earlier run packed, and nothing else."""
    names, folders = storage.list_files(output), storage.list_folders(output)
    packed = STATE_FOLDER in folders
    alien = [n for n in names if not n.startswith(".") and not (packed and _is_ours(n))]
    alien += [name for name in folders if name != STATE_FOLDER]
    if alien:
        raise ConfigError(
            f"--fresh: output={output} has files that `mae prepare` did not write, such as "
            f"{alien[0]}; move them away, or choose another output"
        )
    if packed:
        storage.delete_folder(output)


def _is_ours(name: str) -> bool:
    return name.endswith((".tar", ".index.npy")) or name in {
        MANIFEST_NAME,
        SKIPPED_NAME,
        CATEGORIES_NAME,
    }


def finished_manifest(plan: SetPlan) -> Manifest | None:
    """Return the manifest of a finished earlier run whose shards all still exist.

    `pack_shard` checks whether the images are still those that were packed.
    """
    place = storage.join(plan.output, MANIFEST_NAME)
    names = set(storage.list_files(plan.output))
    if MANIFEST_NAME not in names:
        return None
    manifest = parse_manifest(storage.read_bytes(place), place)
    for shard in manifest.shards:
        if not {shard.path, shard.index} <= names:
            return None
        if storage.file_size(storage.join(plan.output, shard.path)) != shard.num_bytes:
            return None
    return manifest

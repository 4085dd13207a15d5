"""What `init_from` means: each place gives a checkpoint, named by its contents."""

import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from infra import storage
from mae_core.checkpoint import load_encoder, save_weights
from mae_core.checkpoint_manifest import CheckpointRecord, CorruptCheckpointError, read_manifest
from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.interchange.fair import fair_state_dict
from mae_core.model.family import build_encoder
from mae_core.model.mae import build_mae
from pipelines.config.downstream import ClassifyConfig
from pipelines.config.embed import EmbedConfig
from pipelines.config.loading import load_config
from pipelines.config.pretrain import PretrainConfig
from pipelines.outcome import ConfigError, StageResult
from pipelines.pretrain import check_init_from
from pipelines.reading.fingerprints import fingerprint
from pipelines.training.checkpoints import fetch_manifest
from pipelines.training.init_from import lineage_tags, locate, run_of, with_weights
from pipelines.training.run_folder import RunFolder, RunRecord

MICRO = ModelConfig(encoder="vit_micro", img_size=(16, 16), patch_size=8)


def encoder_weights(seed: int = 0, in_chans: int = 3) -> dict[str, torch.Tensor]:
    """Return the weights of timm's names, with a trained position table."""
    torch.manual_seed(seed)
    encoder = build_encoder(MICRO.model_copy(update={"in_chans": in_chans}))
    return {**encoder.state_dict(), "pos_embed": torch.randn(1, 5, 192)}


def write_own(folder: Path, *, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    record = CheckpointRecord(
        step=7,
        samples_seen=7,
        epoch=1,
        total_steps=7,
        seed=0,
        data_digest="d",
        channel_mean=(0.1, 0.2, 0.3),
        channel_std=(0.4, 0.5, 0.6),
        model=MICRO,
        masking=MaskingConfig(),
        loss=LossConfig(),
    )
    weights = {f"encoder.{k}": x for k, x in build_encoder(MICRO).state_dict().items()}
    save_weights(folder, record, weights)
    return folder


def write_run(
    root: Path, name: str, *, age_s: float, finished: bool = True, config: Any = None
) -> Path:
    """Write the folder of a pretraining run and return its checkpoint."""
    uri = root / "pretrain" / name
    checkpoint = write_own(uri / "checkpoints/step-00000007")
    changed = (checkpoint / "manifest.json").stat().st_mtime - age_s
    os.utime(checkpoint / "manifest.json", (changed, changed))
    folder = RunFolder(str(uri))
    folder.write_record(RunRecord(data_digest="d", run_id=f"id-{name}", config=config or {}))
    if finished:
        folder.write_result(StageResult("pretrain", "done", None, str(checkpoint), {}))
    return checkpoint


def embed(root: Path, init_from: object, **values: Any) -> EmbedConfig:
    return EmbedConfig.model_validate(
        {"init_from": str(init_from), "data": "/d", "storage": {"root": str(root)}, **values}
    )


def test_a_file_is_taken_over_once_and_named_by_its_contents(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    torch.save(encoder_weights(), tmp_path / "a.pth")
    config = with_weights(embed(tmp_path, tmp_path / "a.pth"))
    assert Path(config.init_from).parent == tmp_path / "imported"
    encoder, manifest = load_encoder(Path(config.init_from))
    assert "positions" in encoder.state_dict()
    assert manifest.channel_mean == (0.485, 0.456, 0.406)
    assert manifest.origin is not None
    assert (manifest.origin.file, manifest.origin.format) == ("a.pth", "timm")
    assert "a.pth: timm, vit_micro in patches of 8, 3 channels; taken over as" in caplog.text
    assert "ImageNet's are used" in caplog.text
    assert "Its positions are trained" in caplog.text

    # Moved or copied: the same run. And nothing is read by torch again.
    (tmp_path / "a.pth").rename(tmp_path / "b.pth")
    monkeypatch.setattr(torch, "load", None)
    caplog.clear()
    assert with_weights(embed(tmp_path, tmp_path / "b.pth")).init_from == config.init_from
    assert "Its positions are trained" in caplog.text  # said each time


def test_other_contents_under_the_same_name_size_and_time_are_other_weights(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save(encoder_weights(0), file)
    before, times = embed(tmp_path, file), file.stat()
    first, first_print = with_weights(before), fingerprint(str(file))
    torch.save(encoder_weights(1), file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size
    assert with_weights(before).run_name != first.run_name
    assert fingerprint(str(file)) != first_print


def test_weights_taken_over_anew_by_other_versions_are_the_same(tmp_path: Path) -> None:
    torch.save(encoder_weights(), tmp_path / "a.pth")
    uri = Path(with_weights(embed(tmp_path, tmp_path / "a.pth")).init_from)
    before, manifest = fingerprint(str(uri)), read_manifest(uri)
    kept = {k: getattr(manifest, k) for k in CheckpointRecord.model_fields}
    weights = {f"encoder.{k}": x for k, x in load_encoder(uri)[0].state_dict().items()}
    origin = manifest.origin
    assert origin is not None
    kept["origin"] = origin.model_copy(update={"file": "another name"})
    save_weights(uri, CheckpointRecord(**kept), weights)
    assert fingerprint(str(uri)) == before


def test_a_copy_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    torch.save(encoder_weights(), tmp_path / "a.pth")
    uri = Path(with_weights(embed(tmp_path, tmp_path / "a.pth")).init_from)
    (uri / "model.safetensors").write_bytes(b"cut")
    with_weights(embed(tmp_path, tmp_path / "a.pth"))
    load_encoder(uri)


def test_statistics_and_channels_that_the_config_gives(tmp_path: Path) -> None:
    torch.save(encoder_weights(), tmp_path / "a.pth")
    plain = with_weights(embed(tmp_path, tmp_path / "a.pth"))
    grey = with_weights(embed(tmp_path, tmp_path / "a.pth", in_chans=1))
    given = {"channel_mean": (0.5, 0.5, 0.5), "channel_std": (0.25, 0.25, 0.25)}
    other = with_weights(embed(tmp_path, tmp_path / "a.pth", **given))
    assert len({plain.init_from, grey.init_from, other.init_from}) == 3
    manifest = fetch_manifest(grey.init_from)
    assert manifest.channel_mean == pytest.approx((0.449,))
    assert manifest.model.in_chans == 1
    assert manifest.origin is not None
    assert "The first convolution takes 3 channels: it is summed for 1." in manifest.origin.notes
    assert fetch_manifest(other.init_from).channel_std == (0.25, 0.25, 0.25)
    assert other.run_name != plain.run_name


def test_our_checkpoint_is_taken_as_it_is_unless_the_run_asks_for_other_channels(
    tmp_path: Path,
) -> None:
    own = write_own(tmp_path / "own")
    assert with_weights(embed(tmp_path, own)).init_from == str(own)
    assert with_weights(embed(tmp_path, own / "model.safetensors")).init_from == str(own)
    uri = with_weights(embed(tmp_path, own, in_chans=4)).init_from
    manifest = fetch_manifest(uri)
    assert manifest.channel_mean == (0.1, 0.2, 0.3, 0.1)
    assert (manifest.step, manifest.data_digest) == (7, "d")
    assert manifest.origin is not None
    assert manifest.origin.format == "checkpoint of ours"


def test_pretraining_asks_for_the_channels_of_its_model(tmp_path: Path) -> None:
    torch.save(encoder_weights(), tmp_path / "a.pth")
    words = [
        "data.train=t",
        f"init_from={tmp_path / 'a.pth'}",
        "model.in_chans=2",
        f"storage.root={tmp_path}",
    ]
    config = with_weights(load_config(PretrainConfig, [], words, {}))
    assert config.init_from is not None
    assert fetch_manifest(config.init_from).model.in_chans == 2


@pytest.mark.parametrize("name", ["resnet18", "convnextv2_atto"])
def test_a_convolutional_encoder_of_timm_is_taken_and_fitted_to_grey_images(
    tmp_path: Path, name: str
) -> None:
    weights = timm.create_model(name, num_classes=0).state_dict()
    torch.save(weights, tmp_path / "a.pth")
    uri = with_weights(embed(tmp_path, tmp_path / "a.pth", in_chans=1)).init_from
    manifest = fetch_manifest(uri)
    assert (manifest.model.encoder, manifest.model.in_chans) == (name, 1)
    encoder, _ = load_encoder(Path(uri))
    grey = torch.rand(1, 1, 32, 32)
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(weights)
    expected = theirs.forward_features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder.eval().feature_map(grey), expected, atol=1e-4, rtol=1e-4)


def test_a_decoder_of_another_kind_is_refused_and_another_share_of_predictions_is_not(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    decoder = DecoderConfig(kind="cross_attention", dim=32, depth=1, num_heads=2)
    model = MICRO.model_copy(update={"decoder": decoder})
    mae = build_mae(model, MaskingConfig(), LossConfig())
    own = write_own(tmp_path / "own")
    record = read_manifest(own)
    fields = {name: getattr(record, name) for name in CheckpointRecord.model_fields}
    save_weights(own, CheckpointRecord(**{**fields, "model": model}), mae.state_dict())
    words = ["data.train=t", f"init_from={own}", f"storage.root={tmp_path}"]
    words += ["model.encoder=vit_micro", "model.patch_size=8", "model.decoder.dim=32"]
    words += ["model.decoder.depth=1", "model.decoder.num_heads=2"]
    config = with_weights(load_config(PretrainConfig, [], words, {}))
    told = r"was trained with model\.decoder\.kind=cross_attention, this run has transformer"
    with pytest.raises(ConfigError, match=told):
        check_init_from(config)
    more = ["model.decoder.kind=cross_attention", "model.decoder.prediction_ratio=0.25"]
    config = with_weights(load_config(PretrainConfig, [], [*words, *more], {}))
    assert check_init_from(config) == read_manifest(own)


def test_a_vit_does_not_start_from_a_convolutional_encoder(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18", num_classes=0).state_dict(), tmp_path / "a.pth")
    words = ["data.train=t", f"init_from={tmp_path / 'a.pth'}", f"storage.root={tmp_path}"]
    config = with_weights(load_config(PretrainConfig, [], [*words, "model.encoder=vit_nano"], {}))
    told = r"was trained with model\.encoder=resnet18, this run has vit_nano"
    with pytest.raises(ConfigError, match=told):
        check_init_from(config)
    more = ["model.encoder=resnet18", "model.patch_size=8"]
    config = with_weights(load_config(PretrainConfig, [], [*words, *more], {}))
    told = r"was trained with model\.patch_size=32, this run has 8"
    with pytest.raises(ConfigError, match=told):
        check_init_from(config)


def test_pretraining_says_what_it_draws_anew_and_refuses_another_encoder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    own = write_own(tmp_path / "own")
    words = ["data.train=t", f"init_from={own}", f"storage.root={tmp_path}"]
    fits = ["model.encoder=vit_micro", "model.patch_size=8", "model.decoder.dim=64"]
    config = with_weights(load_config(PretrainConfig, [], [*words, *fits], {}))
    assert check_init_from(config) == read_manifest(own)
    assert "has no decoder; a new one starts from random weights" in caplog.text
    assert "the optimizer is new, the steps count from 0" in caplog.text
    with pytest.raises(ConfigError, match=r"model.encoder=vit_micro, this run has vit_base"):
        check_init_from(with_weights(load_config(PretrainConfig, [], words, {})))


def test_the_heads_of_a_decoder_whose_file_does_not_say_them_are_the_users(tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = DecoderConfig(dim=64, depth=1, num_heads=4)
    model = MICRO.model_copy(update={"decoder": decoder})
    torch.save(
        {"model": fair_state_dict(build_mae(model, MaskingConfig(), LossConfig()))},
        tmp_path / "a.pth",
    )
    words = ["data.train=t", f"init_from={tmp_path / 'a.pth'}", f"storage.root={tmp_path}"]
    words += ["model.encoder=vit_micro", "model.patch_size=8", "model.decoder.dim=64"]
    words += ["model.decoder.depth=1", "model.decoder.num_heads=4"]
    manifest = check_init_from(with_weights(load_config(PretrainConfig, [], words, {})))
    assert manifest is not None
    assert manifest.decoder_present


def test_the_newest_finished_run_is_found_by_run_latest_or_its_name(tmp_path: Path) -> None:
    write_run(tmp_path, "cars-00000001", age_s=30)
    second = write_run(tmp_path, "cars-00000002", age_s=20)
    third = write_run(tmp_path, "cats-00000003", age_s=10)
    write_run(tmp_path, "cars-00000004", age_s=0, finished=False)
    found = {
        given: with_weights(embed(tmp_path, given)).init_from
        for given in ("run:latest", "run:cars", "run:cats-00000003")
    }
    assert found == {
        "run:latest": str(third),
        "run:cars": str(second),
        "run:cats-00000003": str(third),
    }


@pytest.mark.parametrize("given", ["run:dogs", "run:", "run:car", "run:../x", "run:cars-00000004"])
def test_a_run_that_is_not_there_or_not_finished_is_said(tmp_path: Path, given: str) -> None:
    write_run(tmp_path, "cars-00000001", age_s=30)
    write_run(tmp_path, "cars-00000004", age_s=0, finished=False)
    with pytest.raises(ConfigError, match=f"init_from={given}: no finished pretraining run named"):
        with_weights(embed(tmp_path, given))


def test_a_command_does_not_start_from_its_own_result(tmp_path: Path) -> None:
    first = write_run(tmp_path, "a-00000001", age_s=20)
    words = ["data.train=t", "init_from=run:latest", f"storage.root={tmp_path}"]
    config = load_config(PretrainConfig, [], words, {})
    config = config.model_copy(update={"model": MICRO})
    resolved = with_weights(config)
    assert resolved.init_from == str(first)
    own = write_run(tmp_path, "a-00000002", age_s=0, config=resolved.model_dump(mode="json"))
    assert with_weights(config).init_from == str(first)
    # Another command does.
    other = config.model_copy(update={"seed": 1})
    assert with_weights(other).init_from == str(own)


def test_lineage_names_the_weights_their_file_and_the_run_that_made_them(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, "cars-00000001", age_s=0)
    tags = lineage_tags(str(checkpoint), fetch_manifest(str(checkpoint)))
    assert tags["pretrained.run_id"] == "id-cars-00000001"
    assert tags["pretrained.step"] == "7"
    torch.save(encoder_weights(), tmp_path / "a.pth")
    uri = with_weights(embed(tmp_path, tmp_path / "a.pth")).init_from
    tags = lineage_tags(uri, fetch_manifest(uri))
    assert tags["pretrained.file"] == "a.pth"
    assert len(tags["pretrained.file_sha256"]) == 64
    assert run_of(uri) is None


def test_what_is_no_weights_is_said_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("a text")
    with pytest.raises(CorruptCheckpointError, match=r"a.pth: is neither a safetensors file"):
        with_weights(embed(tmp_path, tmp_path / "a.pth"))
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "b.pth")
    with pytest.raises(ConfigError, match=r"b.pth: patch_embed.proj.weight: missing"):
        with_weights(embed(tmp_path, tmp_path / "b.pth"))
    with pytest.raises(ConfigError, match=r"nor weights from elsewhere"):
        locate(str(tmp_path / "nothing"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"only local paths and s3:// are supported"):
        locate("https://example.org/a.pth", str(tmp_path))
    torch.save(encoder_weights(in_chans=5), tmp_path / "c.pth")
    with pytest.raises(ConfigError, match=r"in_chans=3: the weights take 5 channels"):
        with_weights(embed(tmp_path, tmp_path / "c.pth", in_chans=3))


def test_a_pipeline_names_the_stage_and_not_run_latest() -> None:
    with pytest.raises(ConfigError, match=r"run:latest: is looked for under storage.root, .*stage"):
        fingerprint("run:latest")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"channel_mean": [0.5]}, "give both or none"),
        ({"channel_mean": [0.5], "channel_std": [0]}, "deviations above 0"),
        ({"channel_mean": [0.5], "channel_std": [1], "in_chans": 3}, "1 values for in_chans=3"),
        ({"in_chans": 0}, "in_chans"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(Path("/r"), "x", **values)


def test_a_run_without_these_fields_keeps_its_name() -> None:
    config = ClassifyConfig.model_validate(
        {"init_from": "/c", "data": {"train": "/a", "val": "/b"}}
    )
    dump = config.model_dump(mode="json")
    assert (dump["in_chans"], dump["channel_mean"], dump["channel_std"]) == (None, None, None)
    assert storage.absolute(config.init_from) == "/c"

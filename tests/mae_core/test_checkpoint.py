import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mae_core import checkpoint as checkpoint_module
from mae_core import checkpoint_manifest
from mae_core.checkpoint import load_encoder, load_training_state, load_weights, save_checkpoint
from mae_core.checkpoint_manifest import (
    CheckpointRecord,
    CorruptCheckpointError,
    read_manifest,
    verify_checkpoint,
)
from mae_core.config import DecoderConfig, LossConfig, MaskingConfig, ModelConfig
from mae_core.model.mae import build_mae

FILES = ["manifest.json", "model.safetensors", "training_state.safetensors"]


class Pair(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, width)
        self.decoder = nn.Sequential(nn.Linear(width, 3), nn.LayerNorm(3))

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


def make_record(**changes: Any) -> CheckpointRecord:
    fields: dict[str, Any] = {
        "step": 3,
        "samples_seen": 24,
        "epoch": 0.25,
        "total_steps": 12,
        "seed": 7,
        "data_digest": "d1",
        "channel_mean": (0.5, 0.25, 0.125),
        "channel_std": (0.2, 0.3, 0.1),
        "model": ModelConfig(
            encoder="vit_micro",
            img_size=(16, 32),
            patch_size=8,
            decoder=DecoderConfig(dim=32, depth=1, num_heads=2),
        ),
        "masking": MaskingConfig(mask_ratio=0.5),
        "loss": LossConfig(norm_pix=False),
    }
    return CheckpointRecord(**{**fields, **changes})


def make_optimizer(model: nn.Module, *, reverse: bool = False) -> torch.optim.AdamW:
    """Decay matrices only, in two groups, as in pretraining."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    if reverse:
        groups = [{**group, "params": group["params"][::-1]} for group in groups[::-1]]  # type: ignore[index]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(images) - images).square().mean().backward()
        optimizer.step()


def make_run() -> tuple[Pair, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = Pair()
    optimizer = make_optimizer(model)
    train(model, optimizer, range(3))
    return model, optimizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, optimizer = make_run()
    save_checkpoint(tmp_path / "ckpt", make_record(), model=model, optimizer=optimizer)
    return tmp_path / "ckpt"


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change fields and update the manifest's own checksum, as a faulty program would."""
    path = folder / "manifest.json"
    fields = json.loads(path.read_text())
    del fields["manifest_sha256"]
    change(fields)
    sealed = {**fields, "manifest_sha256": checkpoint_manifest.fields_sha256(fields)}
    path.write_text(json.dumps(sealed))


def test_a_checkpoint_is_three_files(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == FILES


def test_the_manifest_says_what_was_saved(folder: Path) -> None:
    manifest = verify_checkpoint(folder)
    assert CheckpointRecord(**{n: getattr(manifest, n) for n in CheckpointRecord.model_fields}) == (
        make_record()
    )
    assert manifest.format_version == 1
    assert manifest.decoder_present
    assert sorted(manifest.versions) == ["mae-pipeline", "python", "timm", "torch"]
    weights = manifest.files["model.safetensors"]
    assert weights.bytes == (folder / "model.safetensors").stat().st_size
    assert sorted(manifest.files) == FILES[1:]


def test_saving_returns_what_reading_finds(tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, make_record(), model=Pair(), optimizer=None)
    assert read_manifest(tmp_path) == saved
    assert list(saved.files) == ["model.safetensors"]


def test_an_encoder_alone_has_no_decoder(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(3, 4)})
    manifest = save_checkpoint(tmp_path, make_record(), model=model, optimizer=None)
    assert not manifest.decoder_present


@pytest.mark.parametrize("reverse", [False, True])
def test_resumed_training_is_bit_equal_to_training_straight_through(
    folder: Path, reverse: bool
) -> None:
    straight, straight_optimizer = make_run()
    train(straight, straight_optimizer, range(3, 6))

    # Reversed: the state must follow the parameter's name, not its place.
    resumed = Pair()
    optimizer = make_optimizer(resumed, reverse=reverse)
    load_weights(folder, resumed)
    load_training_state(folder, resumed, optimizer)
    train(resumed, optimizer, range(3, 6))

    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_without_the_training_state_training_differs(folder: Path) -> None:
    straight, straight_optimizer = make_run()
    train(straight, straight_optimizer, range(3, 6))
    resumed = Pair()
    load_weights(folder, resumed)
    train(resumed, make_optimizer(resumed), range(3, 6))
    assert not torch.equal(resumed.encoder.weight, straight.encoder.weight)


def test_step_counters_keep_their_dtype_and_shape(folder: Path) -> None:
    model = Pair()
    optimizer = make_optimizer(model)
    load_training_state(folder, model, optimizer)
    step = optimizer.state[model.encoder.weight]["step"]
    assert (step.dtype, step.shape, step.item()) == (torch.float32, (), 3.0)


def test_loading_leaves_learning_rate_and_weight_decay_alone(folder: Path) -> None:
    model = Pair()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.25)
    load_training_state(folder, model, optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)


def test_a_parameter_that_never_had_a_gradient_comes_back_without_state(tmp_path: Path) -> None:
    model, optimizer = make_run()
    del optimizer.state[model.encoder.bias]
    save_checkpoint(tmp_path, make_record(), model=model, optimizer=optimizer)
    fresh = Pair()
    fresh_optimizer = make_optimizer(fresh)
    load_training_state(tmp_path, fresh, fresh_optimizer)
    with_state = [n for n, p in fresh.named_parameters() if p in fresh_optimizer.state]
    assert with_state == [
        "encoder.weight",
        "decoder.0.weight",
        "decoder.0.bias",
        "decoder.1.weight",
        "decoder.1.bias",
    ]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        model, optimizer = make_run()
        save_checkpoint(tmp_path / name, make_record(), model=model, optimizer=optimizer)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_saving_over_an_older_checkpoint_leaves_nothing_of_it(folder: Path) -> None:
    save_checkpoint(folder, make_record(step=4), model=Pair(), optimizer=None)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "model.safetensors"]
    assert verify_checkpoint(folder).step == 4


def test_a_save_that_dies_half_way_leaves_no_manifest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(folder, make_record(), model=Pair(), optimizer=None)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: No such file"):
        verify_checkpoint(folder)


def test_weights_are_stored_as_fp32(tmp_path: Path) -> None:
    model = Pair().to(torch.bfloat16)
    save_checkpoint(tmp_path, make_record(), model=model, optimizer=None)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in sorted(file.keys())}
    assert dtypes == dict.fromkeys(model.state_dict(), torch.float32)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_cut_file_is_found_and_named(folder: Path, name: str, share: float) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    wrong = "not JSON" if name == "manifest.json" else rf"has \d+ bytes, .* says {len(content)}"
    with pytest.raises(CorruptCheckpointError, match=f"{name}: {wrong}"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found_and_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CorruptCheckpointError, match=f"{name}: No such file"):
        verify_checkpoint(folder)


@pytest.mark.parametrize("name", FILES[1:])
def test_any_flipped_bit_of_a_tensor_file_is_found(folder: Path, name: str) -> None:
    size = (folder / name).stat().st_size
    for position in (0, 8, size // 2, size - 1):
        flip_bit(folder / name, position)
        with pytest.raises(CorruptCheckpointError, match=f"{name}: sha256"):
            verify_checkpoint(folder)
        flip_bit(folder / name, position)
    verify_checkpoint(folder)  # and nothing else was wrong


def test_any_flipped_bit_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    content = path.read_bytes()
    visible = [i for i, byte in enumerate(content) if not chr(byte).isspace()]
    for position in visible:
        flip_bit(path, position)
        with pytest.raises(CorruptCheckpointError, match="manifest"):
            read_manifest(folder)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\x00", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "format_version=None, this code reads 1"),
        (b'{"format_version": 2}', "format_version=2, this code reads 1"),
        (b'{"format_version": 1}', "changed since it was written"),
    ],
)
def test_a_manifest_of_garbage_is_corrupt(folder: Path, content: bytes, message: str) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=message):
        read_manifest(folder)


def test_a_manifest_with_a_field_of_the_wrong_type_names_the_field(folder: Path) -> None:
    rewrite_manifest(folder, lambda fields: fields["model"].update(patch_size="big"))
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: model\.patch_size: "):
        read_manifest(folder)


def test_a_manifest_cannot_name_files_outside_its_folder(folder: Path) -> None:
    def point_outside(fields: dict[str, Any]) -> None:
        fields["files"]["../secret"] = fields["files"]["model.safetensors"]

    rewrite_manifest(folder, point_outside)
    with pytest.raises(CorruptCheckpointError, match=r"manifest\.json: files"):
        read_manifest(folder)


def test_a_manifest_without_weights_is_corrupt(folder: Path) -> None:
    rewrite_manifest(folder, lambda fields: fields["files"].pop("model.safetensors"))
    with pytest.raises(CorruptCheckpointError, match=r"does not list model\.safetensors"):
        read_manifest(folder)


def test_loading_checks_the_file_it_reads(folder: Path) -> None:
    model = Pair()
    before = model.encoder.weight.clone()
    for name in FILES[1:]:
        flip_bit(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(CorruptCheckpointError, match=r"/model\.safetensors"):
        load_weights(folder, model)
    with pytest.raises(CorruptCheckpointError, match=r"training_state\.safetensors"):
        load_training_state(folder, model, make_optimizer(model))
    assert torch.equal(model.encoder.weight, before)


def test_loading_runs_no_pickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    model = Pair()
    load_weights(folder, model)
    load_training_state(folder, model, make_optimizer(model))


def test_a_pickle_in_the_place_of_weights_is_not_run(folder: Path) -> None:
    marker = folder / "pickle_was_run"
    torch.save({"weights": _TouchOnLoad(marker)}, folder / "model.safetensors")
    digest = checkpoint_manifest.digest_of(folder / "model.safetensors").model_dump()
    rewrite_manifest(folder, lambda fields: fields["files"].update({"model.safetensors": digest}))
    verify_checkpoint(folder)
    with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors: "):
        load_weights(folder, Pair())
    assert not marker.exists()


class _TouchOnLoad:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.marker,)


def test_weights_of_another_shape_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"encoder\.weight: \(4, 3\) in the .* \(5, 3\) in the m"):
        load_weights(folder, Pair(width=5), strict=False)


def test_weights_that_one_side_lacks_are_named(folder: Path) -> None:
    larger, smaller = Pair(), Pair()
    larger.decoder.append(nn.Linear(3, 3))
    smaller.decoder = smaller.decoder[:1]
    with pytest.raises(ValueError, match=r"decoder\.2\.weight is in the model but not"):
        load_weights(folder, larger)
    with pytest.raises(ValueError, match=r"decoder\.1\.\w+ is in the checkpoint but not"):
        load_weights(folder, smaller)


def test_not_strict_loads_what_both_sides_have(folder: Path) -> None:
    saved, _ = make_run()
    other = nn.ModuleDict({"encoder": nn.Linear(3, 4), "head": nn.Linear(4, 2)})
    load_weights(folder, other, strict=False)
    assert torch.equal(other["encoder"].weight, saved.encoder.weight)


def test_not_strict_does_not_pass_over_a_stranger(folder: Path) -> None:
    with pytest.raises(ValueError, match="no tensor in common"):
        load_weights(folder, nn.Linear(3, 4), strict=False)


def test_training_state_of_another_shape_is_named(folder: Path) -> None:
    model = Pair(width=5)
    with pytest.raises(ValueError, match=r"exp_avg\S*/encoder\.weight: \(4, 3\) in the checkpoint"):
        load_training_state(folder, model, make_optimizer(model))


def test_training_state_that_one_side_lacks_is_named(folder: Path) -> None:
    model = Pair()
    fewer = torch.optim.AdamW(list(model.encoder.parameters()))
    with pytest.raises(ValueError, match=r"decoder\.\S+ is in the training state"):
        load_training_state(folder, model, fewer)
    model.decoder.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"decoder\.2\.weight is in the optimizer"):
        load_training_state(folder, model, make_optimizer(model))


def test_a_checkpoint_without_an_optimizer_cannot_be_resumed(tmp_path: Path) -> None:
    model = Pair()
    save_checkpoint(tmp_path, make_record(), model=model, optimizer=None)
    with pytest.raises(ValueError, match="saved without an optimizer"):
        load_training_state(tmp_path, model, make_optimizer(model))


def test_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    wrapper = nn.ModuleDict({"module": Pair()})
    with pytest.raises(ValueError, match=r"module\.encoder\.weight: save the bare module"):
        save_checkpoint(tmp_path, make_record(), model=wrapper, optimizer=None)


def test_statistics_for_another_number_of_channels_are_refused() -> None:
    with pytest.raises(ValidationError, match="channel_std has 1 values for in_chans=3"):
        make_record(channel_std=(1.0,))


def test_the_encoder_comes_back_alone(tmp_path: Path) -> None:
    record = make_record()
    torch.manual_seed(0)
    mae = build_mae(record.model, record.masking, record.loss)
    save_checkpoint(tmp_path, record, model=mae, optimizer=None)
    encoder, manifest = load_encoder(tmp_path)
    images = torch.randn(2, 3, 16, 32)
    assert torch.equal(encoder(images), mae.encoder(images))
    assert manifest.model == record.model
    assert manifest.decoder_present


def test_a_whole_mae_resumes_bit_equal(tmp_path: Path) -> None:
    record = make_record()
    images, noise = torch.randn(4, 3, 16, 32), torch.rand(6, 4, 8)

    def run(mae: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
        losses = []
        for step in steps:
            optimizer.zero_grad()
            loss = mae(images, noise[step]).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    mae = build_mae(record.model, record.masking, record.loss)
    optimizer = make_optimizer(mae)
    run(mae, optimizer, range(3))
    save_checkpoint(tmp_path, record, model=mae, optimizer=optimizer)
    straight = run(mae, optimizer, range(3, 6))

    fresh = build_mae(record.model, record.masking, record.loss)
    fresh_optimizer = make_optimizer(fresh)
    load_weights(tmp_path, fresh)
    load_training_state(tmp_path, fresh, fresh_optimizer)
    assert run(fresh, fresh_optimizer, range(3, 6)) == straight


def test_a_disk_that_is_full_is_an_error_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(checkpoint_module, "save_file", no_space)
    with pytest.raises(OSError, match=r"model\.safetensors") as caught:
        checkpoint_module._save_tensors({}, tmp_path / "model.safetensors")
    assert caught.value.errno == 28

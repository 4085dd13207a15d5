"""A weights file from anywhere is read without running its code, and what is odd is said."""

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mae_core.checkpoint_manifest import CorruptCheckpointError
from mae_core.interchange.weight_files import RefusedWeightsError, read_weights_file

TENSOR = torch.arange(6.0).view(2, 3)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def torch_file(value: Any, *, old: bool = False) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path, _use_new_zipfile_serialization=not old)


@pytest.mark.parametrize(
    ("write", "container", "wrapper"),
    [
        (torch_file({"a": TENSOR}), "torch", None),
        (torch_file({"a": TENSOR}, old=True), "torch", None),
        (torch_file({"model": {"a": TENSOR}, "epoch": 3}), "torch", "model"),
        (torch_file({"state_dict": {"a": TENSOR}}), "torch", "state_dict"),
        (torch_file({"model": {"a": TENSOR}, "args": argparse.Namespace(lr=1)}), "torch", "model"),
        (torch_file({"a": nn.Parameter(TENSOR)}), "torch", None),
        (lambda path: save_file({"a": TENSOR}, path), "safetensors", None),
    ],
)
def test_tensors_are_found_in_each_container(
    tmp_path: Path, write: Callable[[Path], None], container: str, wrapper: str | None
) -> None:
    write(tmp_path / "weights")
    found = read_weights_file(tmp_path / "weights", "weights")
    assert torch.equal(found.tensors["a"], TENSOR)
    assert (found.container, found.wrapper) == (container, wrapper)


def a_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Evil()))


def compressed(path: Path) -> None:
    torch.save({"a": torch.zeros(100_000)}, path.with_suffix(".whole"))
    with (
        zipfile.ZipFile(path.with_suffix(".whole")) as whole,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in whole.namelist():
            small.writestr(name, whole.read(name))


def flipped(path: Path) -> None:
    torch.save({"a": torch.zeros(10_000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def half(write: Callable[[Path], None]) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def huge_header(path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (torch_file({"a": TENSOR, "b": Evil()}), r"holds Python code or objects \(posix.system\)"),
        (torch_file({"b": Evil()}, old=True), r"holds Python code or objects \(posix.system\)"),
        (torch_file(nn.Linear(2, 2)), r"objects \(torch.nn.modules.linear.Linear\)"),
        (a_pickle, "it was not loaded"),
        (half(torch_file({"a": TENSOR})), "damaged or cut off"),
        (half(torch_file({"a": TENSOR}, old=True)), "damaged, or no weights file"),
        (half(lambda path: save_file({"a": TENSOR}, path)), "incomplete|Header|invalid|neither"),
        (huge_header, "Offset|offset|incomplete|Metadata|metadata"),
        (compressed, "is compressed, which torch never does"),
        (flipped, "data/0: does not match its checksum"),
        (lambda path: path.write_text("hello, this is a text"), "is neither a safetensors file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (torch_file({"a": torch.zeros(1).expand(1000, 1000)}), r"a: claims \(1000, 1000\)"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.symlink_to("gone"), "No such file"),
    ],
)
def test_a_damaged_or_dangerous_file_is_named_and_nothing_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], None],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights")
    with pytest.raises(CorruptCheckpointError, match=f"my.pth: .*(?:{message})") as caught:
        read_weights_file(tmp_path / "weights", "my.pth")
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (TENSOR, "is a single tensor"),
        ([TENSOR], "holds a list"),
        ({"epoch": 3, "lr": 0.1}, "holds no named tensors; its keys are: epoch, lr"),
        ({"a": TENSOR.to_sparse()}, "a: is a tensor of kind torch.sparse_coo"),
        ({"a": TENSOR.to("meta")}, "a: is a tensor of kind meta"),
        ({"a": TENSOR.cfloat()}, "a: has complex numbers"),
        ({str(i): TENSOR for i in range(20_001)}, "has 20001 entries"),
    ],
)
def test_another_kind_of_content_is_refused_in_words(
    tmp_path: Path, value: Any, message: str
) -> None:
    torch.save(value, tmp_path / "weights")
    with pytest.raises(RefusedWeightsError, match=message):
        read_weights_file(tmp_path / "weights", "my.pth")

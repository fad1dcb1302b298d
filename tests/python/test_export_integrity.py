"""Damaged files are found before a runtime reads them; files of other tools are not held up."""

from __future__ import annotations

import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit.saving import InvalidFileError

TARGETS = ["onnx", "openvino", "plan", "pt2", "tflite", "torchscript"]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized(x) -> nn.Module:
    torch.manual_seed(0)
    prepared = qt.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), None, (x,))
    return qt.convert(qt.calibrate(prepared, [(x,)], progress=False))


def exported(target: str, model: nn.Module, x: Tensor, folder: Path) -> Path:
    info = qt.export.targets()[target]
    if not info.available:
        pytest.skip(f"{target} needs packages that are absent: {info.install}")
    return getattr(qt.export, target)(model, folder / f"m{info.suffix}", (x,), verify=False).path


@pytest.mark.parametrize("target", TARGETS)
def test_a_damaged_file_is_refused(target, quantized, x, tmp_path):
    path = exported(target, quantized, x, tmp_path)
    good = path.read_bytes()
    assert qt.export.load(target, path)(x).shape == (2, 4, 6, 6)
    weight = quantized.get_submodule("0").weight.numpy().tobytes()
    place = good.find(weight)  # the weights of OpenVINO are elsewhere
    flipped = bytearray(good)
    flipped[place if place > 0 else len(good) // 2] ^= 4
    for bad in (bytes(flipped), good[: len(good) // 2], good[:-1]):
        path.write_bytes(bad)
        # A plan file has checksums of its own, and its loader says which part differs.
        message = "cannot be loaded by" if target == "plan" else "is damaged"
        with pytest.raises(InvalidFileError, match=message):
            qt.export.load(target, path)


def test_a_file_needs_no_other_that_lies_beside_it(quantized, x, tmp_path):
    path = exported("onnx", quantized, x, tmp_path)
    path.with_name(f"{path.name}.data").write_bytes(b"weights of an earlier export")
    assert qt.export.load("onnx", path)(x).shape == (2, 4, 6, 6)


def test_a_file_that_belongs_to_it_is_checked_too(quantized, x, tmp_path):
    path = exported("openvino", quantized, x, tmp_path)
    weights = path.with_suffix(".bin")
    data = bytearray(weights.read_bytes())
    data[3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InvalidFileError, match=r"m\.xml is damaged: it, or m\.bin beside it"):
        qt.export.load("openvino", path)
    weights.unlink()
    with pytest.raises(InvalidFileError, match="is damaged"):
        qt.export.load("openvino", path)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_no_such_file_is_refused_with_one_exception(target, quantized, x, tmp_path):
    path = exported(target, quantized, x, tmp_path)
    path.write_text("an ode to the sea")
    with pytest.raises(InvalidFileError, match=str(path)):
        qt.export.load(target, path)


def test_a_file_that_another_tool_wrote_again_has_no_seal_and_loads(quantized, x, tmp_path):
    onnx = pytest.importorskip("onnx", reason="pip install 'qtoolkit[onnx]'")
    path = exported("onnx", quantized, x, tmp_path)
    expected = qt.export.load("onnx", path)(x)
    model = onnx.load(path)
    assert [p.key for p in model.metadata_props].count("qtoolkit.sha256") == 1
    model.doc_string = "changed"
    onnx.save(model, path)
    assert torch.equal(qt.export.load("onnx", path)(x), expected)


@pytest.mark.parametrize("target", ["onnx", "openvino", "tflite"])
def test_a_damaged_name_of_a_seal_does_not_switch_the_check_off(target, quantized, x, tmp_path):
    path = exported(target, quantized, x, tmp_path)
    data = path.read_bytes()
    at = data.index(b"qtoolkit.sha256")
    for place, bit in ((0, 1), (6, 32), (14, 4)):
        damaged = bytearray(data)
        damaged[at + place] ^= bit
        path.write_bytes(damaged)
        with pytest.raises(InvalidFileError, match="damaged"):
            qt.export.load(target, path)


BAD_EXAMPLES = [
    (torch.zeros(0, 3, 8, 8), "empty tensor of shape"),
    (torch.full((2, 3, 8, 8), float("nan")), "NaN or Inf"),
    (torch.zeros(2, 5, 8, 8), "cannot compute example_inputs"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.long), "cannot compute example_inputs"),
]


@pytest.mark.parametrize(("examples", "message"), BAD_EXAMPLES, ids=lambda value: str(value)[:12])
@pytest.mark.parametrize("target", ["torchscript", "pt2", "plan", "onnx", "openvino", "tflite"])
def test_bad_examples_are_named_alike(target, examples, message, quantized, tmp_path):
    info = qt.export.targets()[target]
    if not info.available:
        pytest.skip(info.install)
    model = qt.compile(quantized, torch.zeros(2, 3, 8, 8)) if target == "plan" else quantized
    with pytest.raises(ValueError, match=message):
        getattr(qt.export, target)(model, tmp_path / f"m{info.suffix}", (examples,))
    assert not list(tmp_path.iterdir())


def test_what_is_no_path_for_openvino_and_no_quantized_model_is_said(quantized, x, tmp_path):
    pytest.importorskip("openvino", reason="pip install 'qtoolkit[openvino]'")
    with pytest.raises(ValueError, match=r"must end in \.xml"):
        qt.export.openvino(quantized, tmp_path / "m.onnx", (x,))
    report = qt.export.torchscript(nn.Conv2d(3, 2, 3).eval(), tmp_path / "m.pt", (x,))
    assert any("no layer is quantized" in warning for warning in report.warnings)
    assert not any("no layer" in w for w in qt.export.torchscript(
        quantized, tmp_path / "q.pt", (x,)).warnings)  # fmt: skip
    with pytest.raises(IsADirectoryError, match="is a folder"):
        qt.export.load("onnx", tmp_path)
    with pytest.raises(TypeError, match="input 0 must be a tensor"):
        qt.export.load("torchscript", tmp_path / "q.pt")(x.numpy())


def test_sealed_xml_is_well_formed(quantized, x, tmp_path):
    path = exported("openvino", quantized, x, tmp_path)
    assert path.read_bytes().startswith(b'<?xml version="1.0"?>\n<!-- qtoolkit.sha256 ')
    assert ElementTree.parse(path).getroot().tag == "net"


def directory_with(path: Path, old: int, new: int) -> None:
    """Changes a size that the archive's directory and local headers declare."""
    data = path.read_bytes()
    assert data.count(old.to_bytes(4, "little")) > 0
    path.write_bytes(data.replace(old.to_bytes(4, "little"), new.to_bytes(4, "little")))


@pytest.mark.parametrize("target", ["torchscript", "pt2"])
def test_an_archive_that_declares_more_than_it_has_is_refused(target, quantized, x, tmp_path):
    path = exported(target, quantized, x, tmp_path)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    largest = max(entries, key=lambda entry: entry.file_size)
    good = path.read_bytes()
    for size, message in [(1 << 31, "declares"), (largest.file_size + 9, "are declared|CRC-32")]:
        path.write_bytes(good)
        directory_with(path, largest.file_size, size)
        with pytest.raises(InvalidFileError, match=message):
            qt.export.load(target, path)


def test_an_archive_of_nothing_but_zeros_is_refused(tmp_path):
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/data.pkl", bytes(1 << 22))
    with pytest.raises(InvalidFileError, match="declares 4194304 bytes of content, 100 times"):
        qt.export.load("torchscript", path)

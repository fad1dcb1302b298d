"""Models with weights of codes from shards, as folders, and from GPTQ's and AWQ's checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from networks import sqnr
from test_quantize_weights import quantize, same, snapshot
from torch import Tensor, nn
from weight_only_models import Decoder, decoder, tokens

import qtoolkit as qt
from qtoolkit.nn import QuantizedWeightLinear
from qtoolkit.saving import InvalidFileError
from qtoolkit.weight_only import load_folder, read_awq, read_gptq, save_folder, skeleton

safetensors = pytest.importorskip("safetensors.torch", reason="writes checkpoints of others")


def write_shards(folder: Path, tensors: dict[str, Tensor], count: int = 3) -> None:
    """As transformers' save_pretrained: an index, and tied weights once."""
    folder.mkdir(exist_ok=True)
    index = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in list(tensors)[i::count]}
        safetensors.save_file(part, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


class Buffered(Decoder):
    """With a buffer that no file holds."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.register_buffer("shift", torch.full((32,), 0.5), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) + self.shift


def buffered(**options: object) -> Buffered:
    torch.manual_seed(0)
    return Buffered(**options).eval()


def empty(**options: object) -> Buffered:
    with skeleton():
        return Buffered(**options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_streamed_from_shards_is_the_same_as_in_memory(tmp_path, tied, method):
    model = buffered(tied=tied)
    state = model.state_dict()
    if tied:
        del state["head.weight"]
    write_shards(tmp_path, state)
    types = [nn.Linear, nn.Embedding] if tied else [nn.Linear]
    hollow = empty(tied=tied)
    assert hollow.blocks[0].q.weight.is_meta
    new = quantize(hollow, "int4", 16, method, checkpoint=tmp_path, types=types)
    wanted = quantize(model, "int4", 16, method, types=types)
    assert same(snapshot(new), snapshot(wanted))
    x = tokens(1)[0]
    assert torch.equal(new(x), wanted(x))
    assert hollow.blocks[0].q.weight.is_meta
    assert isinstance(hollow.blocks[0].q, nn.Linear)


def test_a_single_file_is_a_checkpoint_too(tmp_path):
    model = nn.Sequential(nn.Linear(16, 4), nn.LayerNorm(4))
    safetensors.save_model(model, str(tmp_path / "m.safetensors"))
    with skeleton():
        hollow = nn.Sequential(nn.Linear(16, 4), nn.LayerNorm(4))
    new = quantize(hollow, "int8", 16, checkpoint=tmp_path / "m.safetensors")
    x = torch.randn(3, 16)
    assert torch.equal(new(x), quantize(model, "int8", 16)(x))


def damage(folder: Path, how: str) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    if how == "missing shard":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif how == "no header":
        shard.write_bytes(b"123")
    elif how == "lost tensor":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        index["weight_map"]["blocks.9.q.weight"] = shard.name
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "outside":
        index = {"weight_map": {"head.weight": "../x.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing shard", "lacks the shard 'model-00002-of-00003.safetensors'"),
        ("truncated", "model-00002-of-00003.safetensors is cut off: its tensor"),
        ("no header", "is no safetensors file, or it is cut off"),
        ("lost tensor", r"lacks the tensors \['blocks.9.q.weight'\]"),
        ("outside", r"lacks the shard '\.\./x.safetensors'"),
    ],
)
def test_damaged_checkpoints_are_named(tmp_path, how, message):
    write_shards(tmp_path, buffered().state_dict())
    damage(tmp_path, how)
    with pytest.raises(qt.InvalidFileError, match=message):
        quantize(empty(), checkpoint=tmp_path)


def test_other_checkpoints_are_named(tmp_path):
    state = buffered().state_dict()
    write_shards(tmp_path / "few", {k: t for k, t in state.items() if k != "norm.weight"})
    with pytest.raises(ValueError, match=r"has no tensor 'norm\.weight'"):
        quantize(empty(), checkpoint=tmp_path / "few")
    write_shards(tmp_path / "other", {**state, "head.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=r"'head.weight' in .* has the shape \[3, 3\]"):
        quantize(empty(), checkpoint=tmp_path / "other")
    write_shards(tmp_path / "whole", state)
    with pytest.raises(FileNotFoundError, match="is no safetensors file"):
        quantize(empty(), checkpoint=tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no tensor 'shift'.*skeleton"):
        quantize(buffered().to("meta"), checkpoint=tmp_path / "whole")


@pytest.mark.parametrize("shard", [4_000_000_000, 5000])
@pytest.mark.parametrize("tied", [False, True])
def test_folders_give_the_same_bits_without_the_float_model(tmp_path, shard, tied):
    model = buffered(tied=tied).bfloat16()
    new = quantize(model, "int3", 16, "awq", tokens(), types=[nn.Linear, nn.Embedding])
    save_folder(new, tmp_path / "m", max_shard_size=shard)
    files = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert ("model.safetensors" in files) == (shard > 5000)
    loaded = load_folder(tmp_path / "m", lambda: Buffered(tied=tied).bfloat16())
    x = tokens(1)[0]
    assert torch.equal(loaded(x), new(x))
    assert same(snapshot(loaded), snapshot(new))
    assert str(qt.explain(loaded)) == str(qt.explain(new))
    if tied:
        assert loaded.head.codes is loaded.embedding.codes
    again = load_folder(tmp_path / "m", empty(tied=tied).bfloat16())
    assert torch.equal(again(x), new(x))


def test_folders_that_are_damaged_or_of_another_model_are_named(tmp_path):
    new = quantize(buffered(), "int4", 16)
    folder = tmp_path / "m"
    save_folder(new, folder)
    with pytest.raises(qt.InvalidFileError, match=r"no layers \['blocks.1.q'"):
        load_folder(folder, empty(blocks=1))
    with pytest.raises(qt.InvalidFileError, match="has the shape"):
        load_folder(folder, empty(width=64))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_folder(tmp_path / "none", empty())
    document = (folder / "quantization.json").read_text()
    (folder / "quantization.json").write_text(document.replace('"bits": 4', '"bits": "4"', 1))
    with pytest.raises(qt.InvalidFileError, match="the bits of a QuantizedWeightLinear"):
        load_folder(folder, empty())
    (folder / "quantization.json").write_text(document)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(qt.InvalidFileError, match="its checksum is wrong"):
        load_folder(folder, empty())
    (folder / "quantization.json").unlink()
    with pytest.raises(qt.InvalidFileError, match=r"there is no .*config.json"):
        load_folder(folder, empty())
    with pytest.raises(ValueError, match="needs the result of quantize_weights"):
        save_folder(buffered(), folder)


def to_int32(values: Tensor) -> Tensor:
    return torch.where(values >= 1 << 31, values - (1 << 32), values).int()


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """`[rows, n]` codes in int32 words along the rows, as AutoGPTQ packs; 3 bits in its own way."""
    rows, count = codes.shape
    words = torch.zeros(rows, count * bits // 32, dtype=torch.long)
    if bits != 3:
        per = 32 // bits
        for j in range(count):
            words[:, j // per] |= codes[:, j] << (bits * (j % per))
        return to_int32(words)
    i = row = 0
    while row < words.size(1):
        for j in range(i, i + 10):
            words[:, row] |= codes[:, j] << (3 * (j - i))
        i += 10
        words[:, row] |= (codes[:, i] & 3) << 30
        row += 1
        words[:, row] |= (codes[:, i] >> 2) & 1
        i += 1
        for j in range(i, i + 10):
            words[:, row] |= codes[:, j] << (3 * (j - i) + 1)
        i += 10
        words[:, row] |= (codes[:, i] & 1) << 31
        row += 1
        words[:, row] |= (codes[:, i] >> 1) & 3
        i += 1
        for j in range(i, i + 10):
            words[:, row] |= codes[:, j] << (3 * (j - i) + 2)
        i += 10
        row += 1
    return to_int32(words)


def random_layer(bits: int, rows: int, columns: int, groups: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(1 << bits, (rows, columns), generator=generator)
    zeros = torch.randint(1, 1 << bits, (rows, groups), generator=generator)
    scales = (torch.rand(rows, groups, generator=generator) / 16 + 0.01).half()
    return codes, zeros, scales


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("first_version", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_tensors(bits, first_version, act_order):
    codes, zeros, scales = random_layer(bits, 32, 64, 4)
    group_of = torch.arange(64) // 16
    if act_order:
        group_of = group_of[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    expected = (codes - zeros[:, group_of]).float() * scales[:, group_of].float()
    stored = zeros - 1 if first_version else zeros
    weight, order = read_gptq(
        pack_rows(codes, bits).t().contiguous(),
        pack_rows(stored.t(), bits),
        scales.t().contiguous(),
        group_of.int(),
        bits,
        zeros_minus_one=first_version,
    )
    assert (order is not None) == act_order
    layer = QuantizedWeightLinear(weight, input_order=order)
    assert torch.equal(layer.weight, expected)
    x = torch.randn(3, 64)
    # A float32 sum of 64 products, in any order, errs by 64 roundings of their magnitudes at most.
    error = (layer(x).double() - x.double() @ expected.double().T).abs()
    bound = 64 * torch.finfo(torch.float32).eps * (x.abs() @ expected.abs().T)
    assert (error <= bound).all()


def pack_awq(codes: Tensor) -> Tensor:
    words = torch.zeros(codes.size(0), codes.size(1) // 8, dtype=torch.long)
    for i, neighbour in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words |= codes[:, neighbour::8] << (4 * i)
    return to_int32(words)


def test_awq_tensors():
    codes, zeros, scales = random_layer(4, 32, 64, 4)
    group_of = torch.arange(64) // 16
    expected = (codes - zeros[:, group_of]).float() * scales[:, group_of].float()
    weight = read_awq(pack_awq(codes.t()), pack_awq(zeros.t()), scales.t().contiguous())
    assert torch.equal(weight.dequantized(), expected)


def test_gptq_folders_load_into_a_model(tmp_path):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(64, 32), nn.LayerNorm(32)
            self.head = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.layer(x)))

    model = Small().eval()
    codes, zeros, scales = random_layer(4, 32, 64, 4)
    state = {k: t for k, t in model.state_dict().items() if k != "layer.weight"}
    state["layer.qweight"] = pack_rows(codes, 4).t().contiguous()
    state["layer.qzeros"] = pack_rows(zeros.t() - 1, 4)
    state["layer.scales"] = scales.t().contiguous()
    safetensors.save_file(state, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 16}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_folder(tmp_path, Small)
    with torch.no_grad():
        model.layer.weight.copy_(
            (codes - zeros.repeat_interleave(16, 1)) * scales.float().repeat_interleave(16, 1)
        )
    x = torch.randn(3, 64)
    torch.testing.assert_close(loaded(x), model(x))
    assert "it is float in the checkpoint" in str(qt.explain(loaded))
    config["quantization_config"]["quant_method"] = "other"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(qt.InvalidFileError, match="layer: weights of 'other' are not known"):
        load_folder(tmp_path, Small)
    del state["layer.scales"]
    safetensors.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(qt.InvalidFileError, match=r"layer: it lacks \['scales'\]"):
        load_folder(tmp_path, Small)


def test_ordinary_models_are_no_skeletons():
    with skeleton():
        pass
    assert not decoder().head.weight.is_meta


def test_a_model_of_transformers_generates_and_loads_by_its_configuration(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    x = torch.randint(64, (1, 12))
    new = qt.quantize_weights(model, "int8", 32, "gptq", data=[x], progress=False)
    with torch.no_grad():
        assert sqnr(model(x).logits, new(x).logits) > 30
    y = new.generate(x, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert y.shape == (1, 16)
    qt.weight_only.save_folder(new, tmp_path)
    loaded = qt.weight_only.load_folder(tmp_path)
    assert torch.equal(loaded(x).logits, new(x).logits)
    assert torch.equal(loaded.generate(x, max_new_tokens=4, min_new_tokens=4, do_sample=False), y)


def test_a_layer_that_stands_twice_is_saved_and_loaded(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(16, 16)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    new = qt.quantize_weights(Twice(), "int4", 16, progress=False)
    qt.weight_only.save_folder(new, tmp_path)
    loaded = qt.weight_only.load_folder(tmp_path, Twice)
    x = torch.randn(2, 16)
    assert loaded.a is loaded.b
    assert torch.equal(loaded(x), new(x))


def test_gptq_groups_of_different_sizes_need_their_index():
    codes, zeros, scales = random_layer(4, 32, 320, 3)
    group_of = torch.arange(320) // 128
    expected = (codes - zeros[:, group_of]).float() * scales[:, group_of].float()
    tensors = (
        pack_rows(codes, 4).t().contiguous(),
        pack_rows(zeros.t(), 4),
        scales.t().contiguous(),
    )
    weight, _ = read_gptq(*tensors, group_of.int(), 4, zeros_minus_one=False)
    assert torch.equal(weight.dequantized(), expected)
    with pytest.raises(InvalidFileError, match="groups of different sizes need g_idx"):
        read_gptq(*tensors, None, 4, zeros_minus_one=False)

"""Dynamic quantization of recurrent layers and embeddings, and torch.ao's scripts for it."""

from __future__ import annotations

import copy

import pytest
import torch
from dropin import BOTH, MARGIN, at_least_as_near, ours, quantized_layers, sqnr, torch_ao
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import qtoolkit as qt
from qtoolkit.nn import DynamicLinear

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao warns of its own end


class LSTMModel(nn.Module):
    """The word language model of the tutorial on dynamic quantization."""

    def __init__(self, ntoken=60, ninp=32, nhid=48, nlayers=2, dropout=0.5):
        super().__init__()
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=dropout)
        self.decoder = nn.Linear(nhid, ntoken)
        self.nhid, self.nlayers = nhid, nlayers

    def forward(self, input: torch.Tensor, hidden: tuple[torch.Tensor, torch.Tensor]):
        emb = self.drop(self.encoder(input))
        output, hidden = self.rnn(emb, hidden)
        return self.decoder(self.drop(output)), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return (
            weight.new_zeros(self.nlayers, bsz, self.nhid),
            weight.new_zeros(self.nlayers, bsz, self.nhid),
        )


def language_model(tq):
    torch.manual_seed(0)
    model = LSTMModel().eval()
    return model, tq.quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)


def run(model):
    tokens = torch.randint(60, (10, 4), generator=torch.Generator().manual_seed(2))
    hidden = model.init_hidden(4)
    outputs = []
    with torch.no_grad():
        for part in tokens.split(5):
            output, hidden = model(part, hidden)
            hidden = tuple(h.detach() for h in hidden)
            outputs.append(output)
    return torch.cat(outputs)


@BOTH
def test_language_model_script(tq, tmp_path):
    model, quantized = language_model(tq)
    assert "LSTM" in str(quantized)
    assert sqnr(run(model), run(quantized)) > 25
    torch.save(model.state_dict(), tmp_path / "float.p")
    torch.save(quantized.state_dict(), tmp_path / "temp.p")
    assert (tmp_path / "temp.p").stat().st_size < 0.6 * (tmp_path / "float.p").stat().st_size
    scripted = torch.jit.script(quantized)
    tokens, hidden = torch.randint(60, (5, 4)), quantized.init_hidden(4)
    assert torch.equal(scripted(tokens, hidden)[0], quantized(tokens, hidden)[0])
    again = language_model(tq)[1]
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(run(again), run(quantized))


def test_language_model_is_at_least_as_near_as_torch_ao():
    def script(tq):
        model, quantized = language_model(tq)
        return run(model), run(quantized)

    at_least_as_near(script)


LAYERS = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "deep bidirectional lstm": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "deep bidirectional gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "batch first": (nn.LSTM, {"batch_first": True, "bidirectional": True}),
    "without bias": (nn.GRU, {"bias": False}),
    "projected": (nn.LSTM, {"proj_size": 12, "num_layers": 2, "bidirectional": True}),
    "rnn": (nn.RNN, {"num_layers": 2}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}


def states(result):
    """The final states as one tensor."""
    hidden = result[1] if isinstance(result[1], tuple) else (result[1],)
    return torch.cat([state.flatten() for state in hidden])


@pytest.mark.parametrize("name", LAYERS)
def test_recurrent_layer(name):
    kind, options = LAYERS[name]
    torch.manual_seed(0)
    rnn = kind(20, 32, **options).eval()
    quantized = qt.quantize_dynamic(nn.ModuleList([rnn]), types=[kind])[0]
    assert quantized_layers(quantized) == sum("weight" in n for n, _ in rnn.named_parameters())
    x = torch.randn(7, 5, 20)
    batch = 7 if options.get("batch_first") else 5
    wanted = rnn(x)
    directions = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    h = torch.randn(directions, batch, options.get("proj_size", 32))
    hx = (h, torch.randn(directions, batch, 32)) if kind is nn.LSTM else h
    lengths = torch.randint(1, 12 - batch + 1, (batch,))
    lengths[2] = 12 - batch
    packed = pack_padded_sequence(
        x, lengths, batch_first=options.get("batch_first", False), enforce_sorted=False
    )
    for arguments in ((x,), (x, hx), (x[:, 0],), (packed,), (packed, hx)):
        wanted, got = rnn(*arguments), quantized(*arguments)
        if isinstance(wanted[0], tuple):
            assert torch.equal(wanted[0].batch_sizes, got[0].batch_sizes)
            padded = [pad_packed_sequence(result[0])[0] for result in (wanted, got)]
        else:
            padded = [wanted[0], got[0]]
        assert padded[0].shape == padded[1].shape
        assert sqnr(*padded) > 35
        assert sqnr(states(wanted), states(got)) > 35
    assert torch.equal(torch.jit.script(quantized)(x, hx)[0], quantized(x, hx)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layer_is_at_least_as_near_as_torch_ao(kind):
    def error(seed):
        torch.manual_seed(seed)
        rnn = nn.Sequential(kind(20, 32, num_layers=2)).eval()
        x = torch.randn(7, 5, 20)
        return [sqnr(rnn(x)[0], tq.quantize_dynamic(rnn, {kind})(x)[0]) for tq in (ours, torch_ao)]

    for seed in range(3):
        mine, theirs = error(seed)
        assert mine >= theirs - MARGIN


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cell(kind):
    torch.manual_seed(0)
    cell = kind(16, 24).eval()
    quantized = ours.quantize_dynamic(nn.ModuleList([cell]))[0]
    assert quantized_layers(quantized) == 2
    x, h = torch.randn(6, 16), torch.randn(6, 24)
    hx = (h, torch.randn(6, 24)) if kind is nn.LSTMCell else h
    for arguments in ((x,), (x, hx), (x[0],)):
        wanted, got = cell(*arguments), quantized(*arguments)
        if kind is nn.LSTMCell:
            wanted, got = torch.cat(wanted), torch.cat(got)
        assert wanted.shape == got.shape
        assert sqnr(wanted, got) > 30
    torch.jit.script(quantized)


def test_dropout_follows_the_mode():
    torch.manual_seed(0)
    rnn = nn.ModuleList([nn.LSTM(8, 16, num_layers=2, dropout=0.5)])
    quantized = qt.quantize_dynamic(rnn, types=[nn.LSTM])[0]
    x = torch.randn(5, 3, 8)
    assert torch.equal(quantized(x)[0], quantized(x)[0])
    quantized.train()
    assert not torch.equal(quantized(x)[0], quantized(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_layers_are_saved(kind, tmp_path):
    torch.manual_seed(0)
    options = {} if "Cell" in kind.__name__ else {"num_layers": 2, "bidirectional": True}
    quantized = qt.quantize_dynamic(nn.Sequential(kind(8, 16, **options)), types=[kind])
    qt.save(quantized, tmp_path / "model.qt")
    again = qt.load(tmp_path / "model.qt")
    x = torch.randn(5, 8)
    wanted, got = quantized(x), again(x)
    assert torch.equal(wanted[0], got[0])
    assert "Cell" in kind.__name__ or torch.equal(states(wanted), states(got))


@BOTH
def test_embeddings(tq):
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"table": nn.Embedding(50, 16), "bag": nn.EmbeddingBag(50, 16, mode="sum")}
    )
    qconfig = tq.float_qparams_weight_only_qconfig
    quantized = tq.quantize_dynamic(model, {nn.Embedding: qconfig, nn.EmbeddingBag: qconfig})
    index, offsets = torch.randint(50, (12,)), torch.tensor([0, 4, 4, 9])
    assert quantized_layers(quantized) == 2
    assert sqnr(model["table"](index), quantized["table"](index)) > 40
    assert sqnr(model["bag"](index, offsets), quantized["bag"](index, offsets)) > 40


def test_embeddings_in_all_forms(tmp_path):
    torch.manual_seed(0)
    index = torch.randint(50, (3, 4))
    for mode in ("sum", "mean", "max"):
        bag = nn.EmbeddingBag(50, 16, mode=mode)
        quantized = ours.quantize_dynamic(nn.Sequential(bag), dtype=torch.quint8)
        assert sqnr(bag(index), quantized(index)) > 35
    weights = torch.rand(3, 4)
    bag = nn.EmbeddingBag(50, 16, mode="sum")
    quantized = ours.quantize_dynamic(nn.Sequential(bag), dtype=torch.quint8)
    wanted = bag(index, per_sample_weights=weights)
    assert sqnr(wanted, quantized[0](index, per_sample_weights=weights)) > 35
    table = nn.Sequential(nn.Embedding(50, 16))
    quantized = ours.quantize_dynamic(table, dtype=torch.quint8)
    assert quantized(index).shape == (3, 4, 16)
    qt.save(quantized, tmp_path / "table.qt")
    assert torch.equal(qt.load(tmp_path / "table.qt")(index), quantized(index))
    assert torch.equal(torch.jit.script(quantized)(index), quantized(index))
    constant = nn.Embedding.from_pretrained(torch.full((3, 4), 2.5))
    quantized = ours.quantize_dynamic(nn.Sequential(constant), dtype=torch.quint8)
    assert torch.equal(quantized(torch.arange(3)), constant.weight)


class Attention(nn.Module):
    """As BERT has it."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.intermediate, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        x = self.norm1(x + attended.transpose(1, 2).flatten(2))
        return self.norm2(x + self.output(nn.functional.gelu(self.intermediate(x))))


def bert(tq, spec):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), Attention(), nn.Linear(32, 2)).eval()
    return model, tq.quantize_dynamic(model, spec(tq), dtype=torch.qint8)


SPECS = {
    "class": (lambda tq: {nn.Linear}, 11),
    "all": (lambda tq: None, 11),
    "name": (lambda tq: {"0"}, 5),
    "dict": (lambda tq: {nn.Linear: tq.default_dynamic_qconfig, "2": None}, 10),
    "per channel": (lambda tq: {"1.output": tq.per_channel_dynamic_qconfig}, 1),
}


@BOTH
@pytest.mark.parametrize("name", SPECS)
def test_bert_script(tq, name):
    spec, count = SPECS[name]
    model, quantized = bert(tq, spec)
    x = torch.randn(2, 6, 32)
    assert quantized_layers(quantized) == count
    assert sqnr(model(x), quantized(x)) > 20
    assert torch.equal(torch.jit.trace(quantized, x)(x), quantized(x))


def test_bert_is_at_least_as_near_as_torch_ao():
    def script(tq):
        model, quantized = bert(tq, SPECS["class"][0])
        x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
        return model(x), quantized(x)

    at_least_as_near(script)


@BOTH
def test_dynamic_layers_by_a_mapping_in_fx_mode(tq):
    import importlib

    quantize_fx = importlib.import_module(f"{tq.__name__}.quantize_fx")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(4, 8)
    mapping = tq.QConfigMapping().set_global(tq.default_dynamic_qconfig)
    converted = quantize_fx.convert_fx(quantize_fx.prepare_fx(model, mapping, (x,)))
    assert quantized_layers(converted) == 2
    assert sqnr(model(x), converted(x)) > 25


def test_static_and_dynamic_layers_in_one_eager_model():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(30, 16)
            self.rnn = nn.LSTM(16, 16)
            self.quant, self.dequant = ours.QuantStub(), ours.DeQuantStub()
            self.fc = nn.Linear(16, 8)

        def forward(self, x):
            y, _ = self.rnn(self.table(x))
            return self.dequant(self.fc(self.quant(y)))

    torch.manual_seed(0)
    model = Mixed().eval()
    model.qconfig = ours.get_default_qconfig("x86")
    model.rnn.qconfig = ours.default_dynamic_qconfig
    model.table.qconfig = ours.float_qparams_weight_only_qconfig
    prepared = ours.prepare(model)
    x = torch.randint(30, (5, 4))
    prepared(x)
    converted = ours.convert(prepared)
    assert quantized_layers(converted) == 4
    assert type(converted.fc).__name__ == "Linear"
    assert not isinstance(converted.fc, DynamicLinear)
    assert sqnr(model(x), converted(x)) > 25
    assert {layer.name for layer in qt.explain(converted).float_layers} == {"getitem"}


def test_what_stays_in_float_and_errors():
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(3, 4, max_norm=1.0))
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="no layer was quantized .*max_norm changes its rows"):
        ours.quantize_dynamic(model, {nn.Embedding}, dtype=torch.quint8)
    with pytest.raises(ours.UnsupportedError, match=r"torch.qint8, or torch.quint8 .*model.half"):
        ours.quantize_dynamic(model, {nn.Linear}, dtype=torch.float16)
    with pytest.raises(ours.UnsupportedError, match="mapping must be None"):
        ours.quantize_dynamic(model, mapping={})
    with pytest.raises(ValueError, match=r"has no modules \['fc'\]"):
        ours.quantize_dynamic(model, {"fc"})
    quantized = ours.quantize_dynamic(model)
    with pytest.raises(ValueError, match="prepared or converted already"):
        ours.quantize_dynamic(quantized)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    rnn = nn.ModuleList([nn.LSTM(4, 4)])
    rnn[0].weight_hh_l0.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weight_hh_l0.weight holds NaN"):
        qt.quantize_dynamic(rnn, types=[nn.LSTM])
    lone = ours.quantize_dynamic(nn.LSTM(4, 4))
    with pytest.raises(RuntimeError, match="must have 4 features, as the layer has, got 5"):
        lone(torch.randn(3, 2, 5))

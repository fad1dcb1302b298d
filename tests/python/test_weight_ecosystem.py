"""Weights of codes within other libraries: transformers, peft, diffusers, torch.compile."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qtoolkit as qt
from qtoolkit.nn.weight_only import QuantizedWeightEmbedding, QuantizedWeightLinear

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def llama(tied: bool = False) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = torch.arange(24).reshape(2, 12) * 5 % 64


def generated(model: nn.Module) -> torch.Tensor:
    return model.generate(
        TOKENS[:1], attention_mask=torch.ones_like(TOKENS[:1]), do_sample=False, max_new_tokens=6,
        min_new_tokens=6, pad_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_grouped_query_attention_of_transformers(method):
    model = llama()
    data = [{"input_ids": TOKENS}, {"input_ids": TOKENS.flip(1)}]
    quantized = qt.quantize_weights(model, "int4", 16, method, data, progress=False)
    with torch.no_grad():
        wanted, found = model(TOKENS).logits, quantized(TOKENS).logits
        rounded = qt.quantize_weights(model, "int4", 16, progress=False)(TOKENS).logits
    assert float((found - wanted).norm()) < float((rounded - wanted).norm())
    assert quantized.lm_head.input_factor is None
    assert generated(quantized).shape == (1, 18)


def test_tied_embeddings_share_codes_and_generate():
    model = llama(tied=True)
    alone = qt.quantize_weights(model, "int8", 16, progress=False)
    assert alone.lm_head.weight is alone.model.embed_tokens.weight
    assert "shares its weight" in str(qt.explain(alone))
    both = qt.quantize_weights(
        model, "int8", 16, types=(nn.Linear, nn.Embedding), progress=False
    )  # fmt: skip
    assert isinstance(both.model.embed_tokens, QuantizedWeightEmbedding)
    assert isinstance(both.lm_head, QuantizedWeightLinear)
    assert both.lm_head.codes is both.model.embed_tokens.codes
    assert generated(both).shape == (1, 18)


def test_adapters_of_peft_stay_float_and_train():
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).eval()
    quantized = qt.quantize_weights(model, "int4", 16, progress=False)
    adapters = [n for n, _ in quantized.named_parameters() if "lora_" in n]
    assert len(adapters) == 8
    attention = quantized.base_model.model.model.layers[0].self_attn
    assert isinstance(attention.q_proj.base_layer, QuantizedWeightLinear)
    assert isinstance(attention.o_proj, QuantizedWeightLinear)
    with torch.no_grad():
        wanted, found = model(TOKENS).logits, quantized(TOKENS).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.3
    with quantized.disable_adapter(), torch.no_grad():
        assert not torch.allclose(quantized(TOKENS).logits, found)
    quantized(TOKENS, labels=TOKENS).loss.backward()
    assert all(
        p.grad is not None and bool(p.grad.any())
        for n, p in quantized.named_parameters()
        if "lora_" in n
    )


def test_compiled_model_of_transformers():
    quantized = qt.quantize_weights(llama(), "int4", 16, progress=False)
    with torch.no_grad():
        expected = quantized(TOKENS).logits
        compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(TOKENS, use_cache=False).logits, expected)


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the repository")
def test_example_of_a_dynamic_encoder(monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import bert_dynamic

    small = ["--blocks", "1", "--length", "32", "--test", "48", "--rounds", "1"]
    result = bert_dynamic.main([*small, "--width", "64", "--steps", "30"])
    plain, dynamic = result["rows"]
    assert plain["agreement"] == 100
    assert dynamic["agreement"] > 80
    assert dynamic["megabytes"] < 0.6 * plain["megabytes"]
    assert plain["accuracy"] > 25
    monkeypatch.setattr(bert_dynamic, "local_classifier", local_bytes(transformers))
    local = bert_dynamic.main([*small, "--model", str(tmp_path)])
    assert [row["accuracy"] for row in local["rows"]] == [None, None]


def local_bytes(transformers):
    """As the example's, with bytes for tokens: no tokenizer can be downloaded."""

    def load(path, pieces):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=32,
        )  # fmt: skip
        transformers.BertForSequenceClassification(config).save_pretrained(path)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
        return model, [{"input_ids": torch.tensor([list(text) for text, _ in pieces])}]

    return load


@pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the repository")
def test_example_of_a_diffusion_transformer(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import dit_int4

    small = ["--steps", "5", "--blocks", "2", "--width", "32", "--group-size", "32"]
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "diffusers", None)
        with pytest.raises(SystemExit, match="pip install diffusers"):
            dit_int4.main(small)
    pytest.importorskip("diffusers", reason="needs diffusers", exc_type=ImportError)
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    plain, rounded, gptq = dit_int4.main([*small, "--methods", "rtn", "gptq"])
    assert gptq["sqnr_db"] > rounded["sqnr_db"] > 15
    assert gptq["megabytes"] < 0.7 * plain["megabytes"]

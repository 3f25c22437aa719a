"""Models of other packages, as they are: the same as built eagerly."""

from __future__ import annotations

import warnings

import pytest
import torch

from lightning_efficient_init.deferred import deferred_init, materialize

_BASE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = {**_BASE, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_GROUPED = {**_TEXT, "num_key_value_heads": 2}
_IMAGE = {**_BASE, "image_size": 32, "patch_size": 8}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2}
TRANSFORMERS = {
    "Bart": ("BartForConditionalGeneration", _SEQ2SEQ),
    "Beit": ("BeitForImageClassification", {**_IMAGE, "use_relative_position_bias": True}),
    "Bert": ("BertForMaskedLM", _TEXT),
    "Bloom": ("BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99}),
    "CLIP": ("CLIPModel", {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 16}),
    "ConvNext": ("ConvNextModel", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "DebertaV2": ("DebertaV2Model", _TEXT),
    "Dinov2": ("Dinov2Model", _IMAGE),
    "DistilBert": (
        "DistilBertForMaskedLM",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99, "sinusoidal_pos_embds": True},
    ),
    "Falcon": ("FalconForCausalLM", _TEXT),
    "Gemma2": ("Gemma2ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "GPT2": ("GPT2LMHeadModel", _GPT2),
    "GPTNeoX": ("GPTNeoXForCausalLM", _TEXT),
    "Llama": ("LlamaForCausalLM", _GROUPED),
    "Mamba": ("MambaForCausalLM", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "state_size": 4}),
    "Mixtral": ("MixtralForCausalLM", {**_GROUPED, "num_local_experts": 4}),
    "OPT": (
        "OPTForCausalLM",
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99},
    ),
    "Phi3": ("Phi3ForCausalLM", _GROUPED),
    "Qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "Roberta": ("RobertaForMaskedLM", _TEXT),
    "Swin": (
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 2], "image_size": 32, "patch_size": 4, "window_size": 4},
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 99},
    ),
    "ViT": ("ViTForImageClassification", _IMAGE),
    "Wav2Vec2": (
        "Wav2Vec2Model",
        {
            **_BASE,
            "conv_dim": (16, 16),
            "conv_kernel": (3, 3),
            "conv_stride": (2, 2),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "Whisper": ("WhisperForConditionalGeneration", {**_SEQ2SEQ, "max_target_positions": 16}),
}


@pytest.fixture(autouse=True)
def _quiet_third_parties():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _transformers(name):
    transformers = pytest.importorskip("transformers")
    model, options = TRANSFORMERS[name]
    config = getattr(transformers, f"{name}Config")(**options)
    return lambda: getattr(transformers, model)(config).eval()


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_an_architecture_of_transformers_is_the_same(name, device, same_as_eager):
    same_as_eager(_transformers(name), device)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Bert"])
def test_logits_of_materialized_models_are_those_of_eager_models(name, device, same_as_eager):
    found, expected = same_as_eager(_transformers(name), device)
    tokens = torch.arange(3, 19, device=device).view(2, 8)
    with torch.no_grad():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize(
    "name", ["pythia-14m", "Llama-2-7b-hf", "Gemma-2b", "Mixtral-8x7B-v0.1", "phi-2", "falcon-7b", "Qwen2.5-0.5B"]
)
def test_a_model_of_litgpt_is_the_same(name, device, same_as_eager):
    litgpt = pytest.importorskip("litgpt")
    small = {"n_layer": 2, "n_embd": 32, "n_head": 4, "padded_vocab_size": 64, "intermediate_size": 64, "head_size": 8}
    groups = 1 if name == "falcon-7b" else 2
    config = litgpt.Config.from_name(name, **small, block_size=16, n_query_groups=groups)

    def build():
        model = litgpt.GPT(config)
        model.apply(model._init_weights)
        return model

    same_as_eager(build, device)


def _x_transformers(**options):
    x = pytest.importorskip("x_transformers")
    layers = x.Decoder(dim=32, depth=2, heads=4, **options)
    return x.TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers)


@pytest.mark.parametrize(
    "options",
    [
        {"rotary_pos_emb": True},
        {"alibi_pos_bias": True, "ff_glu": True, "use_scalenorm": True},
        {"rel_pos_bias": True, "use_rmsnorm": True, "attn_qk_norm": True},
    ],
)
def test_a_model_of_x_transformers_is_the_same(options, device, same_as_eager):
    same_as_eager(lambda: _x_transformers(**options), device)


@pytest.mark.parametrize(("module", "name", "options"), [("vit", "ViT", {}), ("cait", "CaiT", {"cls_depth": 1})])
def test_a_model_of_vit_pytorch_is_the_same(module, name, options, device, same_as_eager):
    pytest.importorskip("torchvision", reason="vit_pytorch imports torchvision")
    vit = getattr(pytest.importorskip(f"vit_pytorch.{module}"), name)
    sizes = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 64}
    same_as_eager(lambda: vit(**sizes, **options), device)


def test_a_lightning_module_with_metrics_inside_is_the_same(device, same_as_eager):
    lightning = pytest.importorskip("lightning")
    torchmetrics = pytest.importorskip("torchmetrics")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters()
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
            self.metrics = torchmetrics.MetricCollection(
                {
                    "accuracy": torchmetrics.classification.MulticlassAccuracy(3),
                    "confusion": torchmetrics.classification.MulticlassConfusionMatrix(3),
                }
            )
            self.loss = torchmetrics.MeanMetric()
            self.example_input_array = torch.randn(2, 6)

    found, expected = same_as_eager(Classifier, device)
    for (_, f), (_, e) in zip(found.metrics.items(), expected.metrics.items(), strict=True):
        for name, default in e._defaults.items():
            assert torch.equal(f._defaults[name], default)
            assert torch.equal(getattr(f, name), getattr(e, name))
    found.metrics.update(torch.randn(4, 3, device=device), torch.tensor([0, 1, 2, 0], device=device))
    found.metrics.compute()


def test_a_model_of_seventy_billion_parameters_is_recorded_in_seconds():
    import time

    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    start = time.perf_counter()
    with deferred_init():
        model = transformers.LlamaForCausalLM(config)
    assert time.perf_counter() - start < 20
    assert sum(p.numel() for p in model.parameters()) > 68e9
    norm = materialize(model.model.norm)
    assert torch.equal(norm.weight, torch.ones(8192))


def test_materializing_takes_little_more_memory_than_the_model(tmp_path):
    """In a fresh process, by the peak of its resident memory."""
    import subprocess
    import sys

    script = """
import resource, torch
from lightning_efficient_init.deferred import deferred_init, materialize
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def build(n): return torch.nn.Sequential(*[torch.nn.Linear(n, n) for _ in range(12)], torch.nn.Linear(n, 4 * n))
with deferred_init(): small = build(8)
materialize(small)
with deferred_init(): model = build(1600)
before = peak()
materialize(model)
sizes = [p.numel() * 4 for p in model.parameters()]
assert peak() - before < sum(sizes) + 1.5 * max(sizes), (peak() - before, sum(sizes))
"""
    subprocess.run([sys.executable, "-c", script], check=True)

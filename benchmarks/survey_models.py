"""Tiny random configurations of Hugging Face architectures, each with the arguments of a training step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]
TEXT = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_labels": 10,
}
SEQUENCES = {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}


def words() -> Tensor:
    return torch.randint(5, 100, (2, 12))


def pictures() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 2])}


def text() -> dict[str, Any]:
    return {"input_ids": words(), "labels": words()}


def masked() -> dict[str, Any]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {**text(), "attention_mask": mask}


def build(name: str, kind: str, call: Callable[[], dict[str, Any]], **given: Any) -> Callable[[], Made]:
    """The model ``name + kind`` of the configuration ``name + Config``."""

    def make() -> Made:
        config = getattr(transformers, f"{name}Config")(**given)
        return getattr(transformers, f"{name}{kind}")(config), call()

    return make


def language(name: str, **given: Any) -> Callable[[], Made]:
    sizes = {**TEXT, **SPECIAL, "num_key_value_heads": 2, "attention_dropout": 0.1, "use_cache": False}
    return build(name, "ForCausalLM", text, **{**sizes, **given})


def encoder(name: str, **given: Any) -> Callable[[], Made]:
    return build(name, "ForMaskedLM", masked, **{**TEXT, **given})


def vision(name: str, **given: Any) -> Callable[[], Made]:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return build(name, "ForImageClassification", pictures, **{**IMAGE, **dropout, **given})


def clip() -> Made:
    sizes = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 100, "max_position_embeddings": 64, "eos_token_id": 2},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    call = {"input_ids": words(), "pixel_values": torch.randn(2, 3, 32, 32), "return_loss": True}
    return transformers.CLIPModel(config), call


def whisper() -> Made:
    config = transformers.WhisperConfig(
        **SEQUENCES,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=30,
        dropout=0.1,
        decoder_start_token_id=1,
        use_cache=False,
        **SPECIAL,
    )
    call = {"input_features": torch.randn(2, 8, 40), "labels": words()}
    return transformers.WhisperForConditionalGeneration(config), call


def wav2vec2() -> Made:
    config = transformers.Wav2Vec2Config(
        **{key: value for key, value in TEXT.items() if key != "max_position_embeddings"},
        conv_dim=(16, 16),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        # These draw or look at values in Python; the feature extractor marks its input as differentiable.
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    model = transformers.Wav2Vec2ForCTC(config)
    model.freeze_feature_encoder()
    return model, {"input_values": torch.randn(2, 1600)}


_gpt2 = {"vocab_size": 100, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "use_cache": False}
_t5 = {"vocab_size": 100, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 3, "num_heads": 2, "use_cache": False}

MODELS: dict[str, Callable[[], Made]] = {
    "GPT-2": build("GPT2", "LMHeadModel", text, **_gpt2, bos_token_id=1, eos_token_id=2),
    "Llama": language("Llama"),
    "Mistral": language("Mistral"),
    "Qwen2": language("Qwen2"),
    "Gemma": language("Gemma", head_dim=16),
    "Phi": language("Phi"),
    "GPT-NeoX": language("GPTNeoX", hidden_dropout=0.1),
    "OPT": build(
        "OPT",
        "ForCausalLM",
        text,
        vocab_size=100,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        use_cache=False,
    ),
    "BLOOM": build(
        "Bloom",
        "ForCausalLM",
        text,
        vocab_size=100,
        hidden_size=32,
        n_layer=3,
        n_head=2,
        hidden_dropout=0.1,
        use_cache=False,
    ),
    "BERT": encoder("Bert"),
    "RoBERTa": encoder("Roberta", pad_token_id=1),
    "DistilBERT": build(
        "DistilBert",
        "ForMaskedLM",
        masked,
        vocab_size=100,
        dim=32,
        hidden_dim=64,
        n_layers=3,
        n_heads=2,
        max_position_embeddings=64,
    ),
    "ALBERT": encoder("Albert", embedding_size=16, hidden_dropout_prob=0.1),
    "ELECTRA": encoder("Electra", embedding_size=16),
    "MPNet": encoder("MPNet"),
    "T5": build("T5", "ForConditionalGeneration", text, **_t5, decoder_start_token_id=0, pad_token_id=0),
    "BART": build("Bart", "ForConditionalGeneration", text, **SEQUENCES, max_position_embeddings=64, use_cache=False),
    "ViT": vision("ViT"),
    "DeiT": vision("DeiT"),
    "BEiT": vision("Beit"),
    "Swin": build(
        "Swin",
        "ForImageClassification",
        pictures,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2, 2],
        num_heads=[1, 2, 4],
        window_size=4,
        num_labels=10,
    ),
    "ConvNext": build(
        "ConvNext",
        "ForImageClassification",
        pictures,
        hidden_sizes=[16, 32],
        depths=[2, 3],
        num_stages=2,
        num_labels=10,
        drop_path_rate=0.1,
    ),
    "DINOv2": vision("Dinov2", mlp_ratio=2),
    "CLIP": clip,
    "Whisper": whisper,
    "Wav2Vec2": wav2vec2,
    "Mamba": build(
        "Mamba",
        "ForCausalLM",
        text,
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=3,
        state_size=8,
        use_cache=False,
        residual_in_fp32=False,
    ),
}

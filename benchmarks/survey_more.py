"""Small random configurations of models that people run out of memory on, each with the arguments of a step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 6}
WORDS, POOLED = (2, 7, 32), (2, 32)


def times() -> Tensor:
    return torch.tensor([1.0, 500.0])


def diffusers(name: str, given: dict[str, Any], call: Callable[[], dict[str, Any]]) -> Callable[[], Made]:
    """A transformer of diffusers."""

    def make() -> Made:
        import diffusers

        return getattr(diffusers, name)(**given), {**call(), "return_dict": False}

    return make


def sd3() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(WORDS),
        "pooled_projections": torch.randn(POOLED),
        "timestep": times(),
    }


def flux() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(WORDS),
        "pooled_projections": torch.randn(POOLED),
        "timestep": times() / 1000,
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.randn(7, 3),
    }


def hunyuan_video() -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 2, 4, 4),
        "encoder_hidden_states": torch.randn(WORDS),
        "encoder_attention_mask": torch.ones(2, 7, dtype=torch.long),
        "pooled_projections": torch.randn(POOLED),
        "timestep": torch.tensor([1, 500]),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }


def on_pictures(**given: Any) -> Callable[[], dict[str, Any]]:
    """Latent pictures, times, and what else is ``given`` as a shape."""
    return lambda: {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 500]),
        **{name: torch.randn(shape) if isinstance(shape, tuple) else shape for name, shape in given.items()},
    }


def on_films(frames: int, channels_first: bool) -> Callable[[], dict[str, Any]]:
    shape = (2, 4, frames, 8, 8) if channels_first else (2, frames, 4, 8, 8)
    return lambda: {
        "hidden_states": torch.randn(shape),
        "encoder_hidden_states": torch.randn(WORDS),
        "timestep": torch.tensor([1, 500]),
    }


def language(name: str, **given: Any) -> Callable[[], Made]:
    """A language model of transformers."""

    def make() -> Made:
        import transformers

        sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 6, "use_cache": False}
        words = torch.randint(5, 100, (2, 32))
        config = getattr(transformers, f"{name}Config")(**{**sizes, **given})
        return getattr(transformers, f"{name}ForCausalLM")(config), {"input_ids": words, "labels": words}

    return make


def wav2vec2() -> Made:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 64}
    config = Wav2Vec2Config(**sizes, **convolutions, **positions, layerdrop=0.0, mask_time_prob=0.0)
    return Wav2Vec2Model(config), {"input_values": torch.randn(2, 1600)}


def esm2() -> Made:
    from transformers import EsmConfig, EsmModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 64}
    config = EsmConfig(
        vocab_size=33, **sizes, position_embedding_type="rotary", token_dropout=True, mask_token_id=32, pad_token_id=1
    )
    words = {"input_ids": torch.randint(4, 30, (2, 20)), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    return EsmModel(config, add_pooling_layer=False), words


def segformer() -> Made:
    from transformers import SegformerConfig, SegformerForImageClassification

    sizes = {"depths": [3] * 4, "hidden_sizes": [16, 32, 40, 64], "decoder_hidden_size": 32}
    return SegformerForImageClassification(SegformerConfig(**sizes)), {"pixel_values": torch.randn(2, 3, 64, 64)}


def segformer_of_smp() -> Made:
    import segmentation_models_pytorch

    net = segmentation_models_pytorch.Segformer("mit_b0", encoder_weights=None, classes=2)
    return net, {"x": torch.randn(2, 3, 64, 64)}


def swinir() -> Made:
    from spandrel.architectures.SwinIR.__arch.SwinIR import SwinIR

    sizes = {"embed_dim": 24, "depths": [6] * 4, "num_heads": [2] * 4, "window_size": 8, "mlp_ratio": 2.0}
    return SwinIR(img_size=16, **sizes, upscale=2, upsampler="pixelshuffledirect"), {"x": torch.randn(1, 3, 16, 16)}


def x_transformers() -> Made:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=6, heads=2, attn_dim_head=16, rotary_pos_emb=True, attn_dropout=0.1, ff_dropout=0.1)
    net = TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers)
    return net, {"x": torch.randint(0, 50, (2, 32))}


PICTURES = {**HEADS, "sample_size": 8, "patch_size": 2}
SD3 = {**PICTURES, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32}
FLUX = {
    "patch_size": 1,
    "in_channels": 4,
    "num_layers": 4,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
}
COG = {
    **HEADS,
    "time_embed_dim": 8,
    "text_embed_dim": 32,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 5,
    "patch_size": 2,
    "max_text_seq_length": 7,
}
WAN = {**HEADS, "attention_head_dim": 12, "patch_size": (1, 2, 2), "text_dim": 32, "freq_dim": 32, "ffn_dim": 32}
HUNYUAN = {
    **HEADS,
    "attention_head_dim": 10,
    "num_layers": 4,
    "num_single_layers": 4,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "guidance_embeds": True,
    "text_embed_dim": 32,
    "pooled_projection_dim": 32,
    "rope_axes_dim": (2, 4, 4),
}
PIXART = {**PICTURES, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 32}
UNET = {
    "sample_size": 16,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (32, 64),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
DEEPSEEK = {
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}


def unet() -> dict[str, Any]:
    words = torch.randn(WORDS)
    return {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([1, 500]), "encoder_hidden_states": words}


MODELS: dict[str, Callable[[], Made]] = {
    "SD3": diffusers("SD3Transformer2DModel", SD3, sd3),
    "Flux": diffusers("FluxTransformer2DModel", FLUX, flux),
    "CogVideoX": diffusers("CogVideoXTransformer3DModel", COG, on_films(2, False)),
    "HunyuanVideo": diffusers("HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_video),
    "Wan": diffusers("WanTransformer3DModel", WAN, on_films(2, True)),
    "DiT": diffusers(
        "DiTTransformer2DModel",
        {**PICTURES, "num_embeds_ada_norm": 10},
        on_pictures(class_labels=torch.tensor([1, 2])),
    ),
    "PixArt": diffusers(
        "PixArtTransformer2DModel",
        {**PIXART, "norm_type": "ada_norm_single", "use_additional_conditions": False},
        on_pictures(encoder_hidden_states=WORDS, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
    ),
    "U-Net of Stable Diffusion": diffusers("UNet2DConditionModel", UNET, unet),
    "DeepSeek-V3": language("DeepseekV3", **DEEPSEEK, experts_implementation="batched_mm"),
    "RWKV": language("Rwkv", attention_hidden_size=32, context_length=64),
    "wav2vec2": wav2vec2,
    "ESM2": esm2,
    "Segformer": segformer,
    "Segformer of segmentation-models": segformer_of_smp,
    "SwinIR": swinir,
    "x-transformers, decoder": x_transformers,
}

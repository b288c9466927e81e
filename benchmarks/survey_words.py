"""Small configurations of models on words and other sequences, of libraries that people install beside torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from survey_building import WORDS, Made, hugging, of, shaped, text, words

LONGFORMER = {
    **WORDS,
    "num_hidden_layers": 6,
    "attention_window": 8,
    "max_position_embeddings": 80,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def masked() -> dict[str, Any]:
    return {"input_ids": words(), "labels": words()}


def longformer() -> dict[str, Any]:
    everywhere = torch.zeros(2, 32, dtype=torch.long)
    everywhere[:, 0] = 1
    return {**masked(), "global_attention_mask": everywhere}


def qwen_vl(name: str) -> Callable[[], Made]:
    """A language model that reads pictures: four patches of a picture stand among the words."""

    def make() -> Made:
        import transformers

        text = {
            **WORDS,
            "num_hidden_layers": 6,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4], "rope_type": "default"},
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        vision = {"depth": 6, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1}
        wide = (
            {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
            if name == "Qwen2VL"
            else {
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 32,
                "window_size": 16,
                "fullatt_block_indexes": [2, 5],
            }
        )
        special = {"image_token_id": 99, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
        config = getattr(transformers, f"{name}Config")(text_config=text, vision_config={**vision, **wide}, **special)
        tokens = torch.randint(5, 90, (1, 24))
        tokens[:, 4], tokens[:, 5:9], tokens[:, 9] = 97, 99, 96
        call = {
            "input_ids": tokens,
            "labels": tokens,
            "mm_token_type_ids": (tokens == 99).long(),
            "pixel_values": torch.randn(16, 48),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
            "use_cache": False,
        }
        return getattr(transformers, f"{name}ForConditionalGeneration")(config), call

    return make


def mamba() -> Made:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=32, n_layers=6, d_state=8, pscan=False)), (torch.randn(2, 16, 32),)


def litgpt(name: str) -> Callable[[], Made]:
    def make() -> Made:
        from litgpt import GPT, Config

        sizes = {"n_layer": 6, "n_embd": 32, "n_head": 2, "block_size": 64, "padded_vocab_size": 100, "vocab_size": 100}
        more = {"n_query_groups": 2, "head_size": 16, "intermediate_size": 64}
        return GPT(Config.from_name(name, **sizes, **more)), (words(),)

    return make


HEADS = {"dim": 32, "depth": 6, "heads": 2, "dim_head": 16}

MODELS: dict[str, Callable[[], Made]] = {
    "transformers Longformer": hugging("Longformer", "ForMaskedLM", masked, **LONGFORMER),
    "transformers Longformer, global attention": hugging("Longformer", "ForMaskedLM", longformer, **LONGFORMER),
    "transformers Qwen2-VL": qwen_vl("Qwen2VL"),
    "transformers Qwen2.5-VL": qwen_vl("Qwen2_5_VL"),
    "transformers BigBird": hugging(
        "BigBird",
        "ForMaskedLM",
        lambda: {"input_ids": words(96), "labels": words(96)},
        **WORDS,
        num_hidden_layers=6,
        block_size=8,
        num_random_blocks=1,
        max_position_embeddings=128,
    ),  # fmt: skip,
    "transformers Autoformer": hugging(
        "Autoformer",
        "Model",
        lambda: {
            "past_values": torch.rand(2, 27),
            "past_time_features": torch.rand(2, 27, 2),
            "past_observed_mask": torch.ones(2, 27),
            "future_values": torch.rand(2, 8),
            "future_time_features": torch.rand(2, 8, 2),
        },
        prediction_length=8,
        context_length=20,
        lags_sequence=[1, 2, 7],
        num_time_features=2,
        d_model=32,
        encoder_layers=4,
        decoder_layers=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        moving_average=5,
    ),  # fmt: skip,
    "transformers PatchTST": hugging(
        "PatchTST",
        "ForPrediction",
        lambda: {"past_values": torch.randn(2, 64, 3), "future_values": torch.randn(2, 8, 3)},
        num_input_channels=3,
        context_length=64,
        patch_length=8,
        patch_stride=8,
        prediction_length=8,
        d_model=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        ffn_dim=64,
        ff_dropout=0.1,
    ),  # fmt: skip,
    "performer": of(
        "performer_pytorch.PerformerLM",
        text(),
        num_tokens=100,
        max_seq_len=32,
        **HEADS,
        causal=False,
        ff_dropout=0.1,
        nb_features=16,
    ),  # fmt: skip,
    "performer, causal": of(
        "performer_pytorch.PerformerLM",
        text(),
        num_tokens=100,
        max_seq_len=32,
        **HEADS,
        causal=True,
        ff_dropout=0.1,
        nb_features=16,
    ),  # fmt: skip,
    "linear-attention-transformer": of(
        "linear_attention_transformer.LinearAttentionTransformerLM",
        text(),
        num_tokens=100,
        max_seq_len=32,
        **HEADS,
        ff_dropout=0.1,
        attn_layer_dropout=0.1,
    ),  # fmt: skip,
    "reformer": of(
        "reformer_pytorch.ReformerLM",
        text(),
        num_tokens=100,
        max_seq_len=32,
        **HEADS,
        bucket_size=8,
        n_hashes=2,
        ff_dropout=0.1,
    ),  # fmt: skip,
    "local-attention": of(
        "local_attention.LocalTransformer",
        text(),
        num_tokens=100,
        max_seq_len=32,
        **HEADS,
        local_attn_window_size=8,
        ff_dropout=0.1,
        num_residual_streams=1,
    ),  # fmt: skip,
    "nystromformer": of(
        "nystrom_attention.Nystromformer", shaped(2, 32, 32), **HEADS, num_landmarks=8, ff_dropout=0.1
    ),  # fmt: skip,
    "perceiver": of(
        "perceiver_pytorch.Perceiver",
        shaped(2, 8, 8, 3),
        num_freq_bands=2,
        depth=4,
        max_freq=4.0,
        num_latents=8,
        latent_dim=32,
        latent_dim_head=16,
        cross_dim_head=16,
        latent_heads=2,
        num_classes=3,
        self_per_cross_attn=2,
        ff_dropout=0.1,
    ),  # fmt: skip,
    "denoising-diffusion U-Net": of(
        "denoising_diffusion_pytorch.Unet",
        lambda: (torch.randn(2, 3, 16, 16), torch.tensor([1, 5])),
        dim=16,
        dim_mults=(1, 2),
        dropout=0.1,
    ),  # fmt: skip,
    "mambapy Mamba": mamba,
    "litgpt Pythia": litgpt("pythia-14m"),
    "litgpt Llama": litgpt("Llama-2-7b-hf"),
    "litgpt Gemma 2": litgpt("Gemma-2-2b"),
}

"""Small configurations of models on sound, of libraries that people install beside torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from survey_building import SPECIAL, Made, hugging, of, shaped, words

SOUND = {
    "hidden_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}


def heard(length: int = 1600) -> Callable[[], dict[str, Any]]:
    return lambda: {"input_values": torch.randn(2, length)}


def whisper(**given: Any) -> Callable[[], Made]:
    sizes = {
        "vocab_size": 100,
        "d_model": 32,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "max_target_positions": 40,
        "dropout": 0.1,
        "decoder_start_token_id": 1,
        "use_cache": False,
        "mask_time_prob": 0.0,
        **SPECIAL,
    }
    call = lambda: {"input_features": torch.randn(2, 8, 40), "labels": words()}  # noqa: E731
    return hugging("Whisper", "ForConditionalGeneration", call, **sizes, **given)


def musicgen() -> Made:
    import transformers

    config = transformers.MusicgenDecoderConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=6,
        ffn_dim=64,
        num_attention_heads=2,
        num_codebooks=2,
        max_position_embeddings=64,
        layerdrop=0.1,
        use_cache=False,
        pad_token_id=50,
        bos_token_id=50,
    )
    call = {"input_ids": torch.randint(0, 50, (4, 16)), "encoder_hidden_states": torch.randn(2, 7, 32)}
    return transformers.MusicgenForCausalLM(config), call


def encodec() -> Made:
    import transformers

    config = transformers.EncodecConfig(
        num_filters=4,
        num_residual_layers=3,
        upsampling_ratios=[4, 2],
        hidden_size=16,
        codebook_dim=16,
        codebook_size=16,
        num_lstm_layers=2,
    )
    return transformers.EncodecModel(config), {"input_values": torch.randn(2, 1, 800)}


def conformer(name: str, **given: Any) -> Callable[[], Made]:
    """An encoder of speechbrain, with its relative positions."""

    def make() -> Made:
        from importlib import import_module

        module = import_module(f"speechbrain.lobes.models.transformer.{name}")
        net = getattr(module, f"{name}Encoder")(num_layers=6, d_model=32, nhead=2, kernel_size=7, dropout=0.1, **given)
        return net, {"src": torch.randn(2, 16, 32), "pos_embs": torch.randn(1, 31, 32)}

    return make


HEADS = {"dim": 32, "depth": 6, "heads": 2, "dim_head": 16}


FRONT = [(16, 10, 5), (16, 3, 2)]

MODELS: dict[str, Callable[[], Made]] = {
    "transformers Whisper, LayerDrop": whisper(encoder_layerdrop=0.1, decoder_layerdrop=0.1),
    "transformers MusicGen, LayerDrop": musicgen,
    "transformers HuBERT": hugging("Hubert", "Model", heard(), **SOUND),
    "transformers WavLM": hugging("WavLM", "Model", heard(), **SOUND),
    "transformers EnCodec": encodec,
    "conformer": of("conformer.Conformer", shaped(2, 16, 32), **HEADS, conv_kernel_size=7, ff_dropout=0.1),
    "torchaudio Conformer": of(
        "torchaudio.models.Conformer",
        lambda: (torch.randn(2, 16, 32), torch.tensor([16, 12])),
        input_dim=32,
        num_heads=2,
        ffn_dim=64,
        num_layers=6,
        depthwise_conv_kernel_size=7,
        dropout=0.1,
    ),  # fmt: skip,
    "torchaudio Emformer": of(
        "torchaudio.models.Emformer",
        lambda: (torch.randn(2, 18, 32), torch.tensor([16, 16])),
        32,
        2,
        64,
        6,
        4,
        dropout=0.1,
        right_context_length=2,
    ),  # fmt: skip,
    "torchaudio Conv-TasNet": of(
        "torchaudio.models.ConvTasNet",
        shaped(2, 1, 800),
        enc_num_feats=16,
        msk_num_feats=16,
        msk_num_hidden_feats=32,
        msk_num_layers=4,
        msk_num_stacks=2,
    ),  # fmt: skip,
    "torchaudio wav2vec 2.0, LayerDrop": of(
        "torchaudio.models.wav2vec2_model",
        shaped(2, 1600),
        "group_norm",
        FRONT,
        False,
        32,
        0.1,
        16,
        2,
        6,
        2,
        0.1,
        64,
        0.1,
        0.1,
        False,
        0.1,
        None,
    ),  # fmt: skip,
    "torchaudio HDemucs": of(
        "torchaudio.models.HDemucs", shaped(1, 2, 16384), ["a", "b"], channels=8, nfft=1024, depth=4
    ),  # fmt: skip,
    "torchaudio Wav2Letter": of(
        "torchaudio.models.Wav2Letter", shaped(1, 1, 2000), num_classes=5, input_type="waveform"
    ),  # fmt: skip,
    "speechbrain Conformer": conformer("Conformer", d_ffn=64),
    "speechbrain Branchformer": conformer("Branchformer", csgu_linear_units=64),
    "speechbrain Transformer": of(
        "speechbrain.lobes.models.transformer.Transformer.TransformerEncoder",
        shaped(2, 16, 32),
        6,
        2,
        64,
        d_model=32,
        dropout=0.1,
        normalize_before=True,
    ),  # fmt: skip,
    "speechbrain ECAPA-TDNN": of(
        "speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN",
        shaped(2, 40, 20),
        20,
        channels=[32] * 5,
        attention_channels=8,
        se_channels=8,
        lin_neurons=16,
        res2net_scale=4,
    ),  # fmt: skip,
}

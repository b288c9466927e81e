"""One small model of every timm family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import nn

Made = tuple[nn.Module, Any]
_SMALL_FIRST = "atto femto pico nano xxtiny xxs xtiny tiny _ti_ mini _xs _s0 _t0 b0 _a0 _002 18 _s small 26".split()


def _models() -> Iterator[tuple[str, Callable[[], Made]]]:
    """One model for each timm family: the smallest of those whose names promise it."""
    for family in timm.list_modules():
        names = [name for name in timm.list_models(module=family) if not name.startswith("test_")]
        if names:
            yield family, lambda names=names: _timm_model(names)


def _timm_model(names: list[str]) -> Made:
    def rank(name: str) -> int:
        return next((i for i, word in enumerate(_SMALL_FIRST) if word in name), len(_SMALL_FIRST))

    sizes = {}
    for name in sorted(names, key=rank)[:3]:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    name = min(sizes, key=sizes.__getitem__)
    image = timm.get_pretrained_cfg(name).input_size[-1]
    dropout = {"drop_rate": 0.1, "drop_path_rate": 0.1}
    narrow = {"depth": 4, "embed_dim": 48, "num_heads": 3}
    for size in (64, image):
        for shrunk in (narrow, {}) if sizes[name] > 8e6 else ({},):
            for given in ({**dropout, "img_size": size}, dropout, {"drop_rate": 0.1}, {}):
                try:
                    model = timm.create_model(name, num_classes=5, **given, **shrunk)
                    inputs = (torch.randn(2, 3, size, size),)
                    model.eval()(*inputs)
                except Exception:
                    continue
                return model, inputs
    raise RuntimeError(f"{name} could not be built and run")


MODELS = dict(_models())

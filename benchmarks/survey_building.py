"""What the surveys' files of models build them with."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, Any]
WORDS = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def of(path: str, call: Callable[[], Any], *args: Any, **given: Any) -> Callable[[], Made]:
    """The class or function at ``path``, called with the arguments, and the inputs of ``call``."""

    def make() -> Made:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)(*args, **given), call()

    return make


def shaped(*shape: int) -> Callable[[], tuple[Tensor]]:
    """One tensor of normal numbers."""
    return lambda: (torch.randn(shape),)


def words(length: int = 32, upto: int = 100) -> Tensor:
    return torch.randint(5, upto, (2, length))


def text(length: int = 32) -> Callable[[], tuple[Tensor]]:
    return lambda: (words(length),)


def hugging(name: str, kind: str, call: Callable[[], dict[str, Any]], **given: Any) -> Callable[[], Made]:
    """The model ``name + kind`` of transformers."""

    def make() -> Made:
        import transformers

        config = getattr(transformers, f"{name}Config")(**given)
        return getattr(transformers, f"{name}{kind}")(config), call()

    return make

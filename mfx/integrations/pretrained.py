"""Pretrained: a momentumized Hugging Face model from where ``save_pretrained`` put it.

The configuration has the recipe (:mod:`mfx.model.saved`).  A directory without one, of a plain model, is momentumized
with the options given.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mfx.errors import InputTypeError, OptionError, PlanChangedError
from mfx.model import momentumize
from mfx.model.parts import ADDED
from mfx.model.saved import MARK, RECIPE, inputs_of, learned_of, options_of, recipe_of

_LEARNED = [rf"(^|\.){name}\." for name in sorted(ADDED)]


def from_pretrained(source: Any, path: Any = None, **given: Any) -> nn.Module:
    """The momentumized Hugging Face model that its own ``save_pretrained`` saved.

    Args:
        source: the directory, or the model's class (an ``AutoModel...`` too) with the directory as ``path``.
            Without a class it is the one that was saved.
        path: the directory, where ``source`` is a class.
        given: options of :func:`mfx.momentumize`, which come before those saved; everything else goes to
            ``from_pretrained`` of the class.

    Returns:
        The same function as the model that was saved; of a plain model, what :func:`mfx.momentumize` makes of it.

    Raises:
        OptionError: an option that is Python (a rule of one's own) has to be given again; the network has learned
            velocities, or gammas that modules of one's own give; or the directory is that of a plain model and no
            gamma is given.
        PlanChangedError: the chains are not those of the model that was saved.

    Example:
        >>> import tempfile, torch, transformers, mfx
        >>> sizes = dict(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
        >>> model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
        >>> words = torch.ones(1, 4, dtype=torch.long)
        >>> mm = mfx.momentumize(model, gamma=0.5, example_inputs={"input_ids": words})
        >>> with tempfile.TemporaryDirectory() as path:
        ...     mm.save_pretrained(path)
        ...     again = mfx.from_pretrained(path).eval()
        >>> torch.equal(again(words)[0], mm(words)[0])
        True
    """
    names = set(inspect.signature(momentumize).parameters) - {"model"}
    asked = {name: given.pop(name) for name in names & set(given)}
    transformers = _transformers()
    kind, where = (source, path) if isinstance(source, type) else (None, source)
    if where is None:
        raise InputTypeError(f"from_pretrained({source.__name__}) needs the path of what was saved, too")
    config = given.pop("config", None) or transformers.AutoConfig.from_pretrained(where)
    recipe = getattr(config, RECIPE, None)
    kind = _concrete(kind, config, transformers)
    with _knowing_the_mark(kind):
        model = kind.from_pretrained(where, config=config, **given)
    if recipe is None:
        if "gamma" not in asked:
            raise OptionError(
                f"{where} has no momentum network saved in it: give gamma= to make one of the plain model"
            )
        return momentumize(model, **asked)
    for held in {id(one): one for one in (config, model.config)}.values():
        if hasattr(held, RECIPE):
            delattr(held, RECIPE)
    return _as_saved(model, recipe, asked)


def _as_saved(model: nn.Module, recipe: dict[str, Any], asked: dict[str, Any]) -> nn.Module:
    """``model`` momentumized by its recipe."""
    example = asked.pop("example_inputs", None)
    if example is None and recipe["example"] is not None:
        device = next(model.parameters()).device
        with torch.random.fork_rng(devices=[]), torch.device(device):
            example = inputs_of(recipe["example"])
    mm = momentumize(model, example_inputs=example, **options_of(recipe, asked))
    if "gamma" not in asked and "rule" not in asked:
        mm.load_state_dict(learned_of(recipe), strict=False)
    found = recipe_of(mm)["chains"]
    if found != recipe["chains"] and not asked:
        raise PlanChangedError(
            f"the model that was saved has the chains {recipe['chains']}, and as it is loaded {found}: another version "
            "of the model's library, perhaps. Give the options again (include=, exclude=, gamma=) for chains of now"
        )
    return mm


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise OptionError("mfx.from_pretrained loads models of transformers: pip install transformers") from error


def _concrete(kind: Any, config: Any, transformers: Any) -> Any:
    """The class that is loaded: the one saved, the one given, or what an AutoModel takes for this configuration."""
    if kind is None:
        (name,) = config.architectures or ("",)
        if not hasattr(transformers, name):
            raise OptionError(f"transformers has no {name or 'class named in the configuration'}: give the class first")
        return getattr(transformers, name)
    if hasattr(kind, "from_config"):
        with torch.device("meta"):
            return type(kind.from_config(config))
    return kind


@contextlib.contextmanager
def _knowing_the_mark(kind: Any) -> Iterator[None]:
    """Load without a word about the tensor by which the plain class is told that the file is a momentum network's."""
    name, own = "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_unexpected" in vars(kind)
    before = getattr(kind, name, None)
    setattr(kind, name, [*(before or ()), MARK, *_LEARNED])
    try:
        yield
    finally:
        setattr(kind, name, before) if own else delattr(kind, name)

"""Models that save themselves, with what makes them momentum networks."""

from mfx.model.saved.classes import saving, saving_methods
from mfx.model.saved.printed import described
from mfx.model.saved.recipe import EXAMPLE, MARK, RECIPE, form_of, inputs_of, learned_of, options_of, recipe_of

__all__ = [
    "EXAMPLE",
    "MARK",
    "RECIPE",
    "described",
    "form_of",
    "inputs_of",
    "learned_of",
    "options_of",
    "recipe_of",
    "saving",
    "saving_methods",
]

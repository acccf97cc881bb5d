"""One recipe of training, on accelerate: adapters, heads and whole models, on one process or on several.

from point_peft.training import Recipe, fit
run = fit(model, train, val, Recipe(epochs=50, lr=3e-3), out="runs/first")
"""

from point_peft.training.answers import Comparison
from point_peft.training.comparing import compare
from point_peft.training.fitting import Run, fit
from point_peft.training.recipe import Recipe

__all__ = ["Comparison", "Recipe", "Run", "compare", "fit"]

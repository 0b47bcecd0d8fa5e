"""docs/recipes.json: whole runs of the recipes that there are, and the table made of them."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from bigops.recipes.catalog import RECIPES

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_table", DOCS / "recipes_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kept_runs_meet_the_bars_of_today() -> None:
    module = _module()
    runs = json.loads((DOCS / "recipes.json").read_text())
    assert module.merged(runs, []) == runs
    for run in runs:
        recipe = RECIPES[run["recipe"]]
        assert (run["bar"], run["options"]["epochs"]) == (recipe.bar, recipe.epochs)
        assert run["holds"] == recipe.holds(run["value"])
    text = module.table(runs)
    for name in {run["recipe"] for run in runs}:
        assert f"| `{name}` | {RECIPES[name].purpose} |" in text


def test_the_newest_run_of_a_seed_is_kept_and_a_shortened_one_refused() -> None:
    module = _module()
    run = {
        "recipe": "mnist",
        "value": 1.0,
        "holds": True,
        "options": {"seed": 0, "precision": "fp32"},
        "curves": {},
        "seconds": 2.0,
        "cpu_seconds": 3.0,
    }
    other = {**run, "options": {"seed": 1, "precision": "fp32"}}
    found = module.merged([run], [other, {**run, "value": 2.0}])
    assert [(r["options"]["seed"], r["value"]) for r in found] == [(0, 2.0), (1, 1.0)]
    assert "curves" not in found[0]
    assert "test accuracy 2, 1% (seeds 0, 1)" in module.table(found)
    with pytest.raises(ValueError, match="mnist: expected a whole run; got one with --epochs"):
        module.merged([], [{**run, "holds": None}])

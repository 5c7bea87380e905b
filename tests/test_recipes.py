"""Recipes fail on anything they do not know, and every shipped recipe is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from device.records import SlimpiError
from pipeline.build import chosen_variants
from pipeline.exporters import EXPORTERS
from pipeline.recipes import read_recipe
from pipeline.sources import NO_SOURCE
from pipeline.tweets.classifiers import CLASSIFIERS, settings_of, with_max_tokens

MODELS = Path(__file__).parent.parent / "models"
GOOD = 'name = "m"\nsource = "path:x"\nexport = "gguf"\nvariants = ["F16", "Q8_0"]\n'


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_recipe_is_valid_and_pinned(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem
    assert chosen_variants(recipe, EXPORTERS[recipe.export], None) == recipe.variants
    assert recipe.sha256 or not recipe.source.startswith("pypi:")
    assert set(recipe.sha256) != {"0"}
    if train := recipe.train:
        settings_of(train.classifier, with_max_tokens(train.classifier, train.settings, recipe.max_tokens))
        assert CLASSIFIERS[train.classifier].needs_source == (recipe.source != NO_SOURCE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "varients = []\n", "varients"),
        (GOOD + "[bench]\nn_contexts = 4\n", "n_contexts"),
        (GOOD.replace('"path:x"', "7"), "source"),
        (GOOD.replace('"gguf"', '"exe"'), "exe"),
        (GOOD.replace('["F16", "Q8_0"]', "[]"), "variants"),
        (GOOD.replace('"Q8_0"', '"F16"'), "twice"),
        (GOOD.replace('"m"', '"../m"'), "not a plain name"),
        (GOOD + "[calibration]\nn_ctx = 0\n", "n_ctx"),
        (GOOD + '[train]\nclassifier = "tfidf"\n', r"\[train\] needs export"),
        ("name = ", "recipe"),
    ],
)
def test_bad_recipe_names_the_culprit(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(SlimpiError, match=expected):
        read_recipe(path)


def test_missing_recipe_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(SlimpiError, match=r"nowhere\.toml"):
        read_recipe(tmp_path / "nowhere.toml")


def test_unknown_variant_lists_the_known(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(GOOD.replace("Q8_0", "Q99"))
    recipe = read_recipe(path)
    with pytest.raises(SlimpiError, match=r"'Q99'.*Known: .*Q4_K_M"):
        chosen_variants(recipe, EXPORTERS["gguf"], None)


def test_only_keeps_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(GOOD)
    recipe = read_recipe(path)
    assert chosen_variants(recipe, EXPORTERS["gguf"], ["Q8_0"]) == ["F16", "Q8_0"]
    assert chosen_variants(recipe, EXPORTERS["gguf"], ["F16"]) == ["F16"]

"""The ProVerif model's variants, as far as they can be checked without ProVerif."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_run", Path(__file__).parent / "model" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and named tuples look their module up
    spec.loader.exec_module(module)
    return module


def test_every_edit_of_every_variant_occurs_exactly_once_in_the_model(model: ModuleType) -> None:
    assert model.stale_edits() == []


def test_an_edit_that_no_longer_applies_is_reported(model: ModuleType) -> None:
    model.VARIANTS.append(model.broken("stale", "words-bob", ("this is not in the model", "")))
    assert len(model.stale_edits()) == 1
    assert "0 places, not one" in model.stale_edits()[0]


def test_every_variant_is_about_claims_that_there_are(model: ModuleType) -> None:
    runs = model.plan()
    assert {run.variant for run in runs} == set(model.VARIANTS)
    names = [claim.name for claim in model.Template.read().claims]
    assert len(names) == len(set(names))

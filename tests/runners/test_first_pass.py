"""The pass over the data that Kronecker methods fill their factors with."""

import pandas as pd
import pytest

BUDGET = ("task=autoencoder_curves_small", "budget.epochs=1")


@pytest.mark.parametrize(("optimizer", "has_pass"), [("tnt", True), ("sgdm", False)])
def test_first_pass_is_counted_before_the_first_row(train, optimizer, has_pass):
    rows = pd.read_csv(train(*BUDGET, f"optimizer={optimizer}") / "metrics.csv")
    first = rows.iloc[0]
    assert first.step == 0
    assert (first.gradient_equivalents > 0) == has_pass
    assert (first.train_seconds > 0) == has_pass

from types import SimpleNamespace

import pytest

from runners.config import ConfigError
from runners.tune import candidates, select

LR = {"lr": {"cnn": [1e-3, 1.0], "source": "here"}}
SPACES = {"lr": (0.1, 0.3)}


def trial(value, status="finished", accuracy=0.5, loss=1.0, steps=10):
    summary = {"status": status, "final": {"val_accuracy": accuracy, "val_loss": loss}, "steps": steps}
    return SimpleNamespace(
        values={"lr": value},
        pair=("cnn_digits", "sgdm"),
        folder=SimpleNamespace(parts=("r", "cnn_digits", "sgdm", f"{value}")),
        summary=lambda: summary,
        is_done=lambda: status in ("finished", "diverged"),
    )


def test_one_number_is_searched_on_a_log_grid_ends_included():
    assert candidates(LR, "cnn", 4) == [{"lr": 0.001}, {"lr": 0.01}, {"lr": 0.1}, {"lr": 1.0}]


def test_more_numbers_are_searched_by_the_same_sobol_points_every_time():
    search = LR | {"eps": {"cnn": [1e-8, 1e-4]}}
    settings = candidates(search, "cnn", 8)
    assert settings == candidates(search, "cnn", 8)
    assert len({s["lr"] for s in settings}) == len({s["eps"] for s in settings}) == 8
    assert all(1e-3 <= s["lr"] <= 1 and 1e-8 <= s["eps"] <= 1e-4 for s in settings)
    assert sum(s["lr"] < 0.0316 for s in settings) == 4  # Sobol: half of the points in each half of the box


def test_what_is_not_searched_has_no_trials_and_a_missing_family_is_named():
    assert candidates({}, "cnn", 4) == []
    with pytest.raises(ConfigError, match="no search space for lr on family gcn"):
        candidates(LR, "gcn", 4)


def test_the_best_final_value_on_validation_is_selected():
    jobs = [trial(0.1, accuracy=0.6), trial(0.2, accuracy=0.9), trial(0.3, accuracy=0.7)]
    outcome = select(jobs, SPACES, "val_accuracy", "max")
    assert (outcome["selected"], outcome["score"], outcome["on_edge"]) == ({"lr": 0.2}, 0.9, False)
    assert [t["score"] for t in outcome["trials"]] == [0.6, 0.9, 0.7]
    assert outcome["trials"][0]["folder"] == "cnn_digits/sgdm/0.1"
    assert select(jobs, SPACES, "val_loss", "min")["selected"] == {"lr": 0.1}


def test_equal_accuracies_are_told_apart_by_loss():
    jobs = [trial(0.1, loss=0.3), trial(0.2, loss=0.1), trial(0.3, loss=0.2)]
    assert select(jobs, SPACES, "val_accuracy", "max")["selected"] == {"lr": 0.2}


@pytest.mark.parametrize("best", [0.1, 0.3])
def test_a_best_value_at_an_end_of_the_grid_is_flagged(best):
    jobs = [trial(value, accuracy=0.9 if value == best else 0.5) for value in (0.1, 0.2, 0.3)]
    assert select(jobs, SPACES, "val_accuracy", "max")["on_edge"]


@pytest.mark.parametrize(("value", "flagged"), [(1.8e-3, True), (3e-3, False), (0.4, False), (0.6, True)])
def test_the_edge_of_a_space_is_its_outer_tenth_whatever_else_was_tried(value, flagged):
    assert select([trial(value)], {"lr": (1e-3, 1.0)}, "val_accuracy", "max")["on_edge"] == flagged


def test_diverged_and_failed_trials_lose():
    jobs = [trial(0.1, "diverged", accuracy=1.0), trial(0.2, "failed", accuracy=1.0), trial(0.3, accuracy=0.2)]
    outcome = select(jobs, SPACES, "val_accuracy", "max")
    assert outcome["selected"] == {"lr": 0.3}
    assert [t["score"] for t in outcome["trials"]] == [None, None, 0.2]


def test_if_all_diverged_the_one_that_lasted_longest_stands():
    outcome = select([trial(0.1, "diverged", steps=7), trial(0.2, "diverged", steps=3)], SPACES, "val_accuracy", "max")
    assert (outcome["selected"], outcome["score"]) == ({"lr": 0.1}, None)


def test_a_search_without_any_result_is_an_error():
    with pytest.raises(ConfigError, match="tuning sgdm on cnn_digits: no trial has a result"):
        select([trial(0.1, "failed")], SPACES, "val_accuracy", "max")

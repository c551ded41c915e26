"""The ablation table, and the configs that make its runs."""

import pytest
import yaml
from hydra import compose, initialize_config_dir
from make_records import METHODS, Planted, write_run
from omegaconf import OmegaConf

from analysis.ablation import ablation
from analysis.records import load
from runners.config import CONFIGS

ABLATIONS = sorted(path.stem for path in (CONFIGS / "experiment").glob("ablation_*.yaml"))


def test_a_row_per_value_of_what_varies(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "gcn_sbm", "lw_sgdm", seed, METHODS["lw_sgdm"], values={"lr": 0.1})
        write_run(tmp_path, "gcn_sbm", "lw_sgdm", seed, Planted(diverges=seed == 2), values={"lr": 0.2})
    table = ablation(load(tmp_path))
    assert table.lr.tolist() == ["0.1", "0.2"]
    assert table.n.tolist() == [3, 2]
    assert table.diverged.tolist() == [0, 1]
    losses = [run["final_train_loss"] for _, run in load(tmp_path).runs.iterrows() if run.status == "finished"]
    assert (table.train_loss_mean * table.n).sum() == pytest.approx(sum(losses))
    assert (table.train_loss_std > 0).all()


def test_a_setting_that_is_none_has_its_row(tmp_path):
    for value in (0.1, None):
        write_run(tmp_path, "gcn_sbm", "lw_sgdm", 0, METHODS["lw_sgdm"], values={"lr": value})
    assert ablation(load(tmp_path)).lr.tolist() == ["0.1", "null"]


def test_runs_that_differ_in_nothing_are_an_error(tmp_path):
    write_run(tmp_path, "gcn_sbm", "lw_sgdm", 0, METHODS["lw_sgdm"])
    with pytest.raises(ValueError, match="no optimizer setting differs"):
        ablation(load(tmp_path))


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_varies_a_field_of_both_methods_around_their_defaults(name):
    field = name.removeprefix("ablation_")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", [f"experiment={name}"], return_hydra_config=True)
    assert cfg.results.root == f"results/ablation/{field}"
    params = OmegaConf.to_container(cfg.hydra.sweeper.params)
    values = [yaml.safe_load(value) for value in str(params[f"optimizer.{field}"]).split(",")]
    for optimizer in params["optimizer"].split(","):
        assert OmegaConf.load(CONFIGS / "optimizer" / f"{optimizer}.yaml")[field] in values

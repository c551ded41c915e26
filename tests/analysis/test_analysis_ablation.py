"""The ablation table, and the configs that make its runs."""

import shutil

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir
from make_records import METHODS, Planted, write_run
from omegaconf import OmegaConf

from analysis.ablation import ablation, without_effect
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


def rewrite(root, optimizer, **changes):
    """Change what the config of every run of a method says."""
    for path in root.glob(f"runs/*/{optimizer}/*/config.yaml"):
        config = yaml.safe_load(path.read_text())
        config["optimizer"]["about"] |= changes.get("about", {})
        config |= {name: value for name, value in changes.items() if name != "about"}
        path.write_text(yaml.dump(config, sort_keys=False))


def test_the_latest_version_of_a_method_counts_alone(tmp_path):
    for lr, version in ((0.1, 1), (0.2, 1), (0.1, 2), (0.3, 2)):
        root = tmp_path / str(version)
        write_run(root, "gcn_sbm", "lw_sgdm", version, METHODS["lw_sgdm"], values={"lr": lr})
        rewrite(root, "lw_sgdm", about={"version": version})
        shutil.copytree(root, tmp_path / "both", dirs_exist_ok=True)
    table = ablation(load(tmp_path / "both"))
    assert table[["lr", "n", "version"]].to_numpy().tolist() == [["0.1", 1, 2], ["0.3", 1, 2]]
    assert without_effect(table) == []


def test_runs_that_differ_in_more_than_settings_are_no_ablation(tmp_path):
    for lr, root in ((0.1, tmp_path / "a"), (0.2, tmp_path / "b")):
        write_run(root, "gcn_sbm", "lw_sgdm", 0, METHODS["lw_sgdm"], values={"lr": lr})
    rewrite(tmp_path / "b", "lw_sgdm", budget={"epochs": 7})
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="lw_sgdm on gcn_sbm differ in budget, too"):
        ablation(load(tmp_path / "b"))


def test_a_setting_that_did_not_act_is_named():
    same = {"task": "t", "optimizer": "o", "every": ["1", "3"], "n": 3, "train_loss_mean": 1.5}
    assert without_effect(pd.DataFrame(same)) == ["o on t"]
    assert without_effect(pd.DataFrame(same | {"train_loss_mean": [1.5, 1.6]})) == []


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

"""A stranger's config calls nothing of its own choosing, and records tell nothing about who made them."""

import getpass
import os
import socket
import subprocess
import sys

import pytest
import torch

from runners import assembly, trainer
from runners.config import CONFIGS, ConfigError, resolve
from runners.record import read_summary

DIGITS = ("task=cnn_digits", "optimizer=sgdm", "budget.steps=3")
SECRETS = {
    "WANDB_API_KEY": "0123456789planted0key9876543210abcdefabcd",
    "HF_TOKEN": "hf_planted_token",
    "USER": "jane.doe",
}


@pytest.mark.parametrize(
    "target",
    ["os.system", "subprocess.run", "builtins.eval", "torch.load", "optimizersx.evil", "runners.sweep.make"],
)
@pytest.mark.parametrize("place", ["optimizer._target_", "task.model._target_", "+task.data.inner._target_"])
def test_only_declared_packages_are_called(compose, place, target):
    with pytest.raises(ConfigError, match="only these packages may be named"):
        resolve(compose(*DIGITS, f"{place}={target}"))


@pytest.mark.parametrize(
    "target",
    [
        "data.checksums.os.system",  # along an import of a module of ours
        "data.checksums.hashlib.sha256",
        "torch.optim.sgd.torch.load",
        "torch.optim.Optimizer.__init__.__globals__",
        "models.likelihoods.Bernoulli.__class__",
    ],
)
def test_names_that_lead_out_of_a_declared_package_are_refused(train, tmp_path, target):
    with pytest.raises(ConfigError, match=r"is no class or function of|cannot be imported"):
        train(*DIGITS, f"task.likelihood._target_={target}")
    assert not (tmp_path / "results").exists()


def test_every_config_of_ours_is_callable(compose):
    from runners.config import check_callables

    groups = {"task": "cnn_digits", "optimizer": "sgdm", "schedule": "constant"}
    for group in groups:
        for path in sorted((CONFIGS / group).glob("*.yaml")):
            epochs = ("budget.steps=null", "budget.epochs=1")  # cosine has no other length
            check_callables(resolve(compose(*DIGITS, f"{group}={path.stem}", *epochs)))


@pytest.mark.parametrize("field", ["task.name", "optimizer.about.label", "+optimizer.note", "profile.name"])
def test_environment_variables_do_not_get_into_a_record(compose, monkeypatch, field):
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    with pytest.raises(ConfigError, match="only data, results, tracker may read environment variables"):
        resolve(compose(*DIGITS, field + "=${oc.env:WANDB_API_KEY}"))


def test_nothing_written_names_a_secret_a_person_or_a_machine(tmp_path):
    """A sweep with a run that finishes and one that fails, mirrored offline; every byte it leaves is looked at."""
    home = tmp_path / "jane.doe"
    home.mkdir()
    fail = ("task.likelihood._target_=models.likelihoods.Categorical,models.likelihoods.Bernoulli",)
    command = [sys.executable, "-m", "runners.train", *DIGITS, *fail, "device=cpu", "tracker=wandb_offline", "-m"]
    environment = os.environ | SECRETS | {"HOME": str(home), "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    records = sorted(path.parent for path in home.glob("results/*/*/*/summary.json"))
    assert sorted(read_summary(folder)["status"] for folder in records) == ["failed", "finished"]
    names = [*SECRETS.values(), str(tmp_path), str(CONFIGS.parent)]
    names += [name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 4]  # shorter ones by chance
    for path in home.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            found = [name for name in names if name.encode() in content]
            assert not found, f"{path} holds {found}"


def test_streams_of_randomness_are_independent(train, tmp_path, monkeypatch):
    """Another seed of one stream changes nothing that the other streams draw."""
    seeds, begin = trainer.stream_seed, trainer.Trainer._open_epoch
    drawn = {}

    def open_epoch(self, skip=0):
        drawn[changed] = {
            "init": next(self.model.parameters()).detach().clone(),
            "dropout": torch.get_rng_state(),
            **{stream: generator.get_state() for stream, generator in self.generators.items()},
        }
        begin(self, skip)

    def derived(seed, name):
        return seeds(seed + (name == changed), name)

    monkeypatch.setattr(trainer.Trainer, "_open_epoch", open_epoch)
    for module in (assembly, trainer):
        monkeypatch.setattr(module, "stream_seed", derived)
    streams = ("init", "dropout", "order", "augmentation", "labels")
    for changed in (None, *streams):
        train(*DIGITS, f"results.root={tmp_path}/{changed}")
    for changed in streams:
        differing = {stream for stream in streams if not torch.equal(drawn[changed][stream], drawn[None][stream])}
        assert differing == {changed}

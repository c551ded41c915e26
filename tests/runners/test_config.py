import shlex
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from analysis.alike import variant_of
from analysis.report import command
from runners.config import ConfigError, digest, resolve, run_folder, stream_seed

BASE = ("task=cnn_digits", "optimizer=sgdm", "budget.epochs=2")


def hash_of(compose, *overrides):
    return run_folder(resolve(compose(*BASE, *overrides))).name


@pytest.mark.parametrize(
    "override",
    [
        "seed=1", "holdout=true", "threads=2", "budget.epochs=3", "optimizer.lr=0.02", "optimizer.about.version=2",
        "optimizer=sgd", "task.version=2", "task.batch_size=32", "task=gcn_sbm", "schedule=step", "task.weight_decay=0",
        "task.model.channels=[8,8]", "+optimizer.nesterov=true",
    ],
)  # fmt: skip
def test_hash_tells_apart_what_determines_the_result(compose, override):
    assert hash_of(compose, override) != hash_of(compose)


@pytest.mark.parametrize(
    "override",
    [
        "results.root=elsewhere", "data.root=elsewhere", "data.cache=elsewhere", "tracker=wandb_offline",
        "launcher.contended=true", "progress=true", "optimizer.about.label=other", "optimizer.search=null",
        "profile=cpu", "tuning={trials:4}", "optimizer.lr=0.010", "budget.epochs=2.0",
    ],
)  # fmt: skip
def test_hash_is_blind_to_place_and_looks(compose, override, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hash_of(compose, override) == hash_of(compose)


def test_thread_count_does_not_determine_results_on_cuda(compose):
    one, two = (resolve(compose(*BASE, f"threads={n}")) for n in (1, 2))
    one.device = two.device = "cuda:0"
    assert run_folder(one) == run_folder(two)
    two.device = "cuda:1"
    assert run_folder(one) == run_folder(two)


def test_an_explicit_budget_and_the_same_one_of_a_profile_are_one_run(compose):
    cfg = compose("task=cnn_digits", "optimizer=sgdm")
    explicit = f"budget.epochs={cfg.profile.budgets.cnn_digits.epochs}"
    assert run_folder(resolve(cfg)) == run_folder(resolve(compose("task=cnn_digits", "optimizer=sgdm", explicit)))


def test_folder_is_task_optimizer_hash(compose):
    cfg = resolve(compose(*BASE))
    assert run_folder(cfg).parts[-3:] == ("cnn_digits", "sgdm", digest(OmegaConf.to_container(cfg)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.steps=3", "budget is given twice (epochs=2, steps=3); give one of them"),
        ("budget.epochs=0", "budget.epochs is 0; type a positive whole number"),
        ("budget.epochs=1.5", "budget.epochs is 1.5; type a positive whole number"),
        ("budget.epochs=many", "budget.epochs is many"),
        ("optimizer.lr=-0.1", "optimizer.lr is -0.1; type a number of at least 0"),
        ("optimizer.lr=nan", "optimizer.lr is nan; type a number of at least 0"),
        ("optimizer.lr=fast", "optimizer.lr is fast; type a number of at least 0"),
        ("task.evaluate_every=0", "task.evaluate_every is 0; type a whole number of at least 1"),
        ("task.model.channels=[16,0]", "task.model.channels.1 is 0; type a whole number of at least 1"),
        ("schedule=step schedule.step_size=0", "schedule.step_size is 0; type a whole number of at least 1"),
        ("schedule=cosine budget.epochs=null budget.steps=9", "schedule.T_max is None; type a whole number"),
        ("task.penalty=-1", "task.penalty is -1; type a number of at least 0"),
        ("holdout=maybe", "holdout is maybe; type true or false"),
        ("budget.epochs=null budget.steps=nan", "budget.steps is nan; type a positive whole number"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1"),
        ("task.dtype=half", "task.dtype is half; choose one of float32, float64, bfloat16"),
        ("task.family=gcn task.dtype=bfloat16", "task.dtype is bfloat16, which sparse products do not know"),
        ("task.batch_size=0", "task.batch_size is 0; type a positive whole number, or full"),
        ("task.batch_size=half", "task.batch_size is half"),
        ("seed=-1", "seed is -1"),
        ("seed=first", "seed is first"),
        ("threads=0", "threads is 0"),
        ("cuda_graphs=perhaps", "cuda_graphs is perhaps; type true, false or if_possible"),
        ("cuda_graphs=true", "cuda_graphs=True, and steps on device=cpu cannot be; type cuda_graphs=false"),
        ("optimizer.momentum=abc", "optimizer.momentum is abc; type a number"),
        ("optimizer.lr=null", "optimizer.lr is None; type a number"),
        ("optimizer=lw_sgdm optimizer.trust=true", "optimizer.trust is True; type a number"),
        ("schedule=step schedule.gamma=abc", "schedule.gamma is abc; type a positive number"),
        ("results.root=", "results.root is empty; type results.root=FOLDER"),
        ("task.name=../../x", "task.name is ../../x; type a name without slashes"),
        ("device=tpu", "device is tpu; choose one of auto, cpu, cuda, cuda:N"),
        ("optimizer._target_=os.system", "optimizer._target_ is os.system; only these packages"),
        ("+task.model.inner={_target_:builtins.eval}", "task.model.inner._target_ is builtins.eval"),
    ],
)
def test_bad_values_are_refused_in_one_line(compose, override, message):
    with pytest.raises(ConfigError) as error:
        resolve(compose(*BASE, *override.split()))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_task_without_a_budget_is_refused(compose):
    with pytest.raises(ConfigError, match=r"profile quick has none for task autoencoder_mnist, only for .*cnn_digits"):
        resolve(compose("task=autoencoder_mnist", "optimizer=sgdm"))


def test_a_cuda_device_that_is_not_there_is_refused(compose):
    with pytest.raises(ConfigError, match="type device=auto or device=cpu"):
        resolve(compose(*BASE, "device=cuda:99"))


def test_resolving_changes_nothing_in_the_given_config(compose):
    cfg = compose(*BASE, "threads=null")
    before = OmegaConf.to_yaml(cfg)
    resolve(cfg)
    assert OmegaConf.to_yaml(cfg) == before


def test_streams_are_independent_and_zero_is_a_seed():
    seeds = [stream_seed(seed, name) for seed in range(3) for name in ("init", "order", "labels")]
    assert len(set(seeds)) == 9
    assert all(0 < seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer=sgdm", "optimizer.lr=0.07", "seed=3", "holdout=true"),
        ("optimizer=kfac", "optimizer.lr=1e-05", "optimizer.damping=0.5", "budget.steps=7"),
        ("optimizer=lw_sgdm", "optimizer.joint_trust=null", "optimizer.sigma=1", "budget.seconds=2.5"),
        ("optimizer=adamw", "optimizer.betas=[0.8,0.9]", "schedule=cosine", "budget.epochs=2"),
        ("optimizer=mbf", "++optimizer.refresh_early=false", "schedule=step", "threads=2", "task=cnn_digits"),
        ("optimizer=sgdm", "task=autoencoder_curves_small", "task.batch_size=7", "task.weight_decay=0.1"),
    ],
)
def test_the_reports_command_makes_the_same_run(compose, overrides, tmp_path):
    config = OmegaConf.to_container(resolve(compose("task=gcn_sbm", *overrides)))
    config["optimizer"].pop("search", None)  # a record has none
    names = {"task": config["task"]["name"], "optimizer": config["optimizer"]["about"]["name"]}
    run = SimpleNamespace(config=config, seed=config["seed"], holdout=config["holdout"], **names)
    typed = shlex.split(command(run, tmp_path / "a b"))[3:]
    assert run_folder(resolve(compose(*typed))) == tmp_path / "a b" / names["task"] / names["optimizer"] / digest(
        config
    )


@pytest.mark.parametrize("override", ["optimizer.search.lr.source=elsewhere", "optimizer.about.label=X", "seed=3"])
def test_what_is_one_run_is_one_method_of_the_report(compose, override):
    """Seeds made after a word has changed are compared with those made before."""
    configs = [OmegaConf.to_container(resolve(compose(*BASE, "device=cpu", *more))) for more in ((), (override,))]
    configs[1]["cuda_graphs"] = "if_possible"
    assert variant_of(configs[0]) == variant_of(configs[1])
    assert (digest(configs[0]) == digest(configs[1])) == (override != "seed=3")

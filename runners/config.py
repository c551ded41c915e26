"""A run's config: checked, made complete, and named by what determines its result.

Nothing here imports torch until a device or a thread count has to be found out.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import hydra.utils
from omegaconf import DictConfig, OmegaConf

from runners.record import RECORD_VERSION

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

# Configs name classes by `_target_`; only these packages may be called by one.
CALLABLE = (
    "optimizers", "models", "data", "torch.optim",
    "pytorch_optimizer", "prodigyopt", "dadaptation", "schedulefree", "dog",
)  # fmt: skip

DTYPES = ("float32", "float64", "bfloat16")

# Sections that may read environment variables: they say where things are, and are in no record.
FROM_ENVIRONMENT = ("data", "results", "tracker")

# Left out of the hash: where and how a run is made, kept and shown. The profile counts by the budget it gives.
WHERE = (
    "data", "results", "tracker", "launcher", "progress", "dry_run", "tuning", "profile", "experiment", "cuda_graphs",
)  # fmt: skip


class ConfigError(ValueError):
    """A config that cannot be run; the message is one line that says what to type."""


def resolve(cfg: DictConfig) -> DictConfig:
    """A checked copy of a composed config, with budget, device and thread count made definite.

    Raises:
        ConfigError: naming the field, what is wrong with it, and what to type.
    """
    cfg = complete(cfg)
    raw = OmegaConf.to_container(cfg)
    for path, value in _leaves({key: value for key, value in raw.items() if key not in FROM_ENVIRONMENT}):
        if "oc.env" in str(value):
            raise ConfigError(f"{path} is {value}; only {', '.join(FROM_ENVIRONMENT)} may read environment variables")
    OmegaConf.resolve(cfg)
    _check(cfg)
    return cfg


def check_callables(cfg: DictConfig) -> None:
    """Look up what every `_target_` of a resolved config names, before any of it is called.

    A name can begin with a declared package and lead out of it, along what its modules import.

    Raises:
        ConfigError: it is not a class or function that a declared package defines, or it does not exist.
    """
    for path, target in _targets(OmegaConf.to_container(cfg)):
        try:
            found = hydra.utils.get_object(target)
        except Exception as error:
            raise ConfigError(f"{path} is {target}, which cannot be imported ({error})") from error
        if (not inspect.isclass(found) and not inspect.isfunction(found)) or not _is_declared(f"{found.__module__}."):
            raise ConfigError(f"{path} is {target}, which is no class or function of {', '.join(CALLABLE)}")


def complete(cfg: DictConfig, here: bool = True) -> DictConfig:
    """A copy with budget, device and thread count made definite; references are left as they are.

    Args:
        cfg: composed config.
        here: whether the device is to be one of this machine.

    Raises:
        ConfigError: as `resolve`.
    """
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    cfg.budget = _budget(cfg)
    cfg.device = definite_device(str(cfg.device)) if here else cfg.device
    cfg.threads = definite_threads(cfg.threads)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # of torchrun
        cfg.ranks = int(os.environ["WORLD_SIZE"])
        cfg.device = f"cuda:{os.environ['LOCAL_RANK']}" if cfg.device == "cuda" else cfg.device
    return cfg


def digest(config: dict) -> str:
    """Twelve hexadecimal digits of what determines a run's result; `config` is resolved and plain."""
    parts = {key: value for key, value in config.items() if key not in WHERE}
    parts["optimizer"] = {k: v for k, v in parts["optimizer"].items() if k != "search"}
    parts["optimizer"]["about"] = {k: parts["optimizer"]["about"][k] for k in ("name", "version")}
    parts["device"] = parts["device"].partition(":")[0]
    if parts["device"] != "cpu":
        del parts["threads"]
    parts["record_version"] = RECORD_VERSION
    text = json.dumps(_plain_numbers(parts), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_folder(config: DictConfig | dict) -> Path:
    """Where the run of a resolved config has its record."""
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config)
    names = config["task"]["name"], config["optimizer"]["about"]["name"]
    return Path(config["results"]["root"]).joinpath(*names, digest(config))


def stream_seed(seed: int, stream: str) -> int:
    """The seed of one named random stream of a run: independent for every name and every seed, 0 included."""
    return int.from_bytes(hashlib.sha256(f"{stream}/{seed}".encode()).digest()[:8], "big") >> 1


def _budget(cfg: DictConfig) -> dict:
    given = {unit: value for unit, value in cfg.budget.items() if value is not None}
    profile = cfg.profile
    if not given:
        given = dict(profile.budgets.get(cfg.task.name) or {})
    if not given:
        raise ConfigError(
            f"no budget: profile {profile.name} has none for task {cfg.task.name}, only for "
            f"{', '.join(profile.budgets)}; type budget.epochs=N, budget.steps=N or budget.seconds=S"
        )
    if len(given) > 1:
        raise ConfigError(
            f"budget is given twice ({', '.join(f'{k}={v}' for k, v in given.items())}); give one of them"
        )
    ((unit, value),) = given.items()
    if not _number(value) or not 0 < value < math.inf or (unit != "seconds" and value != int(value)):
        kind = "number" if unit == "seconds" else "whole number"
        raise ConfigError(f"budget.{unit} is {value}; type a positive {kind}")
    return {name: value if name == unit else None for name in ("epochs", "steps", "seconds")}


def definite_device(name: str) -> str:
    """`cpu` or a CUDA device that exists, for what a config asks; `auto` is CUDA where there is one."""
    if name == "cpu":
        return name
    if name != "auto" and name.partition(":")[0] != "cuda":
        raise ConfigError(f"device is {name}; choose one of auto, cpu, cuda, cuda:N")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    index = name.partition(":")[2] or "0"
    if not index.isdigit() or int(index) >= count:
        raise ConfigError(f"device is {name} but {count} CUDA devices are visible; type device=auto or device=cpu")
    return name


def definite_threads(threads: int | None) -> int:
    """The number of CPU threads, for what a config asks."""
    return _default_threads() if threads is None else threads


@functools.cache
def _default_threads() -> int:
    # Asked once: later runs of this process may have set another number.
    import torch

    return torch.get_num_threads()


def _check(cfg: DictConfig) -> None:
    for path, target in _targets(OmegaConf.to_container(cfg)):
        if not _is_declared(target):
            raise ConfigError(f"{path} is {target}; only these packages may be named: {', '.join(CALLABLE)}")
    for field, value, least in _whole_numbers(cfg):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{field} is {value}; type a whole number of at least {least}")
    numbers = {f"optimizer.{field}": value for field, value in cfg.optimizer.items() if field == "lr" or _number(value)}
    for field, value in ({"task.penalty": cfg.task.penalty} | numbers).items():
        if value is not None and not (_number(value) and value >= 0):
            raise ConfigError(f"{field} is {value}; type a number of at least 0")
    for field, value in _not_numbers(cfg.optimizer):
        raise ConfigError(f"optimizer.{field} is {value}; type a number")
    for field, value in {"task.name": cfg.task.name, "optimizer.about.name": cfg.optimizer.about.name}.items():
        if not value or Path(value).name != value:  # a folder of the results is called so
            raise ConfigError(f"{field} is {value}; type a name without slashes")
    if not cfg.results.root:
        raise ConfigError("results.root is empty; type results.root=FOLDER")
    gamma = cfg.schedule.get("gamma", 1)
    if not _number(gamma) or gamma <= 0:
        raise ConfigError(f"schedule.gamma is {gamma}; type a positive number")
    if not isinstance(cfg.holdout, bool):
        raise ConfigError(f"holdout is {cfg.holdout}; type true or false")
    if cfg.task.dtype not in DTYPES:
        raise ConfigError(f"task.dtype is {cfg.task.dtype}; choose one of {', '.join(DTYPES)}")
    if cfg.task.dtype == "bfloat16" and cfg.task.family == "gcn":
        raise ConfigError("task.dtype is bfloat16, which sparse products do not know; type task.dtype=float32")
    size = cfg.task.batch_size
    if size != "full" and (not isinstance(size, int) or size < 1):
        raise ConfigError(f"task.batch_size is {size}; type a positive whole number, or full")
    ranks = cfg.get("ranks", 1)
    check_cuda_graphs(cfg.cuda_graphs, cfg.device, ranks)
    if ranks > 1 and (size == "full" or size % ranks):
        raise ConfigError(
            f"task.batch_size is {size}, of which {ranks} ranks cannot have equal parts; type a multiple of {ranks} "
            "(graphs, whose rows depend on one another, are for one rank)"
        )


def check_cuda_graphs(wanted: bool | str, device: str, ranks: int = 1) -> None:
    """Refuse what is no setting of `cuda_graphs`, or cannot be on a device, by a `ConfigError`."""
    if wanted not in (False, True, "if_possible"):
        raise ConfigError(f"cuda_graphs is {wanted}; type true, false or if_possible")
    if wanted and (device == "cpu" or ranks > 1):
        where = f"of {ranks} ranks" if ranks > 1 else "on device=cpu"
        raise ConfigError(f"cuda_graphs={wanted}, and steps {where} cannot be; type cuda_graphs=false")


def _whole_numbers(cfg: DictConfig) -> Iterator[tuple[str, object, int]]:
    """The fields that must be whole numbers: path, value, and the least that it can be."""
    yield from (("seed", cfg.seed, 0), ("threads", cfg.threads, 1), ("task.evaluate_every", cfg.task.evaluate_every, 1))
    for path, value in _leaves(OmegaConf.to_container(cfg.task.model), "task.model"):
        if _number(value) and not path.endswith(".dropout"):  # all else that a net is given are sizes and counts
            yield path, value, 1
    for field in ("step_size", "T_max"):
        if field in cfg.schedule:
            yield f"schedule.{field}", cfg.schedule[field], 1


def _not_numbers(optimizer: DictConfig) -> Iterator[tuple[str, object]]:
    """The settings that are numbers in the method's file and here are none; some, but no rate, may be null."""
    path = CONFIGS / "optimizer" / f"{optimizer.about.name}.yaml"
    given = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    for field, value in optimizer.items():
        if _number(given.get(field)) and not _number(value) and (value is not None or field == "lr"):
            yield field, value


def _is_declared(name: str) -> bool:
    return name.startswith(tuple(f"{package}." for package in CALLABLE))


def check_writable(root: Path) -> None:
    """Make the folder of results.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.W_OK | os.X_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"results.root={root} cannot be written ({reason}); type results.root=FOLDER") from None


def _targets(node: dict) -> Iterator[tuple[str, str]]:
    for path, value in _leaves(node):
        if path.rpartition(".")[2] == "_target_" and value is not None:
            yield path, str(value)


def _leaves(node, path: str = "") -> Iterator[tuple[str, object]]:
    """The values of a nest of dicts and lists, each with its path."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plain_numbers(node):
    """1.0 and 1 are the same setting."""
    if isinstance(node, dict):
        return {key: _plain_numbers(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_plain_numbers(value) for value in node]
    return int(node) if isinstance(node, float) and node.is_integer() else node

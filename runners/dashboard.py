"""W&B workspaces as code: `python -m runners.dashboard profile=quick` saves a view per task at W&B.

A view is built from the profile's records, its panels from what `runners.tracking` mirrors: curves by method against
each axis, step sizes by layer, cost, and the claims with their verdicts. Saved again, a view is replaced.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

from omegaconf import DictConfig

from runners.command import command
from runners.config import ConfigError
from runners.record import write_json
from runners.tracking import AXES

TITLES = {"epoch": "epochs", "train_seconds": "training seconds", "gradient_equivalents": "gradient equivalents"}
METHOD = "optimizer.about.label"


def workspaces(root: Path, project: str, entity: str) -> dict:
    """Workspaces by task, for the records under `root`; nothing is sent.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    from analysis import claims
    from analysis.records import load

    records = load(root)
    told = _claims(claims.judge(records))
    return {task: _workspace(records, task, told, project, entity) for task in records.tasks if task in records.methods}


def _workspace(records, task: str, told: str, project: str, entity: str):
    from analysis.style import style

    ws, wr, expr = _libraries()
    methods, profile = records.methods[task], records.root.name
    metric = next(iter(methods.values())).metric.iloc[0]
    panels = {
        "Curves": [
            _line(wr, f"{prefix}{measure}", axis)
            for measure in ("train_loss", "test_loss", f"test_{metric}")
            for axis, prefix in AXES.items()
        ],
        "Step size of each layer": [_line(wr, "step_size/.*", "epoch", regex=True)],
        "Cost": [
            wr.BarPlot(title=title, metrics=[wr.SummaryMetric(name)], groupby=wr.Config(METHOD))
            for name, title in (
                ("seconds_per_step", "Seconds per step"),
                ("peak_memory_bytes", "Peak memory (bytes)"),
                ("train_seconds", "Training seconds"),
            )
        ],
        "Claims": [wr.MarkdownPanel(markdown=told)],
    }
    colors = {runs.label.iloc[0]: style(optimizer).color for optimizer, runs in methods.items()}
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{records.title(task)}, {profile}",
        sections=[
            ws.Section(
                name=name, panels=parts, is_open=True, layout_settings=ws.SectionLayoutSettings(min(len(parts), 3), 1)
            )
            for name, parts in panels.items()
        ],
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=50, remove_legends_from_panels=False),
        runset_settings=ws.RunsetSettings(
            filters=[
                expr.Config("task.name") == task,
                expr.Config("profile.name") == profile,
                expr.Config("holdout") == False,  # noqa: E712 - an expression of W&B's
            ],
            groupby=[expr.Config(METHOD)],
            group_colors=colors,
        ),
    )


def _line(wr, name: str, axis: str, regex: bool = False):
    measure = "Step size" if regex else name.rpartition("/")[2].replace("_", " ").capitalize()
    chosen = {"metric_regex": name} if regex else {"y": [name]}
    log = regex or not name.endswith("accuracy")
    return wr.LinePlot(
        title=f"{measure} against {TITLES[axis]}", x=axis, title_x=TITLES[axis], title_y=measure, log_y=log,
        groupby=wr.Config(METHOD), groupby_aggfunc="mean", groupby_rangefunc="minmax", max_runs_to_show=50, **chosen,
    )  # fmt: skip


def _claims(judged: list[dict]) -> str:
    """The claims as a Markdown table."""
    rows = ["| claim | measure | verdict | why |", "|---|---|---|---|"]
    for claim in judged:
        for verdict in claim["verdicts"]:
            cells = f"{claim['id']} {claim['sentence']}", verdict["measure"], verdict["verdict"], verdict["reason"]
            rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _libraries():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about names in wandb_workspaces
        try:
            import wandb_workspaces.reports.v2 as wr
            import wandb_workspaces.workspaces as ws
            from wandb_workspaces import expr
        except ImportError:
            raise ConfigError(
                "W&B workspaces need the package wandb-workspaces; type pip install -e .[dashboard]"
            ) from None
    return ws, wr, expr


def save(cfg: DictConfig) -> None:
    """Save the views of the config's profile and print their addresses."""
    import wandb

    os.environ["WANDB_SILENT"] = "true"
    try:
        entity = cfg.tracker.entity or wandb.Api().default_entity
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"no login at W&B ({reason}); type wandb login, then make wandb-dashboard again") from None
    saved = Path(cfg.tracker.dir, "wandb", "workspaces.json")
    known = json.loads(saved.read_text()) if saved.exists() else {}
    for task, workspace in workspaces(Path(cfg.results.root, cfg.profile.name), cfg.tracker.project, entity).items():
        place = f"{entity}/{cfg.tracker.project}/{task}"
        known[place] = _replace(workspace, known.get(place))
        print(f"{task}: {known[place]}")
        saved.parent.mkdir(parents=True, exist_ok=True)
        write_json(saved, known)


def _replace(workspace, address: str | None) -> str:
    """Save a workspace in place of the view at `address`, if it is still there; its address."""
    ws, *_ = _libraries()
    if address:
        try:
            old = ws.Workspace.from_url(address)
        except Exception:  # deleted, or of another server: a new one is made
            return workspace.save().url
        for field in ("name", "sections", "settings", "runset_settings"):
            setattr(old, field, getattr(workspace, field))
        workspace = old
    return workspace.save().url


if __name__ == "__main__":
    command(save)()

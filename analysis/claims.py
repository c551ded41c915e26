"""The claims of the papers, each one declared entry, judged from records alone.

A claim says which methods it is about, against which rivals, on which families of tasks, and by which test.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from analysis.behaviour import linear_rate, schedule_and_insensitivity, two_regimes
from analysis.comparisons import compared
from analysis.cost_ratios import ABOUT, cost_ratio, rescaling_cost
from analysis.records import Records
from analysis.verdicts import Claim

LW = ("lw_sgdm", "lw_adamw")
FIRST_ORDER = ("sgdm", "adamw")
COMPARABLE_MEMORY, SLIGHTLY_ABOVE = 1.25, 1.3
LW_PAPER, MBF_PAPER, KBFGS_PAPER = "arXiv:2305.13664, abstract", "arXiv:2202.04124, abstract", "arXiv:2006.08877"

CLAIMS = (
    Claim("LW-1", "LW-SGDm, untuned, is at least as good as tuned SGD with momentum on each family", LW_PAPER,
          ("lw_sgdm",), ("sgdm",), compared(better=False)),
    Claim("LW-2", "LW-AdamW, untuned, is at least as good as tuned AdamW on each family", LW_PAPER,
          ("lw_adamw",), ("adamw",), compared(better=False)),
    Claim("LW-3", "Both are at least as good as the second-order methods after equal training time", LW_PAPER,
          LW, ("kfac", "shampoo", "kbfgs", "mbf", "tnt"), compared(better=False, equal_time=True)),
    Claim("LW-4", "An iteration takes at most SGD-m's time plus about one gradient computation", LW_PAPER,
          LW, ("sgdm",), cost_ratio("seconds_per_step", "time per step", 2 + ABOUT, "takes longer")),
    Claim("LW-5", "Memory is comparable to a first-order method's", LW_PAPER,
          LW, ("sgdm",), cost_ratio("peak_memory_bytes", "peak memory", COMPARABLE_MEMORY, "needs more memory")),
    Claim("LW-6", "Step sizes behave like an effective schedule; the result is insensitive to what is left to choose",
          LW_PAPER, LW, (), schedule_and_insensitivity),
    Claim("LW-7", "Idealised full-batch SGD with layer-wise steps converges linearly (rate derived here)", LW_PAPER,
          LW, (), linear_rate),
    Claim("MBF-1", "An iteration of MBF costs only slightly more than a first-order one", MBF_PAPER,
          ("mbf",), ("sgdm",), cost_ratio("seconds_per_step", "time per step", SLIGHTLY_ABOVE, "costs more")),
    Claim("MBF-2", "MBF's final result is competitive with first- and second-order methods", MBF_PAPER,
          ("mbf",), (*FIRST_ORDER, "kfac", "shampoo"), compared(better=False)),
    Claim("QN-1", "K-BFGS and K-BFGS(L) match or outperform KFAC and first-order methods on autoencoders", KBFGS_PAPER,
          ("kbfgs", "kbfgs_l"), ("kfac", "sgdm", "adam"), compared(better=False), families=("autoencoder",)),
    Claim("LS-1", "Layer-specific rates improve accuracy and time over SGD (here: with momentum)",
          "arXiv:1510.04609, abstract",
          ("layer_specific",), ("sgdm",), compared(better=True, equal_time=True)),
    Claim("BM-1", "Back-matching rates improve over SGD (here: with momentum)", "arXiv:1802.09750, abstract",
          ("back_matching",), ("sgdm",), compared(better=True)),
    Claim("AD-1", "The curvature along a direction costs (1.5 C, 2 M) or (2 C, 1 M)", "arXiv:2210.14520, abstract",
          ("curvature_rescaling",), ("sgdm",), rescaling_cost),
    Claim("AD-2", "Curvature rescaling has two regimes, exploration and convergence", "arXiv:2210.14520, abstract",
          ("curvature_rescaling",), (), two_regimes),
)  # fmt: skip


def judge(records: Records) -> list[dict]:
    """Every claim with its verdicts, ready for JSON: `id, sentence, source, methods, rivals, verdicts`."""
    return [
        {"id": claim.id, "sentence": claim.sentence, "source": claim.source, "methods": list(claim.methods)}
        | {"rivals": list(claim.rivals), "verdicts": [asdict(verdict) for verdict in claim.test(records, claim)]}
        for claim in CLAIMS
    ]


def write(judged: list[dict], path: Path) -> None:
    """Write `claims.json`: numbers that are not finite become null or the words "inf" and "-inf"; of the others twelve
    digits, for those behind them are the processor's."""
    path.write_text(json.dumps(_plain(judged), indent=1, ensure_ascii=False) + "\n")


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float | np.floating):
        value = float(value)
        if np.isfinite(value):
            return float(f"{value:.12g}")
        return None if np.isnan(value) else "inf" if value > 0 else "-inf"
    return bool(value) if isinstance(value, np.bool_) else int(value) if isinstance(value, np.integer) else value

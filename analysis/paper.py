"""`paper.tex`: the report's tables and vector figures as one LaTeX document, to compile or to take pieces from.

It lies in the report's folder and reads `tables/*.tex` and `figures/*.pdf` there: `pdflatex paper.tex`, twice.
"""

from __future__ import annotations

from analysis.panels import Drawn
from analysis.records import Records
from analysis.tables import TEX

HEAD = r"""\documentclass[10pt]{article}
\usepackage[utf8]{inputenc}
\usepackage[T1]{fontenc}
\usepackage{lmodern}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs,longtable,graphicx}
\graphicspath{{figures/}}
\title{Layer-wise step sizes against tuned optimizers}
\author{Computed from records}
\date{}
\begin{document}
\maketitle
"""


def document(records: Records, drawn: list[Drawn]) -> str:
    """The document's text, for figures that were drawn and tables that were written."""
    parts = [HEAD, r"\section{Claims}", _small(r"\input{tables/claims.tex}")]
    for task in dict.fromkeys(figure.task for figure in drawn if figure.task):
        parts += [rf"\section{{{_tex(records.title(task))}}}", _tex(records.surrogate(task))]
        parts.append(_results(task))
        parts += [*(_figure(figure) for figure in drawn if figure.task == task), r"\clearpage"]
    across = [figure for figure in drawn if not figure.task]
    parts += [r"\section{Across tasks}", *map(_figure, across)] if across else []
    if records.tasks:
        tables = (("Searches", "searches"), ("Fixed settings", "hyperparameters"))
        parts += [r"\clearpage\appendix"]
        for title, name in tables:
            parts += [rf"\section{{{title}}}", _small(rf"\input{{tables/{name}.tex}}")]
    return "\n".join([*filter(None, parts), r"\end{document}", ""])


def _results(task: str) -> str:
    caption = "Mean and standard deviation over seeds; cost of a step relative to SGD-m."
    table = rf"\resizebox{{\linewidth}}{{!}}{{\input{{tables/results_{task}.tex}}}}"
    return "\n".join([r"\begin{table}[ht]", rf"\caption{{{caption}}}", table, r"\end{table}"])


def _figure(figure: Drawn) -> str:
    picture = rf"\includegraphics[width=\linewidth]{{{figure.name}.pdf}}"
    return "\n".join(
        [r"\begin{figure}[ht]", picture, rf"\caption{{{_tex(figure.title)}.}}", r"\end{figure}", r"\clearpage"]
    )


def _small(text: str) -> str:
    return rf"{{\footnotesize {text}}}"


def _tex(text: str) -> str:
    return text.translate(TEX)

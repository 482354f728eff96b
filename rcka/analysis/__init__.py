"""Similarity of two networks, layer by layer, and its pictures. Written by hand; the modules are exported from
nbs/method."""

from rcka import style as style  # the look of the figures is of use also below this package

from .compare import compare, load_comparison, relations, save_comparison
from .plots import (
    class_relations,
    gram_frame,
    plot_along,
    plot_before_after,
    plot_class_relations,
    plot_cost,
    plot_grams,
    plot_predicts,
    plot_similarity,
    rank_correlation,
    save_figure,
)

__all__ = [
    "class_relations",
    "compare",
    "gram_frame",
    "load_comparison",
    "plot_along",
    "plot_before_after",
    "plot_class_relations",
    "plot_cost",
    "plot_grams",
    "plot_predicts",
    "plot_similarity",
    "rank_correlation",
    "relations",
    "save_comparison",
    "save_figure",
]

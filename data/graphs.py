"""Citation graphs for node classification: Planetoid, and a generated sibling.

Features are row-normalised; the adjacency is `Â = D^{-1/2} (A + I) D^{-1/2}` (Kipf and Welling, ICLR 2017). Both are
sparse CSR tensors with indices of 32 bits. The splits of a graph share them and differ in the nodes that they label.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from data.batches import Dataset, Split
from data.checksums import CHECKSUMS, ensure


def planetoid(root: Path, cache: Path, name: str) -> Dataset:
    """Cora, CiteSeer or PubMed with the public split (20 training nodes a class, 500 validation, 1,000 test).

    Args:
        root: folder with `Planetoid/<name>/raw`.
        cache: folder where results of checks are kept.
        name: `Cora`, `CiteSeer` or `PubMed`.

    Raises:
        DataError: if files are missing and not to be had, or damaged.
    """
    from torch_geometric.data import download_url
    from torch_geometric.datasets import Planetoid
    from torch_geometric.io import read_planetoid_data

    raw = root / "Planetoid" / name / "raw"

    def download() -> None:
        for file in CHECKSUMS[name]:
            download_url(f"{Planetoid.url}/{Path(file).name}", str(raw))

    ensure(name, root, cache, download=download, instead="gcn_sbm")
    # Planetoid itself would write what it derives beside the raw files.
    graph = read_planetoid_data(str(raw), name)
    masks = {"train": graph.train_mask, "validation": graph.val_mask, "test": graph.test_mask}
    rows = {split: mask.nonzero().squeeze(1) for split, mask in masks.items()}
    return _dataset(graph.x, graph.edge_index, graph.y, rows, name)


def stochastic_block_model(
    root: Path,
    cache: Path,
    *,
    nodes: int,
    communities: int,
    words: int,
    degree: float,
    homophily: float,
    words_per_node: int,
    topic_share: float,
    train_per_class: int,
    validation: int,
    test: int,
    seed: int,
) -> Dataset:
    """A generated citation-like graph: communities that cite among themselves and share a vocabulary.

    Args:
        root: unused: the data are generated.
        cache: unused.
        nodes: number of nodes, split evenly into the communities.
        communities: number of communities, which are the classes.
        words: size of the vocabulary; each community's topic is an equal part of it.
        degree: expected number of neighbours.
        homophily: expected share of the neighbours that are of the same community.
        words_per_node: draws of words for a node, with replacement.
        topic_share: probability that a word is drawn from the topic, not from the whole vocabulary.
        train_per_class: labelled training nodes of each class.
        validation: number of validation nodes.
        test: number of test nodes.
        seed: seed of the graph; part of the task, not of a run.

    Raises:
        ValueError: the nodes cannot be split so.
    """
    labelled = communities * train_per_class + validation + test
    if nodes % communities or nodes < labelled:
        raise ValueError(
            f"nodes is {nodes}; use a multiple of the {communities} communities and at least {labelled}, which are "
            f"{train_per_class} training nodes of each, {validation} for validation and {test} for testing"
        )
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(nodes) % communities
    same = labels[:, None] == labels
    own = nodes / communities
    probability = torch.where(same, degree * homophily / own, degree * (1 - homophily) / (nodes - own))
    edges = (torch.rand(nodes, nodes, generator=generator) < probability).triu(1)
    edge_index = (edges | edges.T).nonzero().T

    topic = words // communities
    from_topic = torch.rand(nodes, words_per_node, generator=generator) < topic_share
    topical = labels[:, None] * topic + torch.randint(topic, from_topic.shape, generator=generator)
    drawn = torch.where(from_topic, topical, torch.randint(words, from_topic.shape, generator=generator))
    features = torch.zeros(nodes, words).scatter_(1, drawn, 1.0)

    # A stable sort by class of a random order: the first of each class are its training nodes.
    order = torch.randperm(nodes, generator=generator)
    by_class = order[labels[order].argsort(stable=True)].view(communities, -1)
    rest = by_class[:, train_per_class:].flatten()
    rest = rest[torch.randperm(len(rest), generator=generator)]
    rows = {
        "train": by_class[:, :train_per_class].flatten(),
        "validation": rest[:validation],
        "test": rest[validation : validation + test],
    }
    return _dataset(features, edge_index, labels, rows, "stochastic block model")


def _dataset(features: Tensor, edge_index: Tensor, labels: Tensor, rows: dict[str, Tensor], name: str) -> Dataset:
    features = features / features.sum(1, keepdim=True).clamp(min=torch.finfo(features.dtype).tiny)
    inputs = (sparse(features), normalised_adjacency(edge_index, len(features)))
    splits = {split: Split(inputs, labels[nodes], nodes) for split, nodes in rows.items()}
    return Dataset(splits["train"], splits["test"], splits["validation"], None, None, name)


def normalised_adjacency(edge_index: Tensor, nodes: int) -> Tensor:
    """`Â` of an undirected graph as a sparse CSR tensor `(nodes, nodes)`.

    Args:
        edge_index: both directions of every edge `(2, edges)`, without self-loops.
        nodes: number of nodes.
    """
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    index, weight = gcn_norm(edge_index, num_nodes=nodes)
    return sparse(torch.sparse_coo_tensor(index, weight, (nodes, nodes), check_invariants=True).coalesce())


def sparse(matrix: Tensor) -> Tensor:
    """The matrix in compressed rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        csr = matrix.to_sparse_csr()
    # MKL's indices are of 32 bits: others are copied for every product
    parts = (csr.crow_indices().int(), csr.col_indices().int(), csr.values())
    return torch.sparse_csr_tensor(*parts, csr.shape, check_invariants=True)

"""Scores of a clustering against classes: NMI, ACC, ARI, AMI. Cluster numbers are arbitrary.

    nmi   mutual information / mean of the two entropies (arithmetic); 0 = independent, 1 = equal
    acc   share of items whose cluster is matched with their class, by the best one-to-one matching
    ari   Rand index, adjusted: 0 for random assignments
    ami   mutual information, adjusted: 0 for random assignments

NMI is not adjusted: random assignments of 10,000 items score 0.002 with 10 classes, 0.12 with 100;
of a batch of 64 items 0.30 and 0.90. So all scores are of a whole data set, and ARI and AMI stand
beside.

References: Strehl and Ghosh, JMLR 2002; Kuhn 1955 (matching); Hubert and Arabie 1985; Vinh, Epps
and Bailey, JMLR 2010.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["CLUSTERING", "accuracy", "best_matching", "clustering_scores"]


def best_matching(clusters: ArrayLike, labels: ArrayLike) -> dict[int, int]:
    """Return {cluster: class}, one-to-one, that agrees with the most items.

    Args:
        clusters, labels: whole numbers >= 0, (N,). Where there are more clusters than classes some
            clusters have no class, and their items count as wrong.
    """
    from scipy.optimize import linear_sum_assignment

    clusters, labels = np.asarray(clusters), np.asarray(labels)
    counts = np.zeros((clusters.max() + 1, labels.max() + 1), dtype=np.int64)
    np.add.at(counts, (clusters, labels), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return dict(zip(rows.tolist(), columns.tolist()))


def accuracy(clusters: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of items whose cluster is matched with their class."""
    matching = best_matching(clusters, labels)
    matched = np.array([matching.get(cluster, -1) for cluster in np.asarray(clusters).tolist()])
    return float((matched == np.asarray(labels)).mean())


def _nmi(clusters: ArrayLike, labels: ArrayLike) -> float:
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(labels, clusters, average_method="arithmetic"))


def _ari(clusters: ArrayLike, labels: ArrayLike) -> float:
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(labels, clusters))


def _ami(clusters: ArrayLike, labels: ArrayLike) -> float:
    from sklearn.metrics import adjusted_mutual_info_score

    return float(adjusted_mutual_info_score(labels, clusters))


# name -> function of (clusters, labels)
CLUSTERING = {"nmi": _nmi, "acc": accuracy, "ari": _ari, "ami": _ami}


def clustering_scores(
    clusters: ArrayLike, labels: ArrayLike, metrics: Iterable[str] = tuple(CLUSTERING)
) -> dict[str, float]:
    """Return {metric: score}.

    Args:
        clusters: assignments, whole numbers >= 0, (N,).
        labels: classes, whole numbers >= 0, (N,).
        metrics: names out of CLUSTERING.

    Raises:
        ValueError: an unknown metric, no item, different lengths, items without a label.
    """
    clusters, labels = np.asarray(clusters), np.asarray(labels)
    for name in metrics:
        if name not in CLUSTERING:
            raise ValueError(f"metrics={name}: choose from {', '.join(CLUSTERING)}")
    if len(clusters) != len(labels) or not len(labels):
        raise ValueError(f"labels: {len(labels)} of them for {len(clusters)} assignments")
    if labels.min() < 0 or clusters.min() < 0:
        raise ValueError("labels: there are items without a class; clustering scores need them all")
    return {name: CLUSTERING[name](clusters, labels) for name in metrics}

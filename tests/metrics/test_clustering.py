import itertools
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import clustering as referee

from genmodels.metrics.clustering import CLUSTERING, accuracy, best_matching, clustering_scores


@pytest.fixture
def noisy():
    """Assignments that agree with the classes, renamed, in seven of ten items."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    clusters = (labels + 2) % 5
    changed = rng.random(400) < 0.3
    clusters[changed] = rng.integers(0, 5, changed.sum())
    return clusters, labels


def test_scores_agree_with_torchmetrics(noisy):
    scores = clustering_scores(*noisy)
    a, b = (torch.from_numpy(x) for x in noisy)
    assert scores["nmi"] == pytest.approx(
        float(referee.normalized_mutual_info_score(a, b)), abs=1e-5
    )
    assert scores["ari"] == pytest.approx(float(referee.adjusted_rand_score(a, b)), abs=1e-5)
    assert scores["ami"] == pytest.approx(float(referee.adjusted_mutual_info_score(a, b)), abs=1e-5)


def test_nmi_by_hand():
    """Joint counts 2 1 / 0 3: I = H(Y) - H(Y|X), over the mean of the entropies."""
    clusters, labels = [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]
    h_y = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
    h_y_given_x = 0.5 * h_y
    expected = (h_y - h_y_given_x) / (0.5 * (h_y + math.log(2)))
    assert clustering_scores(clusters, labels)["nmi"] == pytest.approx(expected)
    assert clustering_scores(clusters, labels)["acc"] == pytest.approx(5 / 6)


def test_accuracy_is_the_best_of_all_one_to_one_matchings():
    rng = np.random.default_rng(1)
    clusters, labels = rng.integers(0, 4, 60), rng.integers(0, 4, 60)
    best = max(
        float((np.array(p)[clusters] == labels).mean()) for p in itertools.permutations(range(4))
    )
    assert accuracy(clusters, labels) == pytest.approx(best)


def test_renaming_changes_nothing_and_agreement_is_one(noisy):
    clusters, labels = noisy
    renamed = np.array([3, 0, 4, 1, 2])[clusters]
    assert clustering_scores(renamed, labels) == pytest.approx(clustering_scores(clusters, labels))
    assert all(v == pytest.approx(1) for v in clustering_scores((labels + 1) % 5, labels).values())


def test_more_clusters_than_classes_leave_some_unmatched():
    assert best_matching([0, 0, 1, 2], [0, 0, 0, 1]) == {0: 0, 2: 1}
    assert accuracy([0, 0, 1, 2], [0, 0, 0, 1]) == pytest.approx(0.75)


@pytest.mark.parametrize("classes, items, chance", [(10, 10_000, 0.0017), (10, 64, 0.304)])
def test_chance_level_of_nmi(classes, items, chance):
    rng = np.random.default_rng(0)
    draws = [
        clustering_scores(rng.integers(0, classes, items), rng.integers(0, classes, items))
        for _ in range(20 if items > 1000 else 60)
    ]
    mean = {key: np.mean([draw[key] for draw in draws]) for key in CLUSTERING}
    assert mean["nmi"] == pytest.approx(chance, rel=0.15)
    assert abs(mean["ari"]) < 0.01 and abs(mean["ami"]) < 0.02


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([0, 1], [0, 1], ["nmy"]), "metrics=nmy: choose from nmi"),
        (([0], [0, 1]), "2 of them"),
        (([], []), "0 of them"),
        (([0, 1], [0, -1]), "without a class"),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(ValueError, match=words):
        clustering_scores(*arguments)

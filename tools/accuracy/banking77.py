"""Score a sentence encoder on Banking77: embed, fit a logistic regression, top-1 on test.

`score(run)` is what `--eval tools.accuracy.banking77:score` wants: `run` takes feeds {input name →
array [N, L]} and returns the model's outputs, the first of which is [N, at least L, width]. The
tokens are `banking77_train.npz` and `banking77_test.npz` (tools/accuracy/prepare.py) in the folder
named by the environment variable ACCURACY_WORK, else in the current one.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Feeds = dict[str, npt.NDArray[np.generic]]
Run = Callable[[Feeds], list[npt.NDArray[np.float32]]]

BATCH = 64  # sentences per run
STRENGTH = 30.0  # of the fit against the l2 penalty, scikit-learn's C
ITERATIONS = 200


def score(run: Run) -> float:
    """Top-1 on the test sentences, in [0, 1]."""
    folder = Path(os.environ.get("ACCURACY_WORK", "."))
    vectors, labels = embed(run, folder / "banking77_train.npz")
    weights = fit(vectors, labels)
    vectors, labels = embed(run, folder / "banking77_test.npz")
    return float((logits(weights, vectors).argmax(1) == labels).mean())


def embed(run: Run, path: Path) -> tuple[Floats, Labels]:
    """Sentence embeddings [N, width] of unit length, and the labels [N].

    The mean of the last hidden state over the tokens that the mask lets through, as in
    Sentence-BERT (arXiv 1908.10084, section 3). A pruned model may return what is not finite: such
    numbers count as 0, so that its score is that of a bad model.
    """
    with np.load(path) as archive:
        data: Feeds = {name: archive[name] for name in archive.files}
    labels = data.pop("labels").astype(np.int64)
    lengths = data["attention_mask"].sum(1)
    order = np.argsort(lengths, kind="stable")  # sentences of one length need no padding
    pooled = []
    for start in range(0, len(labels), BATCH):
        chosen = order[start : start + BATCH]
        longest = lengths[chosen].max()
        feeds = {name: array[chosen, :longest] for name, array in data.items()}
        mask = feeds["attention_mask"][..., None].astype(np.float64)
        hidden = run(feeds)[0][:, :longest].astype(np.float64)
        hidden = np.nan_to_num(hidden, posinf=0.0, neginf=0.0)
        pooled.append((hidden * mask).sum(1) / mask.sum(1))
    vectors = np.concatenate(pooled)[np.argsort(order)]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), labels


def fit(vectors: Floats, labels: Labels) -> Floats:
    """Weights [width + 1, classes] of a multinomial logistic regression; the last row is the bias.

    Minimises STRENGTH · Σ cross-entropy + ½ ‖weights without bias‖² by L-BFGS from zero.
    """
    extended = with_ones(vectors)
    target = np.eye(labels.max() + 1)[labels]
    shape = (extended.shape[1], target.shape[1])
    penalised = np.ones((shape[0], 1))
    penalised[-1] = 0.0

    def loss(flat: Floats) -> tuple[float, Floats]:
        weights = flat.reshape(shape)
        z = extended @ weights
        z -= z.max(1, keepdims=True)
        log_sum = np.log(np.exp(z).sum(1, keepdims=True))
        entropy = (log_sum[:, 0] - (z * target).sum(1)).sum()
        slope = extended.T @ (np.exp(z - log_sum) - target)
        size = (penalised * weights**2).sum()
        return STRENGTH * entropy + size / 2, (STRENGTH * slope + penalised * weights).ravel()

    start = np.zeros(shape[0] * shape[1])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": ITERATIONS})
    weights: Floats = found.x.reshape(shape)
    return weights


def logits(weights: Floats, vectors: Floats) -> Floats:
    """Scores [N, classes]."""
    scores: Floats = with_ones(vectors) @ weights
    return scores


def with_ones(vectors: Floats) -> Floats:
    return np.concatenate([vectors, np.ones((len(vectors), 1))], axis=1)

"""Conditional logit: the probability of each of several answers, fitted by maximum likelihood with a
ridge."""
import numpy as np


def softmax(scores):
    exp = np.exp(scores - scores.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def fit_logit(designs, rights, weights, ridge=1.0):
    """Maximum likelihood with a ridge, by Newton's method -> coefficients (D,).

    designs: list of (K + 1, D) matrices. rights: list of (K + 1,) bool, which rows are right. weights: of
    each. Where several rows are right (answers that the judge accepts but that are not equal), their
    probabilities add up.
    """
    size, dim = max(map(len, designs)), designs[0].shape[1]
    x, absent = np.zeros((len(designs), size, dim)), np.full((len(designs), size), -np.inf)
    right, w = np.zeros((len(designs), size)), np.asarray(weights, float)
    for i, (design, is_right) in enumerate(zip(designs, rights)):
        x[i, :len(design)], absent[i, :len(design)], right[i, :len(design)] = design, 0.0, is_right
    beta, flat = np.zeros(dim), x.reshape(-1, dim)

    def loss(b):
        p = softmax(x @ b + absent)
        return -w @ np.log((p * right).sum(1)) + ridge / 2 * b @ b

    for _ in range(100):
        p = softmax(x @ beta + absent)                                          # (N, K + 1)
        target = p * right / (p * right).sum(1, keepdims=True)                  # the share of each right row
        gradient = (w[:, None] * (p - target)).ravel() @ flat + ridge * beta
        mean = np.einsum("nk,nkd->nd", p, x)
        hessian = (flat * (w[:, None] * p).reshape(-1, 1)).T @ flat - (mean * w[:, None]).T @ mean
        hessian += ridge * np.eye(dim)
        step = np.linalg.solve(hessian, gradient)
        while loss(beta - step) > loss(beta) and abs(step).max() > 1e-9:  # a full Newton step may overshoot
            step = step / 2
        beta = beta - step
        if abs(step).max() < 1e-9:
            break
    return beta

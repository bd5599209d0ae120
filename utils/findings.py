"""What the figures say, in words: is a model as sure as it is right, and does it know when it cannot see?"""
import math

from utils.metrics import MIN_QUESTIONS, calibrated, mean_interval

CLOSE = 0.03                    # a difference of fewer points counts as none
CUT_OFF = 0.05                  # a larger share of answers that met the limit is warned of


def stated(view, scale=None):
    """The confidence that a model states (N,): c where a map to it was fixed before training, else p, its
    sequence probability. view: `tables.columns_of`."""
    return calibrated(view["confidence"], scale) if scale else view["probability"]


def share(value):
    """A share as it is printed: .58, 1.00."""
    return f"{value:.2f}".removeprefix("0")


def overconfidence(confidence, correct, ids):
    """Mean confidence minus accuracy in words (str), with its sign."""
    mean, low, high = mean_interval(ids, confidence - correct)
    points = round(100 * abs(mean))
    if abs(mean) < CLOSE:
        return "about as sure as it is right"
    word = f"{'over' if mean > 0 else 'under'}confident by {points} points"
    num_questions = len(set(ids))
    if num_questions < MIN_QUESTIONS or low <= 0 <= high:
        return f"{word}, which {num_questions} questions cannot tell from 0"
    return word


def finding(clean, noised=None, scale=None):
    """One sentence or two on one model (str): what it says, what it is right on, and both under noise.

    clean, noised: `tables.columns_of` of answers on clean pictures, and on the same with the evidence noised.
    """
    says, right = stated(clean, scale), clean["correct"].astype(float)
    sentence = (f"it says {share(says.mean())} and is right on {share(right.mean())}: "
                f"{overconfidence(says, right, clean['id'])}")
    if noised is None:
        return sentence + "."
    says_noised, right_noised = stated(noised, scale), noised["correct"].astype(float)
    loss, fall = right.mean() - right_noised.mean(), says.mean() - says_noised.mean()
    excess = says_noised.mean() - right_noised.mean()
    if loss < CLOSE:
        verdict = "the noise takes little from it, so this says nothing about seeing"
    elif excess > 0.1 and fall < loss / 2:
        verdict = "it does not know that it cannot see"
    elif excess > 0.1:
        verdict = "it half knows that it cannot see"
    else:
        verdict = "it knows that it cannot see"
    return (f"{sentence}; with the evidence noised it is right on {share(right_noised.mean())} and says "
            f"{share(says_noised.mean())}: {verdict}.")


def abstention_finding(row, method=""):
    """What a threshold did on the questions that it was not fitted on, in words (str). row:
    `tables.abstention`."""
    target = row["target risk"]
    if "answered" not in row:
        return f"{method}: too few questions for a threshold, which one half fits and the other one checks."
    if not math.isfinite(row["threshold"]):
        return (f"{method}: no threshold keeps the errors among the answered at {target:.0%}, not even on "
                f"the questions it was fitted on, so it answers nothing; allow a higher --target_risk.")
    coverage, risk = row["coverage"][0], row["risk"][0]
    if not math.isfinite(risk):
        return f"{method}: above {row['threshold']:.2f} it answers none of the other half."
    met = "as aimed at" if risk <= target else "the target is MISSED on questions it was not fitted on"
    return (f"{method}: above {row['threshold']:.2f} it answers {coverage:.0%} and is wrong on "
            f"{row['errors']} of these {row['answered']}, {risk:.0%} ({target:.0%} asked for): {met}.")


def cut_off_finding(name, cut, limit):
    """A warning (str) where many answers met --max_new_tokens, else "". cut: their share."""
    if not cut > CUT_OFF:
        return ""
    return (f"warning: {name}: {cut:.0%} of the answers were cut off at --max_new_tokens {limit} and are "
            f"mostly wrong for that; allow more.")

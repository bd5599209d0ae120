r"""What a response is worth: how sure the model was, the terms of its reward, and whether its answer is right.

Confidence (CDRL, arXiv 2603.12149, Eq. 3); reward terms (Eq. 4, section 3.2.2, and proper scores beside them); the
judge, a rule-based answer checker. Nothing here knows a model, or how text was sampled.

    is_correct(r"Three and four make \boxed{7}.", sample)  # True where sample.answer == "7"
"""
import math
import re
from functools import lru_cache
from typing import NamedTuple

import torch

# ----------------------------------------------------------------------------------------------------------------------
# 1. Confidence. Higher = more certain, everywhere in this repository. The paper's prose says the opposite of its own
#    Eq. 3; the equation, the authors' code and DeepConf (arXiv 2508.15260) agree with us: in a peaked distribution the
#    k - 1 runners-up have very negative log-probabilities, so minus the mean is large.
#    Known flaw: it is no probability, and not monotone in entropy: uniform over V > k tokens scores log V, more than
#    uniform over k, log k. Hence the alternatives `logprob` and `entropy`, read by the same `sequence_confidence`.


def top_k_for(vocab, k=20):
    """The k of Eq. 3 for a vocabulary of `vocab` tokens: k, but at most an eighth of a tiny vocabulary, at least 1."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    return min(k, max(1, vocab // 8))


def token_confidence(logits, k=20):
    """Eq. 3: conf_t = -(1/k) * sum of log p over the k most probable tokens.

    logits: (..., V), raw: before temperature, top-k, top-p, penalties and bans. Returns (...) fp32, nats, >= log k.
    Differentiable. The normaliser is taken out of the sum, so that no (..., V) log-softmax is stored.
    """
    logits = logits.float()
    top = logits.topk(top_k_for(logits.shape[-1], k), dim=-1).values
    return logits.logsumexp(-1) - top.mean(-1)


def token_entropy(logits):
    """Shannon entropy of the next token: (..., V) raw logits -> (...) fp32, nats, in [0, log V].

    Its negative is the `entropy` confidence. As log Z - E[logit] the gradient stays finite where a probability is 0.
    """
    logits = logits.float()
    return logits.logsumexp(-1) - (logits.softmax(-1) * logits).sum(-1)


def sequence_confidence(token_conf, mask, reading="mean", window=32):
    """One confidence per sequence, (B, T) and (B, T) -> (B,) fp32: the mean of Eq. 3, or a trace reading of DeepConf.

    token_conf: `token_confidence`, or log-probs (`logprob`: exp of the mean is in (0, 1]), or negative entropies.
    mask: bool or 0/1, true on generated tokens, EOS included, padding on either side excluded.
    reading: mean | tail: the last `window` tokens | min: the lowest sliding window | bottom: the lowest 10% of them, at
    least one. A sequence shorter than `window` is one window. ValueError on an unknown reading or an empty row.
    """
    if reading not in ("mean", "tail", "bottom", "min"):
        raise ValueError(f"unknown reading {reading!r}: choose mean, tail, bottom or min.")
    token_conf, mask = token_conf.float(), mask.bool()
    if not mask.any(-1).all():
        raise ValueError("a row of the mask is empty: a confidence needs at least one generated token.")
    if reading == "mean":
        return token_conf.masked_fill(~mask, 0).sum(-1) / mask.sum(-1)
    rows = []
    for conf, keep in zip(token_conf, mask):
        conf = conf[keep]
        windows = conf.unfold(0, min(window, len(conf)), 1).mean(-1)
        lowest = max(1, len(windows) // 10) if reading == "bottom" else 1
        rows.append(windows[-1] if reading == "tail" else windows.topk(lowest, largest=False).values.mean())
    return torch.stack(rows)


# ----------------------------------------------------------------------------------------------------------------------
# 2. Reward terms. Tensors that broadcast; c is a sequence confidence, `correct` is R_out in {0, 1} (or bool).


def perception_term(c, c_noised, alpha, beta):
    """Eq. 4, first term: alpha * tanh(beta * (C - C')), within +-alpha; C' is the confidence on the noised image."""
    return alpha * torch.tanh(beta * (c - c_noised))


def normalise_range(c, lo, hi):
    """Cnorm on an absolute scale: (c - lo) / (hi - lo) clipped to [0, 1] (gradient 0 there). ValueError if lo >= hi."""
    if not lo < hi:
        raise ValueError(f"normalise_range needs lo < hi, got {lo} and {hi}: measure them again on the base model.")
    return ((c - lo) / (hi - lo)).clamp(0, 1)


def normalise_group(c):
    """Cnorm inside a group: min-max over the last dimension, (..., G) -> (..., G) in [0, 1]; 0.5 if all are equal."""
    lo, hi = c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)
    spread = torch.where(hi > lo, hi - lo, 1)
    return torch.where(hi > lo, (c - lo) / spread, 0.5)


def calibration_linear(c_norm, correct):
    """Eq. 4, second term: (2R - 1) * Cnorm, in [-1, 1]. Improper: linear in Cnorm, so 0 or 1 is always the best bet."""
    return (2 * correct.to(c_norm) - 1) * c_norm


def calibration_brier(prob, correct):
    """Proper (RLCR, arXiv 2507.16806): 1 - (p - R)^2, in [0, 1]; its expectation peaks where p is the true rate."""
    return 1 - (prob - correct.to(prob)) ** 2


def calibration_log(prob, correct, floor=0.01):
    """Proper for rates in [floor, 1 - floor]: log p if right, log(1 - p) if wrong, p clipped (no gradient outside).

    Mapped affinely to [0, 1], like Brier: (score - log floor) / (log(1 - floor) - log floor); 0 = sure and wrong.
    """
    prob = prob.clamp(floor, 1 - floor)
    score = torch.where(correct.bool(), prob, 1 - prob).log()
    return (score - math.log(floor)) / (math.log(1 - floor) - math.log(floor))


def probability(c, slope, intercept):
    """The probability of being right that a confidence stands for: sigmoid(slope * c + intercept); any shape."""
    return torch.sigmoid(slope * c + intercept)


def fit_platt(c, correct, ridge=1e-3):
    """Fit `probability` by logistic regression (Platt, 1999): c, correct (N,) -> floats slope, intercept.

    Newton's method in float64 on the standardised confidence. Platt's smoothed targets, (N+ + 1)/(N+ + 2) and
    1/(N- + 2), keep the optimum finite for separable or one-class data; the ridge settles the slope of a constant c.
    ValueError unless both are equally long, not empty, and c is finite.
    """
    c, right = (torch.as_tensor(x).detach().cpu().double() for x in (c, correct))
    if c.ndim != 1 or c.shape != right.shape or len(c) == 0 or not c.isfinite().all():
        raise ValueError(f"fit_platt needs two finite (N,) inputs, got {tuple(c.shape)} and {tuple(right.shape)}.")
    targets = torch.where(right > 0, (right.sum() + 1) / (right.sum() + 2), 1 / (len(c) - right.sum() + 2))
    centre, scale = c.mean(), c.std(correction=0)
    scale = torch.where(scale > 1e-12 * (1 + centre.abs()), scale, 1)
    design = torch.stack([(c - centre) / scale, torch.ones_like(c)], dim=1)  # (N, 2)

    def loss(weights):
        z = design @ weights
        return torch.nn.functional.softplus(z).sum() - targets @ z + ridge / 2 * weights @ weights

    weights = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(design @ weights)
        hessian = (design.T * (p * (1 - p))) @ design + ridge * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(hessian, design.T @ (p - targets) + ridge * weights)
        if step.abs().max() < 1e-7:
            break
        while loss(weights - step) > loss(weights) and step.abs().max() > 1e-7:  # a full Newton step may overshoot
            step = step / 2
        weights = weights - step
    slope = weights[0] / scale
    return slope.item(), (weights[1] - slope * centre).item()


def format_reward(text, finished):
    r"""R_format in {0., 1.}: one well-formed, non-empty `\boxed{}`, words before it, and `finished` (ended by EOS)."""
    boxes = _boxes(text)
    if not finished or len(boxes) != 1 or text.count("\\boxed") != 1:
        return 0.0
    start, content = boxes[0]
    return float(text[content].strip() != "" and re.search(r"\w", text[:start]) is not None)


def outcome_reward(text, sample):
    """R_out in {0., 1.}: whether the judge below accepts the response."""
    return float(is_correct(text, sample))


# ----------------------------------------------------------------------------------------------------------------------
# 3. The judge. What meets a whole response runs in linear time; everything else sees at most MAX_ANSWER characters.

MAX_ANSWER = 1000
_MARKER = re.compile(
    r"\banswer(?: to [^.:\n]{1,60}?)?(?: \([A-Z]\))?[\s*]{0,4}(?:\bis\b|\bare\b|:|=)[:\s*]{0,9}", re.IGNORECASE)
_CLAUSE_END = re.compile(r"[.!?](?=[\s*]|$)|\n|\s(?:because|since)\s|,\s(?:as|so|which)\s")
_VALUE_STARTS = re.compile(r"\s(?:is|are|be|was|were|equals)\s|[=≈]|:\s")
_TRAILING_NUMBER = re.compile(r"-?[$€£]?\d[\d,.]*(?:\s?/\s?\d+)?\s?[%°]?(?:\s[^\W\d]+){0,4}$")


def extract_answer(text, choices=None):
    r"""The final answer of a response, or None. With `choices`, the option's letter wherever one is recognised.

    In order: the last non-empty balanced `\boxed{}`; what follows the last "answer is" or "answer:"; with choices, the
    last letter in brackets or the only option quoted; without, an opening "Yes," or "No,", or what the last sentence
    ends in, if that is a number or at most four words.
    """
    if not isinstance(text, str):
        return None
    for _, content in reversed(_boxes(text)):
        if boxed := text[content].strip():
            return _chosen_letter(boxed, choices) or boxed
    markers = list(_MARKER.finditer(text))
    if markers:
        clause = _CLAUSE_END.split(text[markers[-1].end():][:MAX_ANSWER], maxsplit=1)[0].strip(" *")
        if len(clause.split()) > 4 and not choices:
            clause = _ending(clause) or clause
        answer = _chosen_letter(clause, choices) if choices else clause
        if answer:
            return answer
    closing = text[-MAX_ANSWER:].strip()
    if choices:
        return _chosen_letter(closing, choices)
    verdict = re.match(r"\s*(yes|no|true|false)\s*[,.;\n]", text, re.IGNORECASE)
    if verdict:
        return verdict[1]
    return _ending(re.split(r"[.!?]\s+|\n", closing.rstrip(" .!?*$\n"))[-1])


def _ending(sentence):
    """The number, or the at most four words, that a sentence leads up to; else None."""
    value = _VALUE_STARTS.split(sentence)[-1].strip(" *$`")
    number = _TRAILING_NUMBER.search(value)
    wordy = len(value.split()) > 4 or (number and re.match(r"\D*\s$", value[:number.start()]))  # "I count 7 circles"
    if value and (_quantity(value) or not wordy):
        return value
    return number[0] if number else None


def equivalent(a, b, choices=None):
    """Whether two answers are the same. Symmetric; never raises, never evaluates code; None equals nothing.

    With `choices`, a letter in any dress and an option's text both name the option; an upper-case letter comes first.
    Text: case, spaces, articles, outer brackets and LaTeX dress are ignored; true = yes, false = no. Lists: in order.
    Numbers: relative tolerance 1e-6, integers exactly. A decimal with two places and two significant digits, or more,
    also equals what rounds to it (0.333 and 1/3). A unit counts only if both sides have one. A percentage against a
    bare number is read as written or as a ratio (50% equals 50 and 0.5); two percentages are compared as written.
    """
    if a is None or b is None:
        return False
    a, b = str(a).strip(), str(b).strip()
    if max(len(a), len(b)) > MAX_ANSWER:
        return a == b
    options = [_option(answer, choices) for answer in (a, b)] if choices else [None, None]
    if options == [None, None]:
        return _same(a, b)
    return None not in options and _canonical(choices[options[0]]) == _canonical(choices[options[1]])


def is_correct(text, sample):
    """The judge: does the response `text` answer `sample` (a data.Sample: .id, .answer, .choices, .meta) correctly?

    sample.answer: with choices the option's letter, else a value; a list or tuple means any of it. Unanswered = False.
    As in MathVista's judge, meta["answer_type"] == "float" rounds both sides to meta["precision"] decimals.
    Raises ValueError if the sample has no gold answer.
    """
    return accepts(extract_answer(text, sample.choices), sample)


def accepts(found, sample):
    """`is_correct` for an answer that is extracted already (str, or None = unanswered)."""
    if sample.answer is None:
        raise ValueError(f"sample {sample.id!r} has no gold answer, so no response to it can be judged.")
    if found is None or not str(found).strip():
        return False
    meta = sample.meta or {}
    places = _decimals(meta.get("precision"))
    for gold in sample.answer if isinstance(sample.answer, (list, tuple)) else [sample.answer]:
        if equivalent(found, gold, sample.choices):
            return True
        if meta.get("answer_type") == "float" and places is not None and not sample.choices:
            value, target = _quantity(str(found)), _quantity(str(gold))
            if value and target and round(value.number, places) == round(target.number, places):
                return True
    return False


def _decimals(precision):
    """A meta["precision"] as a number of decimals; None for what is no number from 0 to 15."""
    try:
        return int(float(precision)) if 0 <= float(precision) <= 15 else None
    except (TypeError, ValueError, OverflowError):
        return None


def _boxes(text):
    r"""(start, slice of the content) of each balanced `\boxed{...}`, an outer box after its inner ones; one pass."""
    boxes, opened = [], []
    for token in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):
        if token[0] == "}" and opened:
            opening = opened.pop()
            if opening[0] != "{":
                boxes.append((opening.start(), slice(opening.end(), token.start())))
        elif token[0] == "{" or token[0].startswith("\\boxed"):
            opened.append(token)
    return boxes


_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (  # LaTeX, typography -> plain characters
    (r"\*\*|`|\\(?:left|right|displaystyle|boxed|textdollar)\b|\\[()\[\],;:!]|\\?[$€£]", ""),
    (r"\\(?:text|math|operatorname)\w*\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:text|math)[a-z]+|\\\s|~|\\quad", " "),
    (r"\{,\}", ","),
    (r"\^\s*\{?\s*\\circ\s*\}?|\\degrees?\b|º", "°"),
    (r"\\%", "%"),
    (r"\\times\b|\\cdot\b|[×·]|(?<=\d)\s*x\s*(?=10\s*\^)", "*"),
    (r"÷|\\div\b", "/"),
    (r"[−–—]", "-"),
    (r"√", r"\\sqrt"),
    (r"\\sqrt\s*\[(\w)\]", r"\\root{\1}"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\pi\b|π", "pi "),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"^\s*(?:(?:about|approximately|around|roughly)\s|≈|\\approx\b)\s*", ""),
)]
_LETTER = re.compile(
    r"(?i:option|choice|answer|step|point|figure)?\s*[(\[{]*"
    r"(?:([A-Z])[)\]}.:][)\]},.;:]*(?:\s(?!.*\([A-Z]\)).*)?|([A-Za-z])[)\]}.]*)$", re.DOTALL)


def _plain(text):
    text = " ".join(text.split())  # no run of blanks for a pattern to backtrack over
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip()


def _canonical(text):
    """What is compared of a verbal answer: lower case, no spaces, articles, braces, quotes or outer brackets."""
    text = re.sub(r"^(?:the|an?)\s", "", _plain(text).lower())
    verdict = re.match(r"(yes|no|true|false)(?![^.,;:!])", text)
    if verdict:
        return {"true": "yes", "false": "no"}.get(verdict[1], verdict[1])
    text = re.sub(r"[\s{}\\\"'‘’“”_]|(?<=[a-z]{2})!", "", text).strip(".,;:?*")
    return re.sub(r"^[(\[]([^()\[\]]*)[)\]]$", r"\1", text)


def _bare_letter(text):
    """The letter, upper case, that a text is or opens with: "(B)", "b.", "option B", "B) red circle"; else None."""
    match = _LETTER.match(_plain(text))
    return (match[1] or match[2]).upper() if match else None


def _option(answer, choices):
    """Index of the option that a short answer is, by letter, text or value; None if none or several."""
    if len(answer) > MAX_ANSWER:
        return None
    if answer in choices and not re.fullmatch("[A-Z]", answer):  # an option's very text, even where that text is "(b)"
        return choices.index(answer)
    letter = _bare_letter(answer)
    if letter and ord(letter) - ord("A") < len(choices):
        return ord(letter) - ord("A")
    named = [i for i, option in enumerate(choices) if _canonical(option) == _canonical(answer)]
    named = named or [i for i, option in enumerate(choices) if _same(answer, option)]
    return named[0] if len({_canonical(choices[i]) for i in named}) == 1 else None


def _chosen_letter(text, choices):
    """Letter of the option that `text` is or names: the last letter in brackets or a lone one at the end; else the sole
    option quoted in the last sentence that quotes any. None without choices."""
    if not choices:
        return None
    option = _option(text, choices)
    if option is None:
        letters = re.findall(r"(?:\((?=[A-Z]\))|\b[Oo]ption )([A-Z])\b|(?:^|[\s*{])([A-Z])[.)}*$]*$", text)
        named = [ord(a or b) - ord("A") for a, b in letters if ord(a or b) - ord("A") < len(choices)][-1:]
        quotes = [(_plain(choice).lower().strip(" ."), i) for i, choice in enumerate(choices)]
        sentences = re.split(r"[.!?]\s|\n", text[-MAX_ANSWER:])
        while not named and sentences:
            sentence = _plain(sentences.pop()).lower()
            for quote, i in sorted(quotes, key=lambda pair: -len(pair[0])):  # "Aa or AA" does not also quote "AA"
                pattern = rf"(?<![\w.-]){re.escape(quote)}(?!\w|[.,]\d)"
                if (len(quote) > 1 or quote.isdigit()) and re.search(pattern, sentence):
                    named.append(i)
                    sentence = re.sub(pattern, " ", sentence)
        option = named[0] if len(named) == 1 else None
    return None if option is None else chr(ord("A") + option)


@lru_cache(2**16)      # a vote table compares the same few answers again and again
def _same(a, b):
    """`equivalent` without options, on at most MAX_ANSWER characters."""
    if ("=" in a) != ("=" in b):  # "x = 5" against "5"
        a, b = (re.sub(r"^[^=<>\d][^=<>]{0,19}=", "", answer) for answer in (a, b))
    first, second = _canonical(a), _canonical(b)
    if first == second:
        return first != "" or a == b
    if 1 in (len(first), len(second)) and _bare_letter(a) and _bare_letter(a) == _bare_letter(b):
        return True
    quantities = _quantity(a), _quantity(b)
    if all(quantities):
        return _same_quantity(*quantities)
    items, others = _items(a), _items(b)
    if len(items) == len(others) > 1:
        pairs = [(_canonical(x) == _canonical(y), _quantity(x), _quantity(y)) for x, y in zip(items, others)]
        return all(same or bool(x and y and _same_quantity(x, y)) for same, x, y in pairs)
    return _math_verify(a, b)


def _items(text):
    """The items of "[1, 2]", "1, 2" or "1 and 2", inner brackets kept whole; a single item if it is no list."""
    text = _plain(text).replace("\\{", "{").replace("\\}", "}")
    if text[:1] + text[-1:] in ("()", "[]", "{}"):
        text = text[1:-1]
    return re.split(r"\s*(?:,?\s+and\s+|[,;])\s*(?![^(\[]*[)\]])", text)


def _math_verify(a, b):
    """The optional `math-verify` package, for the algebra that these rules lack; False if it is absent or fails."""
    letters = [re.sub(r"\\[a-zA-Z]+|sin|cos|tan|log|exp", " ", answer) for answer in (a, b)]
    variables = [set(re.findall("[a-zA-Z]", text)) for text in letters]
    prose = any(re.search("[a-zA-Z]{3}", text) or _SEQUENCE.fullmatch(text) for text in letters)
    # Towers of powers and factorials end in big-integer code that no timeout can interrupt.
    huge = any(re.search(r"\^[^+\-*/]*\^|\^\W*\d{3}|!", answer) for answer in (a, b))
    if variables[0] != variables[1] or prose or huge or max(len(a), len(b)) > 200:
        return False
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException  # not an Exception, so it has to be named
    except ImportError:
        return False
    try:
        first, second = (parse(f"${answer}$", parsing_timeout=1) for answer in (a, b))
        return any(verify(*pair, timeout_seconds=1) for pair in ((first, second), (second, first)))
    except (Exception, TimeoutException):  # noqa: BLE001 - whatever a foreign parser raises, equality was not shown
        return False


class Quantity(NamedTuple):
    number: float  # as written: 50 for "50%"
    unit: str
    places: int  # decimals of a literal that may be a rounded value, else 0


_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
                 "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_NUMBER_WORDS)})\b", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_MIXED = re.compile(r"(?<![\d.])(\d+)(?:\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\s+(\d+)\s*/\s*(\d+))")  # 2 1/2
_SEQUENCE = re.compile(r"\d+(?:\s*[-/:]\s*\d+){2,}|\d+\s*-\s*\d+")  # 5-4-3-2-1, a date, a range: no arithmetic
_TOKEN = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[-+*/:^()]|\\frac|\\root|\\?sqrt|pi\b)")
_UNIT = re.compile(r"\s*|\s*(?:[%°]|[^\x00-\x7f]|(?:[cdkm]?m|in|ft|k?g|mg|m?s|h|hr|min|m?[lL]|k?[WNJ]|[AVKCF]|Pa|Hz)\b"
                   r"|(?<=\s)(?!(?:and|not|than|more|less|plus|minus|over)\b)[^\W\d_]{3,})[^\d\\]*(?:\^?\(?-?\d\)?)?")
_UNIT_NAMES = {"percent": "%", "degree": "°", "meter": "m", "metre": "m", "centimeter": "cm", "centimetre": "cm",
               "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "hour": "h", "minute": "min", "second": "s"}


def _quantity(text):
    """A number with or without a unit, else None. At most 100 characters, which bounds the recursion of `_evaluate`."""
    if len(text) > 100:
        return None
    text = _NUMBER_WORD.sub(lambda word: str(_NUMBER_WORDS.index(word[0].lower())), _plain(text)).rstrip(" .,;:")
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _MIXED.sub(lambda mixed: "({}+{}/{})".format(*filter(None, mixed.groups())), text)
    text = text.translate(str.maketrans("{}[]", "()()"))
    if _SEQUENCE.fullmatch(text):
        return None
    tokens, end = [], 0
    while token := _TOKEN.match(text, end):
        tokens.append(token[1])
        end = token.end()
    literal = re.fullmatch(r"-?\s*(\d*)\.(\d\d+)", text[:end].strip())
    places = len(literal[2]) if literal and len((literal[1] + literal[2]).lstrip("0")) >= 2 else 0
    unit = re.sub(r"[\s^()]", "", text[end:].lower())
    unit = unit.removesuffix("s") if len(unit) > 3 else unit
    try:
        number = _evaluate(tokens)
    except (ValueError, LookupError, ArithmeticError):  # off the grammar, cut short, a division by zero or 9^9^9
        return None
    if tokens or not math.isfinite(number) or not _UNIT.fullmatch(text, end):
        return None
    return Quantity(number, _UNIT_NAMES.get(unit, unit), places)


_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, ":": 2, "^": 3}


def _evaluate(tokens, floor=0):
    r"""Precedence climbing over + - * / : ^, brackets, \frac, \sqrt, pi and implied products; consumes `tokens`.

    Stops before an operator that binds no tighter than `floor`; 9 reads one operand. Errors: see the caller.
    """
    token = tokens.pop(0)
    if token in ("+", "-"):
        value = _evaluate(tokens, 2) * (-1 if token == "-" else 1)
    elif token == "(":
        value = _evaluate(tokens)
        if tokens.pop(0) != ")":
            raise ValueError("unbalanced brackets")
    elif token == "\\frac":
        value = _evaluate(tokens, 9) / _evaluate(tokens, 9)
    elif token == "\\root":
        index = _evaluate(tokens, 9)
        value = math.pow(_evaluate(tokens, 9), 1 / index)
    elif token.endswith("sqrt"):
        value = math.sqrt(_evaluate(tokens, 9))
    else:
        value = math.pi if token == "pi" else float(token)
    while tokens and tokens[0] != ")":
        operator = tokens[0] if tokens[0] in _BINDING else "*"
        if _BINDING[operator] <= floor:
            break
        if tokens[0] in _BINDING:
            tokens.pop(0)
        elif tokens[0][0] in ".0123456789":
            raise ValueError("two numbers in a row are no product")
        right = _evaluate(tokens, 2 if operator == "^" else _BINDING[operator])  # powers associate to the right
        if operator in "+-":
            value += right if operator == "+" else -right
        elif operator == "^":
            value = math.pow(value, right)
        else:
            value = value * right if operator == "*" else value / right
    return value


def _same_quantity(a, b):
    if a.unit and b.unit and a.unit != b.unit:
        return False
    if b.unit == "%" and not a.unit:
        a, b = b, a
    for factor in (1.0, 100.0) if a.unit == "%" and not b.unit else (1.0,):
        x, y = a.number, b.number * factor
        integers = x.is_integer() and y.is_integer()
        if x == y or (not integers and math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-12)):
            return True
        halves = [0.5 * 10.0**-a.places if a.places else 0.0, factor * 0.5 * 10.0**-b.places if b.places else 0.0]
        if abs(x - y) <= max(halves) * (1 + 1e-9):
            return True
    return False

r"""The judge: what a response answers, and whether that is right. Rules, no model.

    is_correct(r"Three and four make \boxed{7}.", sample)     # True where sample.answer == "7"
    extract_answer("The answer is (B), since (A) is red.", ["red", "blue"])        # "B"
    equivalent("1/2", r"\frac{1}{2}")                         # True

What meets a whole response runs in linear time; everything else sees at most MAX_ANSWER characters. Nothing is evaluated, and
no text raises. Left out on purpose: a language model as the judge.
"""
import math
import re
import unicodedata
from functools import lru_cache
from typing import NamedTuple

MAX_ANSWER = 1000
_MARKER = re.compile(
    r"(?<!/)\b(?:answer|(?:correct|right|best|final) (?:option|choice))(?: (?:option|choice))?(?: to [^.:\n]{1,60}?)?"
    r"(?: \([A-Z]\))?(?:[\s*]{0,4}(?:\bis\b|\bare\b|\b(?:must|should|would) be\b|[:：=>])|(?P<json>[\"'])\s?:)"
    r"(?:[:：\s*$]|\\[\[(]){0,9}|(?:答案(?:应?(?:[为选]|是(?!否))|(?=[:：]))"
    r"|(?<!\w)(?:所以|因此|故|我|应)?选(?=\s?[(（]?[A-Z](?!\w)))[:：\s*$]{0,9}", re.IGNORECASE)
_WOULD_BE = re.compile(r"\bwould be\W{0,9}$", re.IGNORECASE)
_JSON_VALUE = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'([^']*)'|(\[[^\]]*\]|[^,}\n]*)", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*]|$)|[。！？\n]|</")
_PART_END = re.compile(  # a part opens with the word that joins it on, but "since (A) is red," is cut away
    r";|^\W*(?:because|since|as|although|while)\s[^,;]*,\s|,\s(?=(?:as|which|while|but)\s)|(?:,\s|\()(?=not\s)"
    r"|\((?=(?:because|since|as)\s)|[,，]\s?(?=而?不是|因为)"
    r"|,?\s(?=(?:because|since|although|whereas|rather than|instead of|and not|so|hence|thus|therefore)\b)", re.IGNORECASE)
_ASIDE = re.compile(
    r"\W*(?:(?:because|since|although|whereas|rather|instead|and not|not|as|while)\b|而?不是|因为)", re.IGNORECASE)
_NEGATED = re.compile(r"\b(?:not|neither|nor|never|cannot)\b|n['’]t\b", re.IGNORECASE)
_REJECTED = re.compile(
    _NEGATED.pattern + r"|\b(?:wrong|incorrect|false|eliminated?|excluded?|ruled? out)\b|[不错]", re.IGNORECASE)
_DOUBTED = re.compile(_REJECTED.pattern + r"|\b(?:if|would|could|might|may|suppose|assum\w+|either|or|than|least|most"
                      r"|each|every|per)\b", re.IGNORECASE)
_VALUE_STARTS = re.compile(r"\s(?:is|are|be|was|were|equals)\s(?!the (?:\w+ )?answer$)|[=≈]|:\s")
_TRAILING_NUMBER = re.compile(r"-?[$€£]?\d[\d,.]*(?:\s?[/:]\s?\d+)?\s?[%°]?(?:\s[^\W\d]+){0,4}$")
_SUBJECT_NUMBER = re.compile(  # "42 is the sum"
    r"\W{0,9}(?:(?:so|thus|hence|therefore),?\s)?[*$]{0,3}(-?[$€£]?\d[\d,.]*(?:/\d+)?\s?[%°]?)[*$]{0,3}\s(?:is|are)\sthe\s",
    re.IGNORECASE)
_COUNTED = re.compile(  # a verb before the one number of a sentence: "took 7 cubes out of ...", but not "of 7", "figure 7"
    r"\b(?:is|are|was|were|has|have|had|took|takes?|taken|removed?|removes|used?|uses|counted|count|needed|needs?|sees?|saw|found"
    r"|gets?|got|makes?|made|gives?|leaves?|left|contains?|shows?|bought|sold|ate)\s(?:exactly\s|only\s|a total of\s)?[*$]{0,3}"
    r"(-?\d[\d,.]*\s?[%°]?)[*$]{0,3}(?=\s[a-z])", re.IGNORECASE)
_STATED = re.compile(  # what comes before a value that a sentence arrives at
    r"(?:\b(?:is|are|was|were|be|equals?|gives?|yields?|makes?|leaves?|gets?|have)|[=≈])[\s*$]*$", re.IGNORECASE)


def extract_answer(text, choices=None):
    r"""The final answer of a response, or None. With `choices`, the option's letter wherever one is recognised.

    In order: the last non-empty balanced `\boxed{}` (or else `\fbox{}`); what follows the last "answer is", "answer:",
    `"answer":` or "答案是" (an "answer would be" gives way to an earlier "answer is"); with choices, the option that the
    response opens or closes with, the last letter named, the last option quoted, the value that the last sentence arrives
    at; without, an opening "Yes," or "No,", or what the last sentence ends in, if that is a number or at most four words,
    or its only number. No answer is what is denied ("not B"), left open ("A or B"), only argued with ("because (A) ..."),
    or an echo of all the options.
    """
    if not isinstance(text, str):
        return None
    choices = [str(choice).strip() for choice in choices or ()][:26]
    for _, content in reversed(boxes(text) or boxes(text := text.replace(r"\fbox", r"\boxed"))):
        if boxed := text[content].strip():
            return choices and _letter(_option(boxed, choices)) or boxed
    markers = list(_MARKER.finditer(text))
    for marker in _settled(text, markers) + markers[-1:]:
        clause = _clause(text, marker)
        if choices:
            answer = _letter(_option(clause, choices))
        else:
            answer = (_parts(clause) or [clause])[0].strip(" *")
            answer = len(answer.split()) > 4 and _ending(answer) or answer
            if marker is not markers[-1] and not _quantity(answer):  # "the answer is found as follows: ... would be 7"
                continue
        if answer:
            return answer
    if choices:
        return _letter(_closing_option(text, choices))
    verdict = re.match(r"\s*(yes|no|true|false)\s*[,.;\n]", text, re.IGNORECASE)
    if verdict:
        return verdict[1]
    sentence = re.split(r"[.!?]\s+|\n", text[-MAX_ANSWER:].rstrip(" .!?*$\n"))[-1]
    return _ending(sentence) or (None if _asks(text) else _only_number(sentence))


def _settled(text, markers):
    """The last "answer is" before a closing "if we ignored ..., the answer would be" that concludes nothing: one or none."""
    def before(marker):
        return _SENTENCE_END.split(text[max(0, marker.start() - 200):marker.start()])[-1]

    if not markers or not _WOULD_BE.search(markers[-1][0]):
        return []
    end = markers[-1].end()
    sentence = before(markers[-1]) + _SENTENCE_END.split(text[end:end + 200], maxsplit=1)[0]
    if re.match(r"\W*(?:so|thus|hence|therefore|then)\b(?!.*\bif\b)", sentence, re.IGNORECASE):
        return []
    plain = (marker for marker in reversed(markers) if not _WOULD_BE.search(marker[0]))
    return [marker for marker in plain if not re.search(r"\b(?:if|whether|suppose)\b", before(marker), re.IGNORECASE)][:1]


def _clause(text, marker):
    """What a marker is followed by: the rest of its sentence, or the value of its key in JSON."""
    rest = text[marker.end():marker.end() + MAX_ANSWER]
    if not marker["json"]:
        return _SENTENCE_END.split(rest, maxsplit=1)[0]
    return next(filter(None, _JSON_VALUE.match(rest).groups()), "").replace("\\\\", "\\").strip()


def _asks(text):
    return re.search(r"[?？][\s*$]{0,9}$", text[-20:]) is not None


def _parts(sentence):
    """The parts of a sentence that may state its answer: no reasons, and nothing that the answer is set against."""
    return [part for part in _PART_END.split(sentence) if part.strip() and not _ASIDE.match(part)]


def _ending(sentence):
    """The number, or the at most four words, that a sentence leads up to; None if neither, or if it is denied."""
    part = (_parts(sentence) or [""])[-1]
    *others, value = _VALUE_STARTS.split(re.sub(r",?\sI (?:believe|think|guess|suppose)\W*$", "", part))
    subject = _SUBJECT_NUMBER.match(part)
    if subject and len(others) == 1 and not _DOUBTED.search(part):
        return subject[1].strip()
    value = re.sub(r"\W* (?:is|are) the (?:\w+ )?answer$", "", value.strip(" *$`,"))
    if _NEGATED.search(value):
        return None
    number = _TRAILING_NUMBER.search(value)
    wordy = len(value.split()) > 4 or (number and re.match(r"\D*[\s*$]$", value[:number.start()]))  # "I count 7 circles"
    if value and (_quantity(value) or not wordy):
        return value
    return number[0] if number else None


def _only_number(sentence):
    """The number of a sentence that holds no other and neither denies it nor doubts it: "She took 7 cubes out of the box"."""
    sentence = _said_once(sentence)
    if len(re.findall(r"\d+(?:[.,:]\d+)*", sentence)) + len(_NUMBER_WORD.findall(sentence)) != 1 or _DOUBTED.search(sentence):
        return None
    counted = _COUNTED.search(" ".join(_parts(sentence)))
    return counted and counted[1].strip()


def equivalent(a, b, choices=None):
    """Whether two answers are the same. Symmetric; never raises, never evaluates code; None equals nothing.

    With `choices`, a letter in any dress and an option's text both name the option; an upper-case letter comes first, and
    two letters are the same only where the two options are one text. Text: spaces, articles, LaTeX dress and, in words of
    three letters or more, case are ignored; true = yes, false = no. Lists: in order, but (0, 1) is not [0, 1].
    Numbers: relative tolerance 1e-6, integers exactly. A decimal with two places and two significant digits, or more,
    also equals what rounds to it (0.333 and 1/3). A unit counts only if both sides have one. A percentage against a
    bare number is read as written or as a ratio (50% equals 50 and 0.5); two percentages are compared as written.
    "1.5 million", too, equals 1.5 and 1500000; "one third" is 1/3, but "third" and "three quarters" (coins?) are not read so.
    """
    if a is None or b is None:
        return False
    a, b = str(a).strip(), str(b).strip()
    if max(len(a), len(b)) > MAX_ANSWER:
        return a == b
    choices = [str(choice).strip() for choice in choices or ()][:26]
    first, second = (_option(answer, choices) if choices else None for answer in (a, b))
    if first is None or second is None:
        return first is second and _same(a, b)
    return first == second or choices[first] == choices[second] != ""


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


def boxes(text):
    r"""(start, slice of the content) of each balanced `\boxed{...}`, an outer box after its inner ones; one pass."""
    found, opened = [], []
    for token in re.compile(r"\\boxed\s*\{|\\[{}]|[{}]").finditer(text, (text + "\\boxed").find("\\boxed")):
        if token[0] == "}" and opened:
            opening = opened.pop()
            if opening[0] != "{":
                found.append((opening.start(), slice(opening.end(), token.start())))
        elif token[0] == "{" or token[0].startswith("\\boxed"):
            opened.append(token)
    return found


_CHARACTERS = str.maketrans("−–—⁄÷×·‘’′“”", "---//**'''\"\"") | {ord("√"): r"\sqrt", ord("π"): r"\pi", ord("∞"): r"\infty"}
_COMMANDS = {"times": "*", "cdot": "*", "div": "/", "pi": "pi ", "infty": "infinity", "Omega": "Ω", "ohm": "Ω", "mu": "μ",
             "dfrac": r"\frac", "tfrac": r"\frac", "leq": "≤", "le": "≤", "geq": "≥", "ge": "≥", "quad": " ",
             "degree": "°", "degrees": "°", "pm": "±"}
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (  # LaTeX -> plain characters
    (r"\*\*|`|\\(?:left|right|displaystyle|boxed|textdollar)\b|\\[()\[\],;:!]|\\?[$€£¥₹]|\\(?=%)", ""),
    (r"\\(?:text|math|operatorname)\w*\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:text|math)[a-z]+|\\\s|~", " "),
    (r"\{,\}", ","),
    (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    (rf"\\({'|'.join(_COMMANDS)})(?![a-zA-Z])", lambda command: _COMMANDS[command[1]]),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),
    (r"\\sqrt\s*\[(\w)\]", r"\\root{\1}"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"^\s*(?:(?:about|approximately|around|roughly)\s|≈|\\approx\b)\s*|\s\((?:approximately|approx\.?|roughly)\)$", ""),
)]
_LABEL = re.compile(  # a letter, its dress, and what follows: "(B)", "b.", "Option B: red circle"
    r"(?i:option|choice|answer|step|point|figure)?\s*[(\[{]*([A-Za-z])([)\]}.:,;]*(?:\s-)?)(?:\s(\S.*))?", re.DOTALL)
_QUOTED = "\ue000"  # stands before the letter of an option whose text was here


def _plain(text):
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", r"^(\g<0>)", text.replace("º", "°"))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)).translate(_CHARACTERS)
    text = " ".join(text.split())  # no run of blanks for a pattern to backtrack over
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _canonical(text):
    """What is compared of a verbal answer: no article, braces, double or outer quotes, end marks, brackets around one."""
    text = re.sub(r"^(?:the|an?)\s(?=\w\w)", "", _plain(text), flags=re.IGNORECASE)
    text = re.sub(r"[{}\\\"_]|(?<=[a-z]{2})!", "", text).strip(" .,;:?*")
    return re.sub(r"^(?:'(.*)'|[(\[]([^()\[\],;]*)[)\]])$", r"\1\2", text).strip()


def _same_text(a, b):
    """The same words. Against a bare yes or no (or true or false), "yes, it does" is a yes; "yes, 3" is not "yes, 4"."""
    a, b = _canonical(a), _canonical(b)
    verdicts = [re.match(r"(yes|no|true|false)(?=$|\s?[.,;:!]|\s-)", side, re.IGNORECASE) for side in (a, b)]
    if all(verdicts) and (verdicts[0][0] == a or verdicts[1][0] == b):
        first, second = (verdict[0].lower().replace("true", "yes").replace("false", "no") for verdict in verdicts)
        return first == second
    return a != "" and _same_letters(a, b)


def _same_letters(a, b):
    """Equal but for case, and for spaces except in "1 2". A word of one or two letters may differ in case only where one
    side is all lower case: "b" is B, but Aa is not AA, and mW is not MW."""
    first, second = (re.sub(r"(?<!\d)\s|\s(?!\d)", "", side).lower() for side in (a, b))
    words = zip(*(re.findall(r"[^\W\d_]+", side) for side in (a, b)))
    return first == second and not any(
        p != q and p.lower() == q.lower() and len(p) < 3 and not p.islower() and not q.islower() for p, q in words)


def _bare_letter(text):
    """The letter, upper case, that a text is or opens with: "(B)", "b.", "option B", "B) red circle"; else None."""
    match = _LABEL.fullmatch(_plain(text))
    dressed = match and match[1].isupper() and re.match(r"[)\]}.:]", match[2]) and not re.search(r"\b[A-Z]\)", match[3] or "")
    return match[1].upper() if match and (dressed or not match[3]) else None


def _letter(option):
    return None if option is None else chr(ord("A") + option)


def _labelled(text, choices):
    """Index of the option that a text is by its letter, alone or before the option's own text; else None."""
    match = _LABEL.fullmatch(_plain(text).strip(" *#$"))
    option = ord(match[1].upper()) - ord("A") if match else len(choices)
    return option if option < len(choices) and (not match[3] or _same_text(match[3], choices[option])) else None


def _is_option(text, choices):
    """Index of the option that a text is, by its very text, its letter or its value; None if it is none or several."""
    text = text.strip()
    if not text or len(text) > MAX_ANSWER:
        return None
    if text in choices and not re.fullmatch("[A-Z]", text):  # an option's very text, even where that text is "(b)"
        return choices.index(text)
    labelled = _labelled(text, choices)
    if labelled is not None:
        return labelled
    for same in (lambda x, y: _plain(x) == _plain(y), _same_text, _same):
        found = [i for i, choice in enumerate(choices) if choice and same(text, choice)]
        if found:
            return found[0] if len({choices[i] for i in found}) == 1 else None
    return None


def _option(answer, choices):
    """Index of the option that a short answer is, or else that its first words or any later ones name; or None."""
    option = _is_option(answer, choices)
    if option is not None or len(answer) > MAX_ANSWER:
        return option
    letter = f"[A-{_letter(len(choices) - 1)}]"
    opening = re.match(rf"(?:\W|{_QUOTED}|(?:the|option|choice)\s)*({letter})(?![\w']|\s*=)(?!(?<=A)\s[a-z])"
                       rf"(?!\W*(?:[,/&、]|\b(?:and|or)\b)\W{{0,3}}{letter}\b)", "".join(_claims(answer, choices)[:1]))
    return ord(opening[1]) - ord("A") if opening else _named([answer], choices)


def _closing_option(text, choices):
    """Index of the option that a response without a box and an "answer is" decides for; None if none or several."""
    echo = r"\W{1,6}".join(rf"\b{_letter(i)}\W{{1,4}}{re.escape(choice)}" for i, choice in enumerate(choices) if choice)
    text = re.sub(echo, "\n", text).strip()
    sentences = [line for line in _SENTENCE_END.split(text[-MAX_ANSWER:]) if re.search(r"\w", line)]
    opening = _labelled(_SENTENCE_END.split(text[:MAX_ANSWER], maxsplit=1)[0], choices)
    if opening is not None and {_labelled(line, choices) for line in sentences} <= {None, opening}:
        return opening
    option = _is_option(text, choices)
    if option is None and len(sentences) == 1 and _bare_letter(text):  # "B) the green one"
        return _option(text, choices)
    if option is None:
        option = _named(sentences, choices)
    return _arrived_at(sentences[-1:], choices) if option is None and not _asks(text) else option


def _arrived_at(sentences, choices):
    """Index of the one option whose value a last sentence arrives at: "36 minus 12 gives 24", "... is \\frac{1}{3}"."""
    part = "".join(sentences) and (_parts(sentences[0]) or [""])[-1]
    value = _ending(part)
    if not value or not _quantity(value) or _DOUBTED.search(part) or not _STATED.search(part[:part.rfind(value)]):
        return None
    return _is_option(value, choices)


def _claims(sentence, choices):
    """The parts of a sentence that deny nothing, each option's text in them replaced by a mark and the option's letter."""
    sentence = _plain(sentence)
    quotes = {_plain(choice).strip(" ."): i for i, choice in enumerate(choices)}
    fold = re.IGNORECASE if len({quote.lower() for quote in quotes}) == len(quotes) else 0
    for quote in sorted(quotes, key=len, reverse=True):  # "Aa or AA" does not also quote "AA"
        if len(quote) > 1 or quote.isdigit():
            pattern = rf"(?<![\w./-]){re.escape(quote)}(?!\w|[.,/^]\d)"
            sentence = re.sub(pattern, _QUOTED + _letter(quotes[quote]), sentence, flags=fold)
    ends = [(part, re.split(r"\s(?:is|are|was|were)\s", part)[-1]) for part in _parts(sentence)]  # "What is not blue is (B)"
    return [end if _REJECTED.search(part) else part for part, end in ends if not _REJECTED.search(end)]


def _named(sentences, choices):
    """Index of the option that the last part of sentences to name one names; a letter comes before a text. Else None."""
    parts = [part for sentence in sentences for part in _claims(sentence, choices)][::-1]
    letter = f"[A-{_letter(len(choices) - 1)}]"
    listed = rf"(?<!{_QUOTED})\b{letter}\b\W{{0,3}}(?:[,/&]|\b(?:and|to|(or))\b)\W{{0,3}}{letter}\b"
    letters = (rf"[(\[]({letter})[)\]]|\b(?i:option|choice|answer)\s\W?({letter})\b"
               rf"|\b({letter})(?=\s(?:is|was|must be)\s(?:the\s)?(?:\w+ly\s)?(?:correct|right|best|answer))")
    for i, part in enumerate(parts):
        several = re.search(listed, part)
        if several and several[1]:  # "A or B" leaves it open
            return None
        last = rf"|(?:^|\s)({letter})\W*$" if i == 0 else ""  # earlier, "the point B." is a point
        if not several and (found := re.findall(letters + last, part)):
            return ord("".join(found[-1])) - ord("A")
    for part in parts:
        for piece in (part if re.search(r"\b(?:and|or)\b", part) else _VALUE_STARTS.split(part)[-1], part):
            if quoted := set(re.findall(f"{_QUOTED}({letter})", piece)):
                return ord(quoted.pop()) - ord("A") if len(quoted) == 1 else None
    return None


@lru_cache(2**16)      # a vote table compares the same few answers again and again
def _same(a, b):
    """`equivalent` without options, on at most MAX_ANSWER characters."""
    if a == b:
        return True
    a, b = _unnamed(a, b)
    intervals = [_INTERVAL.fullmatch(_plain(side)) for side in (a, b)]
    if all(intervals) and intervals[0].groups() != intervals[1].groups():
        return False
    if _same_item(a, b):
        return True
    items, others = _items(a), _items(b)
    if len(items) == len(others) > 1:
        return all(_same_item(x, y) for x, y in zip(items, others))
    return not (_quantity(a) and _quantity(b)) and _math_verify(a, b)


def _same_item(a, b):
    a, b = _unnamed(a, b)
    times = [_TIME.fullmatch(_plain(side).lower()) for side in (a, b)]
    if all(times):
        return all(x == y or not (x and y) for x, y in zip(*(time.groups() for time in times)))
    if _same_text(a, b):
        return True
    if 1 in (len(_canonical(a)), len(_canonical(b))) and _bare_letter(a) and _bare_letter(a) == _bare_letter(b):
        return True
    quantities = _quantity(a), _quantity(b)
    return all(quantities) and _same_quantity(*quantities)


def _unnamed(*answers):
    """The two answers without the "x =" (or "= x") that only one of them has."""
    answers = [re.sub(r"^([^=a-zA-Z]+)=\s*([a-zA-Z]\w?)\W*$", r"\2=\1", answer) for answer in answers]
    if ("=" in answers[0]) == ("=" in answers[1]):
        return answers
    return [re.sub(r"^[^=<>\d][^=<>]{0,19}=", "", answer) for answer in answers]


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
    prose = any(re.search(r"[a-zA-Z]{3}|['’′]|(?<!\w)\d+\s+\d|\bor\b", text) or _SEQUENCE.fullmatch(text) for text in letters)
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


_NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
                 "seventeen eighteen nineteen").split()
_NUMBER_WORDS += [f"{ten} {one}".removesuffix(" zero")
                  for ten in "twenty thirty forty fifty sixty seventy eighty ninety".split() for one in _NUMBER_WORDS[:10]]
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(_NUMBER_WORDS[::-1])})\b".replace(" ", "[ -]"), re.IGNORECASE)
_SAID_TWICE = re.compile(rf"({_NUMBER_WORD.pattern})\s\((\d+)\)|\b(\d+)\s\(({_NUMBER_WORD.pattern})\)", re.IGNORECASE)
_FRACTIONS = dict(zip("half third fourth fifth sixth seventh eighth ninth tenth".split(), range(2, 11))) | {"quarter": 4}
_FRACTION_WORD = re.compile(  # "twenty third" is none
    rf"(?:(an?|{'|'.join(_NUMBER_WORDS[1:10])})[ -])?({'|'.join(_FRACTIONS)})s?(?=$|\sof\b)", re.IGNORECASE)
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_MIXED = re.compile(r"(?<![\d.])(\d+)(?:\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\s+(\d+)\s*/\s*(\d+))")  # 2 1/2
_SEQUENCE = re.compile(r"\d+(?:\s*[-/:]\s*\d+){2,}|\d+\s*-\s*\d+")  # 5-4-3-2-1, a date, a range: no arithmetic
_TOKEN = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[-+*/:^()]|\\frac|\\root|\\?sqrt|pi\b)")
_TIME = re.compile(r"0?(\d{1,2}):(\d\d)(?:\s?([ap])\.?m\.?)?")  # 3:45 against 1:15: where both sides fit, no ratios
_INTERVAL = re.compile(r"([(\[])[^,;]*[,;][^,;]*([)\]])")
_UNIT = re.compile(  # a symbol, or a word after a space, and what follows it up to an exponent
    r"\s*|\s*(?:[%°'\"]|[^\x00-\x7f±]|(?:[pnμcdmkMGT]?(?:m|g|s|[lL]|A|V|W|N|J|F|Ω|Pa|Hz)|[KC]|in|ft|h|hr|min|sq)\b"
    r"|(?<=\s)(?!(?:and|not|than|more|less|plus|minus|over)\b)[^\W\d_]{3,})[^\d\\]*(?:\^?\(?-?\d\)?)?")
_UNIT_NAMES = dict(pair.split(":") for pair in (
    "meter:m metre:m gram:g second:s sec:s liter:L litre:L amp:A ampere:A volt:V watt:W newton:N joule:J farad:F ohm:Ω "
    "hertz:Hz pascal:Pa inch:in inche:in foot:ft feet:ft hour:h hr:h minute:min percent:% degree:° celsius:C unit: per:/ "
    "':ft \":in").split())
_UNIT_NAMES |= {prefix + name: short + symbol for name, symbol in _UNIT_NAMES.items() for prefix, short in (
    ("kilo", "k"), ("centi", "c"), ("milli", "m"), ("micro", "μ"), ("mega", "M"))}


def _unit(text):
    """A unit in symbols: "square centimeters" is cm2, "feet per second" ft/s; the plural of any other word is dropped."""
    def symbol(word):
        singular = word[0].removesuffix("s") if len(word[0]) > 3 else word[0]
        return _UNIT_NAMES.get(word[0].lower(), _UNIT_NAMES.get(singular.lower(), singular))

    text = re.sub(r"\b(?:square|sq\.?|(cubic))\s(\w+)", lambda power: power[2] + ("3" if power[1] else "2"), text)
    text = re.sub(r"[\s^()]", "", re.sub(r"[^\W\d_]+|['\"]", symbol, text))
    return text if text.strip("23") else ""


def _said_once(text):
    """A number that is said in words and in digits, once: "seven (7) cubes" is "7 cubes"; "six (7)" stays."""
    def digits(pair):
        word, number = (pair[1], pair[2]) if pair[1] else (pair[4], pair[3])
        return number if _NUMBER_WORD.sub(_number_word, word) == number else pair[0]

    return _SAID_TWICE.sub(digits, text)


def _number_word(word):
    name = word[0].lower().replace("-", " ")  # "fıve" matches, but is none
    return str(_NUMBER_WORDS.index(name)) if name in _NUMBER_WORDS else word[0]


def _fraction_word(words):
    """"one third" as 1/3. "Third" alone is a place, and "three quarters" may be coins."""
    numerator, name = (words[1] or "").lower(), words[2].lower()
    if name not in _FRACTIONS or numerator not in ("", "a", "an", *_NUMBER_WORDS):
        return words[0]
    if numerator in ("", "a", "an"):
        return f"1/{_FRACTIONS[name]}" if numerator or name == "half" else words[0]
    return words[0] if name == "quarter" else f"{_NUMBER_WORDS.index(numerator)}/{_FRACTIONS[name]}"


def _quantity(text):
    """A number with or without a unit, else None. At most 100 characters, which bounds the recursion of `_evaluate`."""
    if len(text) > 100:
        return None
    text = _said_once(_plain(text).rstrip(" .,;:"))
    twice = re.fullmatch(r"(.+?)(?:\s\(|\s*(?:=|≈|\\approx)\s*)(?:or )?(.+?)\)?", text)  # "5 (five)", "1/6 ≈ 0.17", not "5 (5)"
    if twice and twice[1] != twice[2]:
        first, second = _quantity(twice[1]), _quantity(twice[2])
        if first and second and _same_quantity(first, second):
            return first
    if fraction := _FRACTION_WORD.match(text):
        text = _fraction_word(fraction) + text[fraction.end():]
    text = _NUMBER_WORD.sub(_number_word, text)
    text = re.sub(r"\b(?:(?:(\d)|an?)\s)?hundred\b(?:\s(?:and\s)?(\d\d?)\b)?",
                  lambda word: str(100 * int(word[1] or 1) + int(word[2] or 0)), text, flags=re.IGNORECASE)
    if re.search(r"/|%|frac", text):
        text = re.sub(r"\sof\s\D*$", "", text)  # "1/2 of the cake"; "one of them" is no 1
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
    try:
        number = _evaluate(tokens)
    except (ValueError, LookupError, ArithmeticError):  # off the grammar, cut short, a division by zero or 9^9^9
        return None
    if tokens or not math.isfinite(number) or not _UNIT.fullmatch(text, end):
        return None
    return Quantity(number, _unit(text[end:]), places)


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


def _scaled(quantity):
    """"1.5 million cars" as 1500000 cars, which is then exact; None where there is no such word."""
    for word, scale in _SCALES.items():
        number = quantity.number * scale
        if re.match(rf"{word}(?!th)", quantity.unit, re.IGNORECASE) and math.isfinite(number):
            return Quantity(round(number, 6), quantity.unit[len(word):], 0)
    return None


def _same_quantity(a, b):
    scaled = _scaled(a), _scaled(b)
    if any(scaled) and _same_quantity(scaled[0] or a, scaled[1] or b):
        return True
    if a.unit and b.unit and not _same_letters(a.unit, b.unit):
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

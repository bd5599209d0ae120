r"""The judge: what a response answers, and whether that is right. Rules, no model, no `eval`.

    is_correct(r"Three and four make \boxed{7}.", sample)     # True where sample.answer == "7"
    extract_answer("The answer is (B), since (A) is red.", ["red", "blue"])        # "B"
    equivalent("1/2", r"\frac{1}{2}")                         # True

| kind     | the same                                                  | not the same                    |
|----------|-----------------------------------------------------------|---------------------------------|
| number   | 7 = 7.0, 1/2 = .5, 1/3 = .333, 1,234 = 1 234              | 1/3, .3; 2^-60, 2^-61; 0, 1e-15 |
| unit     | 5 cm = 5, 50% = .5 = 50, 41 pct = 41%, 1.5 million        | 5 cm, 5 m; 50%, .5%             |
| name     | x = 5, 5 = x, P(A) = 5 and x \approx 5 are 5              | 4x + y = 5 is not 5             |
| equation | 5 = 4x + y, 4x + y - 5 = 0                                | x = 5, y = 5; 5 = 2a, 2a        |
| relation | 7 <= x, x >= 7; x != 6, x \neq 6                          | x < 3, x <= 3                   |
| interval | 0 < x < 7, (0, 7); x \in [0, .5], [0, 1/2]                | [0, 5), [0, 5]                  |
| list     | [1, 2] = 1, 2 = 1 and 2                                   | (1, 2), (2, 1)                  |
| set      | {4, 1} = {1, 4}; x = 3 or x = -4, -4 or 3; \pm 2, {-2, 2} | {1, 4}, (4, 1)                  |
| algebra  | x/2 = \frac{x}{2}, 4 + x^2 = x^2 + 4, \sqrt{y}, sqrt(y)   | AB', A'B; A-B-C, A-C-B          |
| text     | yes = Yes. = true, \mbox{red} = red, the cat = cat        | Aa, AA; mW, MW                  |
| option   | B = (B) = b. = its text or value                          | two letters                     |

A response of any length is read in linear time, and no text raises. Left out on purpose: a model as the judge.
"""
import math
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_RESPONSE = 50_000  # characters of a response that are read: its first fifth, and its end
MAX_ANSWER = 1000      # characters of an answer; longer ones are compared as they stand
MAX_FORMULA = 100      # characters of a formula, which bounds its nesting too
MATH_VERIFY = None     # or the version of the package that `use_math_verify` switched on: store it with the verdicts

# ---- Patterns of a response: what ends it, where an answer is stated, what denies one

_CHAT_TOKEN = re.compile(  # "36.<|im_end|>"
    r"<[|｜](?:im_start|im_end|endoftext|end_of_text|eot_id|eom_id|start_header_id|end_header_id|begin_of_text|end"
    r"|user|assistant|system|(?:begin|end)▁of▁sentence)[|｜]>|</?s>|<(?:start_of_turn|end_of_turn|eos|bos)>")
_FAREWELL = re.compile(  # "36. I hope it is correct."
    r"(?:\b(?:I hope (?:it|this|that|so)|hope (?:this|it)|(?:please )?let me know|feel free)\b[^.!?\n]*[.!?\s]*)+$",
    re.IGNORECASE)
_MARKER = re.compile(  # "answer is", "correct option:", '"answer":', "答案是", "选B", "Answer \( 17 \)"
    r"(?<!/)\b(?:answer|(?:correct|right|best|final) (?:option|choice))(?: (?:option|choice))?"
    r"(?: to [^.:\n]{1,60}?)?(?: \([A-Z]\))?"
    r"(?:[\s*]{0,4}(?:\bis\b|\bare\b|\b(?:must|should|would) be\b|[:：=>])|(?P<json>[\"'])\s?:)(?:[:：\s*$]|\\[\[(]){0,9}"
    r"|(?:^|\n)[^\w\n]{0,6}(?:final )?answer[\s*]{0,4}(?=\\[\[(]|\$)(?:[\s$]|\\[\[(]){1,9}"
    r"|(?:答案(?:应?(?:[为选]|是(?!否))|(?=[:：]))"
    r"|(?<!\w)(?:所以|因此|故|我|应)?选(?=\s?[(（]?[A-Z](?!\w)))[:：\s*$]{0,9}", re.IGNORECASE)
_WOULD_BE = re.compile(r"\bwould be\W{0,9}$", re.IGNORECASE)
_JSON_VALUE = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'([^']*)'|(\[[^\]]*\]|[^,}\n]*)", re.DOTALL)
_BOXES_JOINED = re.compile(  # what stands between "\\boxed{4} and \\boxed{6}", "\\boxed{3}, and the area is \\boxed{9}"
    r"(?:,|;|&|and\b|(?P<either>,?\s?or\b))\s?(?:and\b|or\b)?\s?(?:(?:\w+ ){0,3}\w+ ?(?:=|\bis\b|\bare\b))?", re.IGNORECASE)
_CLOSING_BOLD = re.compile(r"(?P<line>[^\n]*)\*\*\W?(?P<bold>[^*\n]{1,80})\*\*[\s.]*$")  # "so\n**D**"
_SECOND_THOUGHT = re.compile(r"\b(?:no,|wait\b|actually\b|correction\b|on second thoughts?\b)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*]|$)|[。！？\n]|</")
_PART_END = re.compile(  # a part opens with the word that joins it on, but "since (A) is red," is cut away
    r";|^\W*(?:because|since|as|although|while)\s[^,;]*,\s|,\s(?=(?:as|which|while|but|in)\s)|(?:,\s|\()(?=not\s)"
    r"|\((?=(?:because|since|as)\s)|[,，]\s?(?=而?不是|因为)"
    r"|,?\s(?=(?:because|since|although|whereas|rather than|instead of|and not|so|hence|thus|therefore)\b)",
    re.IGNORECASE)
_ASIDE = re.compile(r"\W*(?:(?:because|since|although|whereas|rather|instead|and not|not|as|while|in (?:total|all))\b"
                    r"|而?不是|因为)", re.IGNORECASE)
_NEGATED = re.compile(r"\b(?:not|neither|nor|never|cannot)\b|n['’]t\b", re.IGNORECASE)
_REJECTED = re.compile(
    _NEGATED.pattern + r"|\b(?:wrong|incorrect|false|eliminated?|excluded?|ruled? out)\b|[不错]", re.IGNORECASE)
_DOUBTED = re.compile(_REJECTED.pattern + r"|\b(?:if|would|could|might|may|suppose|assum\w+|either|or|than|least|most"
                      r"|each|every|per)\b", re.IGNORECASE)

# ---- Patterns of a last sentence: the value that it arrives at

_VALUE_STARTS = re.compile(r"\s(?:is|are|be|was|were|equals)\s(?!the (?:\w+ )?answer$)|(?<![<>!])[=≈](?!=)|:\s")
_TRAILING_NUMBER = re.compile(r"-?[$€£]?\d[\d,.]*(?:\s?[/:]\s?\d+)?\s?[%°]?(?:\s[^\W\d]+){0,4}$")  # "7 red circles"
_SUBJECT_NUMBER = re.compile(  # "42 is the sum"
    r"\W{0,9}(?:(?:so|thus|hence|therefore),?\s)?[*$]{0,3}(-?[$€£]?\d[\d,.]*(?:/\d+)?\s?[%°]?)[*$]{0,3}"
    r"\s(?:is|are)\sthe\s", re.IGNORECASE)
_COUNTED = re.compile(  # a verb before the one number: "took 7 cubes out of ...", but not "of 7", "figure 7"
    r"\b(?:is|are|was|were|has|have|had|took|takes?|taken|removed?|removes|used?|uses|counted|count|needed|needs?|sees?"
    r"|saw|found|gets?|got|makes?|made|gives?|leaves?|left|contains?|shows?|bought|sold|ate)"
    r"\s(?:exactly\s|only\s|a total of\s)?[*$]{0,3}(-?\d[\d,.]*\s?[%°]?)[*$]{0,3}(?=\s[a-z])", re.IGNORECASE)
_STATED = re.compile(  # what comes before a value that a sentence arrives at
    r"(?:\b(?:is|are|was|were|be|equals?|gives?|yields?|makes?|leaves?|gets?|have)|[=≈])[\s*$]*$", re.IGNORECASE)
_STATEMENT_STARTS = re.compile(  # "We find that $x \neq 3$"
    r"\b(?:is|are|be|that|so|thus|hence|therefore|get|have|means|find|obtain|then)\b[,:]?\s|:\s", re.IGNORECASE)


def use_math_verify(on=True):
    """Let the package `math-verify` accept what these rules refuse (log_2 8 = 3), or, as by default, not.

    Returns the new MATH_VERIFY: the package's version, or None. Raises ImportError, in one sentence, if it is missing.
    """
    global MATH_VERIFY
    MATH_VERIFY = None
    _same.cache_clear()
    if on:
        try:
            from importlib.metadata import version

            import math_verify  # noqa: F401
            MATH_VERIFY = version("math-verify")
        except ImportError:  # PackageNotFoundError is one
            raise ImportError("math-verify is not installed; pip install math-verify, or judge without it.") from None
    return MATH_VERIFY


def extract_answer(text, choices=None):
    r"""The final answer of a response, or None. With `choices`, the option's letter wherever one is recognised.

    In order: the last non-empty balanced `\boxed{}` (or else `\fbox{}`), or several that one sentence joins, as a list;
    what follows the last "answer is", "answer:", `"answer":` or "答案是" (an "answer would be" gives way to an earlier
    "answer is"); with choices, the option that the response opens or closes with, the last letter named, the last option
    quoted, the value that the last sentence arrives at; without, an opening "Yes," or "No,", or what the last sentence
    ends in, if that is a formula, a number or at most four words, or its only number. A closing "answer is 7" or
    "**D**", or a second thought, revises what comes before. No answer is what is denied ("not B"), left open
    ("A or B"), only argued with ("because (A) ..."), or an echo of all the options.
    """
    if not isinstance(text, str):
        return None
    choices, text = _texts(choices), _response(text)
    boxed, end = _last_boxes(text)
    if boxed:
        return _revision(text[end:], choices, True) or choices and _letter(_option(boxed, choices)) or boxed
    answer, end = _marked(text, choices)
    if answer:
        return _revision(text[end:], choices) or answer
    if choices:
        return _letter(_closing_option(text, choices))
    verdict = re.match(r"\s*(yes|no|true|false)\s*[,.;\n]", text, re.IGNORECASE)
    if verdict:
        return verdict[1]
    sentence = re.split(r"[.!?]\s+|\n", text[-MAX_ANSWER:].rstrip(" .!?*$\n"))[-1]
    answer = _ending(sentence) or (None if _asks(text) else _only_number(sentence))
    return answer and re.sub(r"^[A-J]\.(?=\d)", "", answer)  # "C.162 °": an option's letter, glued on


def _texts(choices):
    """The options' texts, at most 26. MMStar has "nan" for an option that a question lacks."""
    choices = [str(choice).strip() for choice in choices or ()][:26]
    while choices and choices[-1] == "nan":
        choices.pop()
    return ["" if choice == "nan" else choice for choice in choices]


def _response(text):
    """The assistant's first turn, without "I hope it is correct"; of a very long one, its beginning and its end."""
    turns = (turn for turn in _CHAT_TOKEN.split(text) if turn.strip() not in ("", "assistant", "user", "model"))
    text = next(turns, "").rstrip()
    if len(text) > MAX_RESPONSE:
        text = text[:MAX_RESPONSE // 5] + "\n" + text[-MAX_RESPONSE * 4 // 5:]
    return text[:-300] + _FAREWELL.sub("", text[-300:])


def boxes(text):
    r"""(start, slice of the content) of each balanced `\boxed{...}`, an outer box after its inner ones; one pass."""
    contents, opened = [], []
    for token in re.compile(r"\\boxed\s*\{|\\[{}]|[{}]").finditer(text, (text + "\\boxed").find("\\boxed")):
        if token[0] == "}" and opened:
            opening = opened.pop()
            if opening[0] != "{":
                contents.append((opening.start(), slice(opening.end(), token.start())))
        elif token[0] == "{" or token[0].startswith("\\boxed"):
            opened.append(token)
    return contents


def _last_boxes(text):
    r"""The last box's content, or a list of those that one sentence joins: "4 and 6"; and where it ends in the text."""
    text = text if boxes(text) else text.replace(r"\fbox", r"\boxed")
    filled = [(start, content) for start, content in boxes(text) if text[content].strip()]
    if not filled:
        return None, 0
    contents, end = [text[filled[-1][1]].strip()], filled[-1][1].stop
    for (start, _), (_, before) in zip(filled[:0:-1][:9], filled[-2::-1]):
        joint = _BOXES_JOINED.fullmatch(_plain(text[before.stop + 1:start][:80])) if start > before.stop else None
        if not joint:
            break
        contents = [text[before].strip(), "or" if joint["either"] else "and"] + contents
    return " ".join(contents), end


def _marked(text, choices):
    """What the last "answer is" is followed by, and where that ends in the text; (None, 0) if nothing."""
    markers = list(_MARKER.finditer(text))
    for marker in _settled(text, markers) + markers[-1:]:
        clause = _clause(text, marker)
        if choices:
            answer = _letter(_option(clause, choices))
        else:
            answer = (_parts(clause) or [clause])[0].strip(" *")
            if len(answer.split()) > 4:
                answer = _ending(answer) or _only_number(answer) or answer
            if marker is not markers[-1] and not _quantity(answer):  # "the answer is as follows: ... would be 7"
                continue
        if answer:
            return answer, marker.end() + len(clause)
    return None, 0


def _settled(text, markers):
    """The last "answer is" before a closing "if we ..., the answer would be" that concludes nothing: one or none."""
    if not markers or not _WOULD_BE.search(markers[-1][0]):
        return []
    end = markers[-1].end()
    sentence = _before(text, markers[-1]) + _SENTENCE_END.split(text[end:end + 200], maxsplit=1)[0]
    if re.match(r"\W*(?:so|thus|hence|therefore|then)\b(?!.*\bif\b)", sentence, re.IGNORECASE):
        return []
    plain = (marker for marker in reversed(markers) if not _WOULD_BE.search(marker[0]))
    return [marker for marker in plain if not _conditional(_before(text, marker))][:1]


def _before(text, marker):
    return _SENTENCE_END.split(text[max(0, marker.start() - 200):marker.start()])[-1]


def _conditional(sentence):
    return re.search(r"\b(?:if|whether|suppose)\b", sentence, re.IGNORECASE)


def _revision(rest, choices, boxed=False):
    r"""What the text behind an answer puts in its place: "**D**" at its end, "No, it is C", a value after a box."""
    closing = _CLOSING_BOLD.search(rest[-MAX_ANSWER:])
    if closing and not _REJECTED.search(closing["line"]):
        option = _labelled(closing["bold"], choices) if choices else None
        if option is not None:
            return _letter(option)
        if not choices and not closing["line"].strip() and _quantity(closing["bold"]):
            return closing["bold"].strip()
    marker = next(reversed(list(_MARKER.finditer(rest))), None) if boxed else None
    if marker and not _WOULD_BE.search(marker[0]) and not _conditional(_before(rest, marker)):
        answer, _ = _marked(rest, choices)
        if answer and (answer in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if choices else _quantity(answer) and len(answer) < 40
                       and not re.match(r"about|approx|around|roughly|≈|\\approx", answer, re.IGNORECASE)):
            return answer
    thought = _SECOND_THOUGHT.search(rest[-MAX_ANSWER:]) if choices else None
    return _letter(_closing_option(rest[-MAX_ANSWER:][thought.start():], choices)) if thought else None


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
    """The formula, the number, or the at most four words, that a sentence leads up to; None if none, or if denied."""
    part = (_parts(sentence) or [""])[-1]
    part = re.sub(r"(?:,?\sI (?:believe|think|guess|suppose)|[\s$]+is (?:the|our|my) (?:answer|solution))\W*$", "", part)
    if statement := _statement(part):
        return statement
    *others, value = _VALUE_STARTS.split(part)
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


def _statement(part):
    r"""The formula without words that a sentence ends in: "x \neq 3", "5 = 2a + b", a span in $. Not "x = 5", which is 5."""
    spans = re.split(r"\$+|\\[()\[\]]", part.strip(" *`,."))
    in_span = len(spans) % 2 == 0 or (len(spans) > 1 and not spans[-1])
    formula = ((spans[-1] or spans[-2]) if in_span else _STATEMENT_STARTS.split(part)[-1]).strip(" *$`,.")
    plain = _plain(formula)
    if in_span and re.search(r"\\(?:text|mbox)", formula) and "=" not in plain:
        return formula
    if re.search(r"(?<![\\a-zA-Z])(?!infinity|sqrt|and\b)[a-zA-Z]{3,}", plain) or not re.search(r"\w", plain):
        return None
    sides = _EQUALS.split(plain)
    if len(sides) == 1:
        return formula if in_span or re.search(r"[<>≤≥≠∈±∪]", plain) else None
    named = any(map(_is_name, sides)) and formula != part.strip(" *$`,.") and not re.search("[±∈]", plain)
    return formula if _listed_names(plain) or (len(sides) == 2 and not named and re.search("[a-zA-Z]", plain)) else None


def _only_number(sentence):
    """The number of a sentence that holds no other and neither denies it nor doubts it: "She took 7 cubes out of the box"."""
    sentence = _said_once(sentence)
    numbers = re.findall(r"\d+(?:[.,:]\d+)*", sentence) + _NUMBER_WORD.findall(sentence)
    if len(numbers) != 1 or _DOUBTED.search(sentence):
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
    "1.5 million", too, equals 1.5 and 1500000; "one third" is 1/3, but "third" and "three quarters" (coins?) are not so.
    Formulas: exact values at a few rational points. See the table of kinds above.
    """
    if a is None or b is None:
        return False
    a, b = str(a).strip(), str(b).strip()
    if max(len(a), len(b)) > MAX_ANSWER:
        return a == b
    choices = _texts(choices)
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


def accepts(answer, sample):
    """`is_correct` for an answer that is extracted already (str, or None = unanswered)."""
    if sample.answer is None:
        raise ValueError(f"sample {sample.id!r} has no gold answer, so no response to it can be judged.")
    if answer is None or not str(answer).strip():
        return False
    meta = sample.meta or {}
    places = _decimals(meta.get("precision"))
    for gold in sample.answer if isinstance(sample.answer, (list, tuple)) else [sample.answer]:
        if equivalent(answer, gold, sample.choices):
            return True
        if meta.get("answer_type") == "float" and places is not None and not sample.choices:
            value, target = _quantity(str(answer)), _quantity(str(gold))
            if value and target and round(float(value.number), places) == round(float(target.number), places):
                return True
    return False


def _decimals(precision):
    """A meta["precision"] as a number of decimals; None for what is no number from 0 to 15."""
    try:
        return int(float(precision)) if 0 <= float(precision) <= 15 else None
    except (TypeError, ValueError, OverflowError):
        return None


# ---- Plain text: one spelling of LaTeX and Unicode

_CHARACTERS = str.maketrans("−–—⁄÷×·‘’′“”⩽⩾", "---//**'''\"\"≤≥") | {
    ord("√"): r"\sqrt", ord("π"): r"\pi", ord("∞"): r"\infty"}
_COMMANDS = dict(pair.split(":") for pair in (
    r"times:* cdot:* div:/ infty:infinity Omega:Ω ohm:Ω mu:μ dfrac:\frac tfrac:\frac cfrac:\frac leq:≤ le:≤ leqslant:≤ "
    r"geq:≥ ge:≥ geqslant:≥ lt:< gt:> neq:≠ ne:≠ in:∈ cup:∪ approx:≈ simeq:≈ degree:° degrees:° pm:± lbrace:\{ "
    r"rbrace:\} varnothing:∅ emptyset:∅").split()) | {"pi": "pi ", "quad": " ", "qquad": " ", "lor": " or ", "land": " and "}
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (  # LaTeX -> plain characters
    (r"\*\*|`|\\(?:left|right|[bB]igg?[lr]?|displaystyle|boxed|textdollar)(?![a-zA-Z])|\\[()\[\]!]|\\?[$€£¥₹]|\\(?=%)", ""),
    (r"\\(?:text|math|operatorname|mbox|hbox|boldsymbol)\w*\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:text|math)[a-z]+|\\[\s,;:]|~", " "),
    (r"\\\\(?![a-zA-Z])", ";"),
    (r"\{,\}", ","),
    (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    (rf"\\({'|'.join(_COMMANDS)})(?![a-zA-Z])", lambda command: _COMMANDS[command[1]]),
    (r"<=|=<", "≤"), (r">=", "≥"), (r"!=", "≠"),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),
    (r"\\sqrt\s*\[(\w)\]", r"\\root{\1}"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"^\s*(?:(?:about|approximately|around|roughly)\s|≈)\s*|\s\((?:approximately|approx\.?|roughly)\)$", ""),
)]


@lru_cache(2**12)      # an answer meets every option, item by item
def _plain(text):
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", r"^(\g<0>)", text.replace("º", "°"))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)).translate(_CHARACTERS)
    text = " ".join(text.split())  # no run of blanks for a pattern to backtrack over
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


# ---- Options

_LABEL = re.compile(  # a letter, its dress, and what follows: "(B)", "b.", "Option B: red circle"
    r"(?i:option|choice|answer|step|point|figure)?\s*[(\[{]*([A-Za-z])([)\]}.:,;]*(?:\s-)?)(?:\s(\S.*))?", re.DOTALL)
_QUOTED = "\ue000"  # stands before the letter of an option whose text was here
_ARTICLE_OR_PRONOUN = r"(?!(?<=[AI])\s(?!is\b)[a-z])"  # after a letter: "A dog", "I am sure"


def _bare_letter(text):
    """The letter, upper case, that a text is or opens with: "(B)", "b.", "option B", "B) red circle"; else None."""
    match = _LABEL.fullmatch(_plain(text))
    dressed = (match and match[1].isupper() and re.match(r"[)\]}.:]", match[2])
               and not re.search(r"\b[A-Z]\)", match[3] or ""))
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
        matches = [i for i, choice in enumerate(choices) if choice and same(text, choice)]
        if matches:
            return matches[0] if len({choices[i] for i in matches}) == 1 else None
    return None


def _option(answer, choices):
    """Index of the option that a short answer is, or else that its first words or any later ones name; or None."""
    option = _is_option(answer, choices)
    if option is not None or len(answer) > MAX_ANSWER:
        return option
    letter = f"[A-{_letter(len(choices) - 1)}]"
    opening = re.match(rf"(?:\W|{_QUOTED}|(?:the|option|choice)\s)*({letter})(?![\w']|\s*=)(?!(?<=[AI])\s[a-z])"
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
    sentence = _plain(re.sub(r"\s?—\s?|\s(?:–|--+)\s", " ; ", sentence))
    quotes = {_plain(choice).strip(" ."): i for i, choice in enumerate(choices)}
    fold = re.IGNORECASE if len({quote.lower() for quote in quotes}) == len(quotes) else 0
    for quote in sorted(quotes, key=len, reverse=True):  # "Aa or AA" does not also quote "AA"
        if len(quote) > 1 or quote.isdigit():
            pattern = rf"(?<![\w./-]){re.escape(quote)}(?!\w|[.,/^]\d)"
            sentence = re.sub(pattern, _QUOTED + _letter(quotes[quote]), sentence, flags=fold)
    sentence = re.sub(r"\s;\s[a-z][^A-Z;]*$", "", sentence)  # "D - it is the tallest": an aside that names nothing
    ends = [(part, re.split(r"\s(?:is|are|was|were)\s", part)[-1]) for part in _parts(sentence)]  # "What is not blue is (B)"
    return [end if _REJECTED.search(part) else part for part, end in ends if not _REJECTED.search(end)]


def _named(sentences, choices):
    """Index of the option that the last part of sentences to name one names; a letter comes before a text. Else None."""
    parts = [part for sentence in sentences for part in _claims(sentence, choices)][::-1]
    letter = f"[A-{_letter(len(choices) - 1)}]"
    listed = rf"(?<!{_QUOTED})\b{letter}\b\W{{0,3}}(?:[,/&]|\b(?:and|to|(or))\b)\W{{0,3}}{letter}\b"
    letters = (rf"[(\[]({letter})[)\]]|\b(?i:option|choice|answer)\s\W?({letter})\b(?!(?<=I)\s[a-z])"
               rf"|\b({letter})(?=\s(?:is|was|must be)\s(?:the\s)?(?:\w+ly\s)?(?:correct|right|best|answer))")
    for i, part in enumerate(parts):
        several = re.search(listed, part)
        if several and several[1]:  # "A or B" leaves it open
            return None
        last = rf"|(?:^|\s)({letter})\W*$" if i == 0 else ""  # earlier, "the point B." is a point
        if not several and (matches := re.findall(letters + last, part)):
            return ord("".join(matches[-1])) - ord("A")
    for part in parts:
        for piece in (part if re.search(r"\b(?:and|or)\b", part) else _VALUE_STARTS.split(part)[-1], part):
            if quoted := set(re.findall(f"{_QUOTED}({letter})", piece)):
                return ord(quoted.pop()) - ord("A") if len(quoted) == 1 else None
    return None


# ---- Two answers

_EQUALS = re.compile(r"\s*(?:[=≈]|∈(?=\s*\\?\{))\s*")
_FUNCTION = re.compile(r"\b([fghpq]|[A-Z]|[A-Za-z]{2,}\d?)'?\([^()]*\)")  # f(-1), P(X > 2)
_RELATION = re.compile(r"\s*([<>≤≥≠∈])\s*")
_MIRRORED = str.maketrans("<>≤≥", "><≥≤")
_TIME = re.compile(r"0?(\d{1,2}):(\d\d)(?:\s?([ap])\.?m\.?)?")  # 3:45 against 1:15: where both sides fit, no ratios
_INTERVAL = re.compile(r"(?:([^∈,;]{1,40}?)\s?∈\s?)?([(\[\]])([^,;]*)[,;]([^,;]*)([)\]\[])")  # "[0, 5)", "x ∈ ]0, 5["
_SEPARATOR = re.compile(r"\s*(?:(?:,\s*)?\b(?:and|(or))\b|[,;])\s*(?![^(\[{]*[)\]}])")


@lru_cache(2**14)      # a vote table compares the same few answers again and again
def _same(a, b):
    """`equivalent` without options, on at most MAX_ANSWER characters."""
    if a == b:
        return True
    a, b = _unnamed(_plain(a), _plain(b))
    same = _same_region(a, b)
    if same is None:
        same = _same_item(a, b) or _same_list(a, b)
    return same or bool(MATH_VERIFY) and not (_quantity(a) and _quantity(b)) and _math_verify(a, b)


def _unnamed(a, b):
    """The values of "x = 5" (or "5 = x") and "5", or of two equations of one name. ("x", "y") where the names differ."""
    (name, value), (other, other_value) = _named_value(a), _named_value(b)
    if name and other:
        return (value, other_value) if _same_letters(name, other) else (name, other)
    return (a, b) if _EQUALS.search(a) and _EQUALS.search(b) else (value, other_value)


def _named_value(text):
    """("x", "5") of "x = 5" and of "5 = x"; (None, text) where no name stands alone on a side: "4x + y = 5"."""
    sides = _EQUALS.split(text)
    if len(sides) == 1 or _listed_names(text):
        return None, text
    if _is_name(sides[0]):
        return sides[0], _EQUALS.split(text, maxsplit=1)[1]
    return (sides[1], sides[0]) if len(sides) == 2 and _is_name(sides[1]) else (None, text)


def _listed_names(text):
    """Whether a text is a list with a name before each value: "x = 3, y = 4"."""
    items = _items(text)[0]
    return len(items) > 1 and all(map(_EQUALS.search, items))


def _is_name(side):
    r"""Whether a side of an equation names its value: x, x_1, AB, \angle ABC, f(2), (u, v), total area; not 2x, xy, a + b."""
    side = _FUNCTION.sub(r"\1", side.replace("{", "").replace("}", ""))
    return (re.fullmatch(r"[(|]?[^\W\d][^-+*/^=<>≤≥≠±!]{0,39}|\\(?!frac|sqrt|root|int|sum)[a-z]+[\w\s]{0,20}", side) is not None
            and not re.fullmatch(r"[a-z]{2}|.*\W\d.*", side))


def _same_region(a, b):
    """For intervals and inequalities, whether they are the same; None where both sides are neither."""
    unions = [[_interval(piece) for piece in re.split(r"\s*(?:∪|\bor\b)\s*", side)] for side in (a, b)]
    if all(map(all, unions)):
        return _same_items(*unions, False, _same_interval)
    if not _RELATION.search(a + b):
        return None
    if a == b:
        return True
    sides = [_RELATION.split(side) for side in (a, b)]
    sides = [side[::-1] if side[1:2] and side[1] in ">≥" else side for side in sides]
    signs = [[sign.translate(_MIRRORED) if sign in ">≥" else sign for sign in side[1::2]] for side in sides]
    if signs[0] != signs[1]:
        return False
    if all(_same_item(x, y) for x, y in zip(sides[0][::2], sides[1][::2])):
        return True
    return len(signs[0]) == 1 and _same_difference(sides[0][::2], sides[1][::2], signs[0][0] == "≠")


def _interval(text):
    """(name or None, low end, closed?, high end, closed?) of "[0, 5)", "0 <= x < 5" or "x >= 0"; None if it is neither."""
    if match := _INTERVAL.fullmatch(text):
        name, left, low, high, right = match.groups()
        return name, low.strip(), left == "[", high.strip().lstrip("+"), right == "]"
    terms = _RELATION.split(text)
    signs = terms[1::2]
    if not signs or {"≠", "∈"} & {*signs} or len({sign in "<≤" for sign in signs}) > 1:
        return None
    if signs[0] in ">≥":
        terms = [term.translate(_MIRRORED) for term in terms[::-1]]
    if len(terms) == 3 and _is_name(terms[0]) != _is_name(terms[2]):
        terms = ["-infinity", "<", *terms] if _is_name(terms[0]) else [*terms, "<", "infinity"]
    if len(terms) != 5 or not _is_name(terms[2]):
        return None
    return terms[2], terms[0], terms[1] == "≤", terms[4], terms[3] == "≤"


def _same_interval(a, b):
    return (not (a[0] and b[0] and a[0] != b[0]) and a[2::2] == b[2::2]
            and all(x == y or _same_item(x, y) for x, y in zip(a[1::2], b[1::2])))


def _same_list(a, b, depth=0):
    """Whether two lists hold the same items; in any order in sets: {1, 2}, "1 or 2", "x = 1, y = 2", "x = 1, x = 2"."""
    (items, bracket), (others, other_bracket) = _items(a), _items(b)
    for plus_minus, others_of in ((items, others), (others, items)):
        if len(plus_minus) == 1 and len(others_of) == 2 and plus_minus[0].count("±") == 1:  # ±2 is {2, -2}
            plus_minus[:] = [plus_minus[0].replace("±", sign) for sign in "+-"]
            bracket, other_bracket = (bracket or "{", other_bracket or "{")
    if len(items) != len(others) or len(items) == 1 or max(len(items), depth) > 60:
        return False
    names = [{_named_value(item)[0] for item in side} for side in (items, others)]
    ordered = {bracket, other_bracket} & {"(", "["} or not (
        "{" in (bracket, other_bracket) or all(None not in name for name in names)
        or any(len(name) == 1 and None not in name for name in names))
    distinct = any(len(name) > 1 for name in names) and names[0] != names[1]  # x = 1, y = 2 against 1, 2
    return _same_items(items, others, ordered or distinct,
                       lambda x, y: _same_item(x, y) or depth < 2 and _same_list(x, y, depth + 1))


def _same_items(items, others, ordered, same):
    """Whether the items match one to one: in this order or, of at most 20, in any. Symmetric if `same` is."""
    if ordered or len(items) != len(others) or len(items) > 20:
        return len(items) == len(others) and all(same(x, y) for x, y in zip(items, others))

    def all_match(some, rest):
        rest = list(rest)
        for item in some:
            match = next((i for i, other in enumerate(rest) if same(item, other)), None)
            if match is None:
                return False
            rest.pop(match)
        return True

    return all_match(items, others) or all_match(others, items)


def _items(text):
    """(items, "(", "[", "{" or "") of "[1, 2]", "{1, 2}", "1, 2" or "1 or 2", which is a set; inner brackets kept whole."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    bracket = text[:1] if text[:1] + text[-1:] in ("()", "[]", "{}") else ""
    pieces = _SEPARATOR.split(text[1:-1] if bracket else text)
    return pieces[::2], bracket or ("{" if "or" in pieces[1::2] and all(map(re.compile(r"\d").search, pieces[::2])) else "")


def _same_item(a, b):
    """Whether two items of lists, or whole answers that are no lists, are the same."""
    a, b = _unnamed(a, b)
    times = [_TIME.fullmatch(side.lower()) for side in (a, b)]
    if all(times):
        return all(x == y or not (x and y) for x, y in zip(*(time.groups() for time in times)))
    if _same_text(a, b):
        return True
    if 1 in (len(_canonical(a)), len(_canonical(b))) and _bare_letter(a) and _bare_letter(a) == _bare_letter(b):
        return True
    quantities = _quantity(a), _quantity(b)
    if all(quantities):
        return _same_quantity(*quantities)
    sides = _EQUALS.split(a), _EQUALS.split(b)
    return len(sides[0]) == len(sides[1]) == 2 and _same_difference(*sides, True) or _same_formula(a, b)


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


def _math_verify(a, b):
    """The verdict of `math-verify`; False if it fails, or where it is known to accept too much."""
    letters = [re.sub(r"\\[a-zA-Z]+|sin|cos|tan|log|exp", " ", answer) for answer in (a, b)]
    variables = [set(re.findall("[a-zA-Z]", text)) for text in letters]
    prose = any(re.search(r"[a-zA-Z]{3}|['’′]|(?<!\w)\d+\s+\d|\bor\b", text) or _SEQUENCE.fullmatch(text) for text in letters)
    # Towers of powers and factorials end in big-integer code that no timeout can interrupt.
    huge = any(re.search(r"\^[^+\-*/]*\^|\^\W*\d{3}|!", answer) for answer in (a, b))
    if variables[0] != variables[1] or prose or huge or max(len(a), len(b)) > 200:
        return False
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException  # not an Exception, so it has to be named
    try:
        first, second = (parse(f"${answer}$", parsing_timeout=1) for answer in (a, b))
        return any(verify(*pair, timeout_seconds=1) for pair in ((first, second), (second, first)))
    except (Exception, TimeoutException):  # noqa: BLE001 - whatever a foreign parser raises, equality was not shown
        return False


# ---- Numbers with their units, and formulas

class Quantity(NamedTuple):
    number: Fraction | float  # as written: 50 for "50%"; exact but for roots and pi
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
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_THOUSANDS = re.compile(  # 1,234 and 1 234, but not 1 200/300
    r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.,])[1-9]\d{0,2}(?:\s\d{3})+(?![\d,]|\s?/|\s\d)")
_MIXED = re.compile(r"(?<![\d.])(\d+)(?:\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\s+(\d+)\s*/\s*(\d+))")  # 2 1/2
_SEQUENCE = re.compile(r"\d+(?:\s*[-/:]\s*\d+){2,}|\d+\s*-\s*\d+")  # 5-4-3-2-1, a date, a range: no arithmetic
_TOKEN = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?|[-+*/:^()]|\\frac|\\root|\\?sqrt|pi\b)")
_VARIABLE = re.compile(r"\s*(\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|rho|sigma|tau|phi|omega)(?![a-z])"
                       r"|[^\W\d_](?:_?\d+|_\(\w+\)|_\w)?)")
_UNIT = re.compile(  # a symbol, or a word after a space, and what follows it up to an exponent
    r"\s*|\s*(?:[%°'\"]|[^\x00-\x7f±]|(?:[pnμcdmkMGT]?(?:m|g|s|[lL]|A|V|W|N|J|F|Ω|Pa|Hz)|[KC]|in|ft|h|hr|min|sq)\b"
    r"|(?<=\s)(?!(?:and|not|than|more|less|plus|minus|over)\b)[^\W\d_]{3,})[^\d\\]*(?:\^?\(?-?\d\)?)?")
_UNIT_NAMES = dict(pair.split(":") for pair in (
    "meter:m metre:m gram:g second:s sec:s liter:L litre:L amp:A ampere:A volt:V watt:W newton:N joule:J farad:F ohm:Ω "
    "hertz:Hz pascal:Pa inch:in inche:in foot:ft feet:ft hour:h hr:h minute:min percent:% percentage:% pct:% degree:° "
    "celsius:C unit: per:/ ':ft \":in").split())
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


@lru_cache(2**12)
def _quantity(text):
    """A number with or without a unit, else None. At most MAX_FORMULA characters, which bounds `_evaluate`'s recursion."""
    if len(text) > MAX_FORMULA:
        return None
    text = _said_once(_plain(text).rstrip(" .,;:"))
    twice = re.fullmatch(r"(.+?)(?:\s\(|\s*[=≈]\s*)(?:or )?(.+?)\)?", text)  # "5 (five)", "1/6 ≈ 0.17", not "5 (5)"
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
    text = _arithmetic(text)
    if _SEQUENCE.fullmatch(text):
        return None
    tokens, end = _tokens(text, _TOKEN)
    literal = re.fullmatch(r"-?\s*(\d*)\.(\d\d+)", text[:end].strip())
    places = len(literal[2]) if literal and len((literal[1] + literal[2]).lstrip("0")) >= 2 else 0
    number = _value(tokens, {})
    if number is None or not _UNIT.fullmatch(text, end):
        return None
    return Quantity(number, _unit(text[end:]), places)


def _arithmetic(text):
    """Digits without separators, mixed numbers as sums, every bracket round."""
    text = _THOUSANDS.sub(lambda number: re.sub(r"[,\s]", "", number[0]), text)
    text = _MIXED.sub(lambda mixed: "({}+{}/{})".format(*filter(None, mixed.groups())), text)
    return text.translate(str.maketrans("{}[]", "()()"))


def _tokens(text, *patterns):
    """The longest run of tokens that a text begins with, and its end."""
    tokens, end = [], 0
    while token := next(filter(None, (pattern.match(text, end) for pattern in patterns)), None):
        tokens.append(token[1])
        end = token.end()
    return tokens, end


def _value(tokens, variables):
    """A formula's value, or None: off the grammar, cut short, a division by zero, 9^9^9, no finite float."""
    try:
        tokens = list(tokens)
        number = _evaluate(tokens, variables)
        return number if not tokens and math.isfinite(number) else None
    except (ValueError, LookupError, ArithmeticError):
        return None


_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, ":": 2, "^": 3}


def _evaluate(tokens, variables, floor=0):
    r"""Precedence climbing over + - * / : ^, brackets, \frac, \sqrt, pi and implied products; consumes `tokens`.

    Stops before an operator that binds no tighter than `floor`; 9 reads one operand. Errors: see the caller.
    """
    token = tokens.pop(0)
    if token in ("+", "-"):
        value = _evaluate(tokens, variables, 2) * (-1 if token == "-" else 1)
    elif token == "(":
        value = _evaluate(tokens, variables)
        if tokens.pop(0) != ")":
            raise ValueError("unbalanced brackets")
    elif token == "\\frac":
        value = _evaluate(tokens, variables, 9) / _evaluate(tokens, variables, 9)
    elif token == "\\root":
        index = _evaluate(tokens, variables, 9)
        value = math.pow(_evaluate(tokens, variables, 9), 1 / index)
    elif token.endswith("sqrt"):
        value = _root(_evaluate(tokens, variables, 9))
    elif token in variables:
        value = variables[token]
    else:
        value = math.pi if token == "pi" else Fraction(token)
    while tokens and tokens[0] != ")":
        operator = tokens[0] if tokens[0] in _BINDING else "*"
        if _BINDING[operator] <= floor:
            break
        if tokens[0] in _BINDING:
            tokens.pop(0)
        elif tokens[0][0] in ".0123456789":
            raise ValueError("two numbers in a row are no product")
        right = _evaluate(tokens, variables, 2 if operator == "^" else _BINDING[operator])  # powers group to the right
        if operator in "+-":
            value += right if operator == "+" else -right
        elif operator == "^":
            value = _power(value, right)
        else:
            value = value * right if operator == "*" else value / right
    return value


def _power(base, exponent):
    """Exact where it stays small."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) < 20_000:
            return base ** int(exponent)
    return math.pow(base, exponent)


def _root(value):
    """The square root, exact where it is rational."""
    if isinstance(value, Fraction) and value >= 0:
        root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
        if root * root == value:
            return root
    return math.sqrt(value)


def _formula(text):
    """The tokens and the variables of a formula in letters, else (None, None). No words, chains A-B-C, or 1/2x."""
    text = _arithmetic(text)
    tokens, end = _tokens(text, _TOKEN, _VARIABLE)
    words = re.search(r"(?<!\\)\b[^\W\d_]{3,}|\\(?:sin|cos|tan|log|ln)", text.replace("sqrt", " ").replace("frac", ""))
    if len(text) > MAX_FORMULA or end < len(text) or words or re.search(r"[':]|/\s*\d+[^\W\d_(]", text):
        return None, None
    chain = re.fullmatch(r"[A-Z](?:\s?[-/*]?\s?[A-Z])*", text)
    names = {token for token in tokens if _VARIABLE.fullmatch(token) and token != "pi"}
    return (tokens, names) if names and not chain else (None, None)


_POINTS = [[Fraction(sign * p, q) for p in (7, 19, 31, 47, 61, 83, 103, 131)] for sign, q in (
    (1, 5), (1, 11), (1, 13), (-1, 17), (1, 23), (-1, 29))]


def _values(a, b):
    """The values of two formulas in the same variables at the points where either has one; None if they are none."""
    (tokens, names), (others, other_names) = _formula(a), _formula(b)
    if not tokens or names != other_names or len(names) > 8:
        return None
    pairs = [[_value(formula, dict(zip(sorted(names), point))) for formula in (tokens, others)] for point in _POINTS]
    pairs = [pair for pair in pairs if pair != [None, None]]
    return pairs if len(pairs) > 1 and not any(None in pair for pair in pairs) else None


def _close(x, y):
    return x == y if isinstance(x, Fraction) and isinstance(y, Fraction) else math.isclose(x, y, rel_tol=1e-9)


def _same_formula(a, b):
    r"""Whether two formulas have the same values: x/2 and \frac{x}{2}. "AB" and "BA" are names, so they need an operator."""
    pairs = _values(a, b) if re.search(r"[-+*/^\\]", a + b) or (a[:1].isdigit() and b[:1].isdigit()) else None
    return pairs is not None and all(_close(*pair) for pair in pairs)


def _same_difference(sides, others, any_sign):
    """Whether the sides of two equations differ by the same, but for a factor: of sign +, and in one variable of size 1."""
    pairs = _values(*("({})-({})".format(*side) for side in (sides, others)))
    if not pairs or not all(x and y for x, y in pairs):
        return False
    ratio = pairs[0][1] / pairs[0][0]
    several = len(_formula("({})-({})".format(*sides))[1]) > 1
    return ((any_sign or ratio > 0) and (several or _close(abs(ratio), Fraction(1)))
            and all(_close(x * ratio, y) for x, y in pairs))


def _scaled(quantity):
    """"1.5 million cars" as 1500000 cars, which is then exact; None where there is no such word."""
    for word, scale in _SCALES.items():
        if re.match(rf"{word}(?!th)", quantity.unit, re.IGNORECASE):
            return Quantity(quantity.number * scale, quantity.unit[len(word):], 0)
    return None


def _same_quantity(a, b):
    scaled = _scaled(a), _scaled(b)
    if any(scaled) and _same_quantity(scaled[0] or a, scaled[1] or b):
        return True
    if a.unit and b.unit and not _same_letters(a.unit, b.unit):
        return False
    if b.unit == "%" and not a.unit:
        a, b = b, a
    for factor in (1, 100) if a.unit == "%" and not b.unit else (1,):
        x, y = a.number, b.number * factor
        integers = x == int(x) and y == int(y)
        if x == y or (not integers and abs(x - y) <= Fraction(1, 10**6) * max(abs(x), abs(y))):  # relative alone: 1e-30
            return True
        halves = [Fraction(1, 2 * 10**a.places) if a.places else 0, Fraction(factor, 2 * 10**b.places) if b.places else 0]
        if abs(x - y) <= max(halves) * (1 + 1e-9):
            return True
    return False

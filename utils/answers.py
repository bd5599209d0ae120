r"""Whether two answers are the same: numbers with units, names, lists, sets, intervals, formulas, words.

    same_answer("1/2", r"\frac{1}{2}")        # True
    quantity("50 cm")                         # Quantity(number=Fraction(50, 1), unit="cm", places=0)

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

Numbers are exact but for roots and pi. Formulas are compared by their values at rational points. No `eval`,
no exception. Texts are short here (judge.MAX_ANSWER), and formulas shorter (MAX_FORMULA).
"""
import math
import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import NamedTuple

MAX_FORMULA = 100      # characters of a formula, which bounds its nesting too
MAX_SET = 20           # items of a list whose order does not count
CLOSE = Fraction(1, 10**6)  # relative, never absolute: all of physics is below 1e-12

# ---- Plain text: one spelling of LaTeX and Unicode

_CHARACTERS = str.maketrans("−–—⁄÷×·‘’′“”⩽⩾", "---//**'''\"\"≤≥") | {
    ord(sign): command for sign, command in zip("√π∞∠△", (r"\sqrt", r"\pi", r"\infty", r"\angle ", r"\triangle "))}
_COMMANDS = dict(pair.split(":") for pair in (
    r"times:* cdot:* div:/ dfrac:\frac tfrac:\frac cfrac:\frac pm:± approx:≈ simeq:≈ infty:infinity "
    r"leq:≤ le:≤ leqslant:≤ geq:≥ ge:≥ geqslant:≥ lt:< gt:> neq:≠ ne:≠ in:∈ cup:∪ varnothing:∅ emptyset:∅ "
    r"langle:( rangle:) Omega:Ω ohm:Ω mu:μ degree:° degrees:° lbrace:\{ rbrace:\}").split())
_COMMANDS |= {"pi": " pi ", "quad": " ", "qquad": " "}
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\\(begin|end)\{[bp]matrix\}", r"\\\1{matrix}"),
    (r"\\\\(?![a-zA-Z])", ";"),  # the rows of a matrix
    (r"\\(sin|cos|tan|log|ln|exp)\s*\((\w+)\)", r"\\\1 \2"),                               # \ln(2)
    (r"^\\\{\s*\\\}$", r"\\emptyset"), (r"\\overline\s*\{([A-Z]{2,9})\}", r"\1"),
    (r"\\mathbb\s*\{?R\}?(?!\s*[\^_+\w])|^all real numbers$", "(-infinity, infinity)"),
    (r"\*\*|`|\\(?:(?:left|right)\.?|[bB]igg?[lr]?|displaystyle|boxed|textdollar)(?![a-zA-Z])|\\[()\[\]!]", ""),
    (r"\\?[$€£¥₹]|\\(?=%)", ""),
    (r"\\(?:text|math|operatorname|mbox|hbox|boldsymbol)\w*\s*\{([^{}]*)\}", r" \1"),    # \mbox{red}
    (r"(?<=\d)(?:st|nd|rd|th)\b|(?<=\d)\s?\^\s?\{?\s?(?:st|nd|rd|th)\b\s?\}?", ""),           # 5^{th}
    (r"\\(?:text|math)[a-z]+|\\[\s,;:]|~", " "),                                         # 54\,321
    (r"\{,\}", ","),                                                                     # 54{,}321
    (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    (rf"\\({'|'.join(_COMMANDS)})(?![a-zA-Z])", lambda command: _COMMANDS[command[1]]),
    (r"<=|=<", "≤"), (r">=", "≥"), (r"!=", "≠"), (r"(?<![\w)])\+(?=infinity)", ""),
    (r"(?<=\d)\s*x\s*(?=10\s*\^)", "*"),                                                 # 2x10^3
    (r"\\sqrt\s*\[(\w)\]", r"\\root{\1}"),                                               # \sqrt[3]{8}
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),                                        # \frac12
    (r"^\s*(?:(?:about|approximately|around|roughly)\s|≈|\\sim\b)\s*"                        # about 5
     r"|\s\((?:approx|roughly|rounded|to\s)[^()]*\)$", ""))]


@lru_cache(2**12)      # an answer meets every option, item by item
def plain(text):
    """A text in plain characters: dress of LaTeX is gone, and signs have one spelling each."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", r"^(\g<0>)", text.replace("º", "°"))
    text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text)).translate(_CHARACTERS)
    text = " ".join(text.split())  # no run of blanks for a pattern to backtrack over
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


# ---- The kinds

EQUALS = re.compile(r"\s*(?:[=≈]|∈(?=\s*\\?\{))\s*")  # x = 5, x ≈ 5, x ∈ {5}
LABEL = re.compile(  # a letter, its dress, and what follows: "(B)", "b.", "Option B: red circle"
    r"(?i:option|choice|answer|step|point|figure)?\s*[(\[{]*([A-Za-z])([)\]}.:,;]*(?:\s-)?)(?:\s(\S.*))?",
    re.DOTALL)
_FUNCTION = re.compile(r"\b([fghpq]|[A-Z]|[A-Za-z]{2,}\d?)'?\([^()]*\)")                  # f(-1), P(X > 2)
_RELATION = re.compile(r"\s*([<>≤≥≠∈])\s*")
_MIRRORED = str.maketrans("<>≤≥", "><≥≤")
_INTERVAL = re.compile(r"(?:([^∈,;]{1,40}?)\s?∈\s?)?([(\[\]])([^,;]*)[,;]([^,;]*)([)\]\[])")  # x ∈ ]0, 5[
_LIST_TOKEN = re.compile(r"[(\[{]|[)\]}]|\s*(?:(?:,\s*)?\b(?:and|(?P<either>or))\b|[,;])\s*")
_TIME = re.compile(r"0?(\d{1,2}):(\d\d)(?:\s?([ap])\.?m\.?)?")  # 3:45 against 1:15: where both fit, no ratios


def same_answer(a, b):
    """Whether two answers are the same, as in the table above. Symmetric."""
    if a == b:
        return True
    a, b = _unnamed(plain(a), plain(b))
    same = _same_region(a, b)
    return _same_item(a, b) or _same_list(a, b) if same is None else same


def _unnamed(a, b):
    """The values of "x = 5" and "5", or of two equations of one name; the names, where they differ."""
    (name, value), (other, other_value) = _named_value(a), _named_value(b)
    if name and other:
        return (value, other_value) if _same_letters(name, other) else (name, other)
    equations = EQUALS.search(a) and EQUALS.search(b) and not has_names(a) and not has_names(b)
    return (a, b) if equations else (value, other_value)


def _named_value(text):
    """("x", "5") of "x = 5" and "5 = x"; (None, text) where no side is a name: "4x + y = 5"."""
    sides = EQUALS.split(text)
    if len(sides) == 1 or has_names(text):
        return None, text
    if is_name(sides[0]):
        return sides[0], EQUALS.split(text, maxsplit=1)[1]
    return (sides[1], sides[0]) if len(sides) == 2 and is_name(sides[1]) else (None, text)


def is_name(side):
    r"""Whether a side of an equation is a name: x_1, AB, \angle ABC, f(2), (u, v), total area; not 2x, xy."""
    side = _FUNCTION.sub(r"\1", side.replace("{", "").replace("}", ""))
    name = re.fullmatch(r"[(|]?[^\W\d][^-+*/^=<>≤≥≠±!]{0,39}|\\(?!frac|sqrt|root|int|sum)[a-z]+[\w\s]{0,20}",
                        side)
    return name is not None and not re.fullmatch(r"[a-z]{2}|.*\W\d.*", side)


def has_names(text):
    """Whether a text is a list with a name before each value: "x = 3, y = 4"."""
    items, _ = _items(text)
    return len(items) > 1 and all(map(EQUALS.search, items))


def _terms(text):
    """The sides and signs of an inequality, its smallest side first: ["0", "≤", "x", "<", "5"]."""
    terms = _RELATION.split(text)
    return [term.translate(_MIRRORED) for term in terms[::-1]] if terms[1:2] in ([">"], ["≥"]) else terms


def _same_region(a, b):
    """For intervals and inequalities, whether they are the same; None where both sides are neither."""
    either = (re.sub(r"^(\w+)\s?≠\s?([^≠]+)$", r"\1 < \2 or \1 > \2", side) for side in (a, b))
    unions = [[_interval(piece) for piece in re.split(r"\s*(?:∪|\bor\b)\s*", side)] for side in either]
    if all(map(all, unions)):
        return _same_items(*unions, _same_interval, any_order=True)
    if not _RELATION.search(a + b):
        return None
    (sides, signs), (others, other_signs) = ((terms[::2], terms[1::2]) for terms in map(_terms, (a, b)))
    return signs == other_signs and (
        all(map(_same_item, sides, others))
        or len(signs) == 1 and _same_difference(sides, others, either_sign=signs == ["≠"]))


def _interval(text):
    """(name or None, low end, closed?, high end, closed?) of "[0, 5)", "0 ≤ x < 5" or "x ≥ 0", else None."""
    if match := _INTERVAL.fullmatch(text):
        name, left, low, high, right = match.groups()
        return name, low.strip(), left == "[", high.strip(), right == "]"
    terms = _terms(text)
    if len(terms) == 3 and is_name(terms[0]) != is_name(terms[2]):
        terms = ["-infinity", "<", *terms] if is_name(terms[0]) else [*terms, "<", "infinity"]
    if len(terms) != 5 or not is_name(terms[2]) or not {*terms[1::2]} <= {"<", "≤"}:
        return None
    return terms[2], terms[0], terms[1] == "≤", terms[4], terms[3] == "≤"


def _same_interval(a, b):
    """The same names where both have one, the same ends, and the same ends closed."""
    return ((a[0] == b[0] or None in (a[0], b[0])) and a[2::2] == b[2::2]
            and all(x == y or _same_item(x, y) for x, y in zip(a[1::2], b[1::2])))


def _items(text):
    """(items, bracket) of "[1, 2]", "1 and 2", or "1 or 2", whose bracket is a set's; else one item."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    tokens, depths, depth = list(_LIST_TOKEN.finditer(text)), [], 0
    for token in tokens:
        depth += (token[0] in "([{") - (token[0] in ")]}")
        depths.append(depth)
    wrapped = text[:1] + text[-1:] in ("()", "[]", "{}") and 0 not in depths[:-1]
    cuts = [token for token, depth in zip(tokens, depths) if depth == wrapped and token[0] not in "([{)]}"]
    items = [text[start:end] for start, end in zip([int(wrapped)] + [cut.end() for cut in cuts],
                                                   [cut.start() for cut in cuts] + [len(text) - wrapped])]
    either = any(cut["either"] for cut in cuts) and all(re.search(r"\d", item) for item in items)
    return items, text[:1] if wrapped else "{" if either else ""


def _same_list(a, b, depth=0):
    """Whether two lists hold the same items: in any order {1, 2}, "1 or 2", "x = 1, y = 2", "x = 1, x = 2"."""
    (items, bracket), (others, other_bracket) = (_signs(*_items(side)) for side in (a, b))
    if len(items) != len(others) or len(items) == 1 or depth > 2:
        return False
    names = [[_named_value(item)[0] for item in side] for side in (items, others)]
    all_named = None not in names[0] + names[1]
    roots = any(None not in side and len(set(side)) == 1 for side in names)
    mixed = not all_named and any(len(set(side)) > 1 for side in names)  # x = 1, y = 2 and {1, 2}
    brackets = {bracket, other_bracket}
    unordered = not brackets & {"(", "["} and ("{" in brackets or all_named or roots) and not mixed
    return _same_items(items, others, lambda x, y: _same_item(x, y) or _same_list(x, y, depth + 1), unordered)


def _signs(items, bracket):
    """The two items of ±2, which are a set."""
    if len(items) > 1 or items[0].count("±") != 1:
        return items, bracket
    return [items[0].replace("±", sign) for sign in "+-"], "{"


def _same_items(items, others, same, any_order):
    """Whether items match one to one, in this order or in any. Symmetric if `same` is."""
    def matched(side, rest):
        rest = list(rest)
        for item in side:
            match = next((i for i, other in enumerate(rest) if same(item, other)), None)
            if match is None:
                return False
            rest.pop(match)
        return True

    if len(items) != len(others):
        return False
    if any_order and len(items) <= MAX_SET:
        return matched(items, others) or matched(others, items)
    return all(map(same, items, others))


def _same_item(a, b):
    """Whether two items of lists, or whole answers that are no lists, are the same."""
    a, b = _unnamed(a, b)
    times = [_TIME.fullmatch(side.lower()) for side in (a, b)]
    if all(times):
        return all(x == y or not (x and y) for x, y in zip(*(time.groups() for time in times)))
    if same_text(a, b):
        return True
    if 1 in (len(_canonical(a)), len(_canonical(b))) and bare_letter(a) and bare_letter(a) == bare_letter(b):
        return True
    quantities = quantity(a), quantity(b)
    if all(quantities):
        return _same_quantity(*quantities)
    sides, others = EQUALS.split(a), EQUALS.split(b)
    return _same_formula(a, b) or (len(sides) == len(others) == 2
                                   and _same_difference(sides, others, either_sign=True))


# ---- Words

def bare_letter(text):
    """The letter, upper case, that a text is or opens with, or None: "(B)", "b.", "B) red circle"."""
    match = LABEL.fullmatch(plain(text))
    dressed = (match and match[1].isupper() and re.match(r"[)\]}.:]", match[2])
               and not re.search(r"\b[A-Z]\)", match[3] or ""))
    return match[1].upper() if match and (dressed or not match[3]) else None


def _canonical(text):
    """What is compared of words: no article, double or outer quotes, end marks, brackets around one. The
    braces of a formula stay, for \\frac{1}{23} is not \\frac{12}{3}."""
    text = re.sub(r"^(?:the|an?)\s(?=\w\w)", "", plain(text), flags=re.IGNORECASE)
    text = re.sub(r"(?<=[_^a-zA-Z}])\s?\{(\w)\}(?!\w)", r"\1", text)
    braces = "" if re.search(r"[\\^_][^{}\\^_]*\{[^{}]", re.sub(r"\\(?=[{}])", "", text)) else "{}_"
    text = re.sub(rf"[{braces}\\\"]|(?<=[a-z]{{2}})!", "", text).strip(" .,;:?*")
    return re.sub(r"^(?:'(.*)'|[(\[]([^()\[\],;]*)[)\]])$", r"\1\2", text).strip()


def same_text(a, b):
    """The same words. Against a bare yes or no (or true or false), "yes, it does" is a yes; "yes, 3" is not
    "yes, 4"."""
    a, b = _canonical(a), _canonical(b)
    verdicts = [re.match(r"(yes|no|true|false)(?=$|\s?[.,;:!]|\s-)", side, re.IGNORECASE) for side in (a, b)]
    if all(verdicts) and (verdicts[0][0] == a or verdicts[1][0] == b):
        first, second = (verdict[0].lower().replace("true", "yes").replace("false", "no")
                         for verdict in verdicts)
        return first == second
    return a != "" and _same_letters(a, b)


def _same_letters(a, b):
    """Equal but for case, and for spaces except in "1 2". A word of one or two letters may differ in case
    only where one side is all lower case: "b" is B, but Aa is not AA, and mW is not MW."""
    first, second = (re.sub(r"(?<!\d)\s|\s(?!\d)", "", side).lower() for side in (a, b))
    words = zip(*(re.findall(r"[^\W\d_]+", side) for side in (a, b)))
    return first == second and not any(
        p != q and p.lower() == q.lower() and len(p) < 3 and not p.islower() and not q.islower()
        for p, q in words)


# ---- Numbers with their units

class Quantity(NamedTuple):
    number: Fraction | float  # as written: 50 for "50%"; exact but for roots and pi
    unit: str
    places: int  # decimals of a literal that may be a rounded value, else 0


_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
         "sixteen seventeen eighteen nineteen").split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_NUMBERS = dict(zip(_ONES + [f"{ten} {one}".removesuffix(" zero") for ten in _TENS for one in _ONES[:10]],
                    map(str, range(100))))
_FRACTIONS = {name: i + 2 for i, name in enumerate("half third fourth fifth sixth seventh eighth ninth tenth".split())}
_FRACTIONS["quarter"] = 4
# Words are matched in ASCII: "ı" is no "i".
NUMBER_WORD = re.compile(rf"\b(?:{'|'.join([*_NUMBERS][::-1])})\b".replace(" ", "[ -]"), re.IGNORECASE | re.ASCII)
_SAID_TWICE = re.compile(rf"\b({NUMBER_WORD.pattern}|\d+)\s\(({NUMBER_WORD.pattern}|\d+)\)",  # seven (7)
                         re.IGNORECASE | re.ASCII)
_FRACTION_WORD = re.compile(  # "one third of the cake"; "twenty third" is none, and "three quarters" may be coins
    rf"(?:half|an?[ -](?P<one>{'|'.join(_FRACTIONS)})"
    rf"|(?P<count>{'|'.join(_ONES[1:10])})[ -](?P<name>(?!quarter)(?:{'|'.join(_FRACTIONS)})))s?(?=$|\sof\b)",
    re.IGNORECASE | re.ASCII)
_HUNDRED = re.compile(r"\b(?:(?:(\d)|an?)\s)?hundred\b(?:\s(?:and\s)?(\d\d?)\b)?", re.IGNORECASE)  # 3 hundred and 5
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_EQUAL_PAIR = re.compile(r"(.+?)(?:\s\(|\s*[=≈]\s*)(?:or )?(.+?)\)?")  # 5 (five), 1/6 ≈ 0.17
_THOUSANDS = re.compile(  # 1,234, 1 234; not 1 200/300
    r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])|(?<![\d.,])[1-9]\d{0,2}(?:\s\d{3})+(?![\d,]|\s?/|\s\d)")
_MIXED = re.compile(r"(?<![\d.])(\d+)(?:\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}|\s+(\d+)\s*/\s*(\d+))")  # 2 1/2
_REPEATING = re.compile(r"(?<!\d)(\d*)\.(\d{0,9})\\(?:overline|bar|dot)\s*\{?(\d{1,9})\}?")  # 0.1\overline{6}
SEQUENCE = re.compile(r"\d+(?:\s*[-/:]\s*\d+){2,}|\d+\s*-\s*\d+")  # 5-4-3-2-1, a date, a range: no arithmetic
_UNIT = re.compile(  # a symbol, or a word after a space, and what follows it up to an exponent
    r"\s*|\s*(?:[%°'\"]|[^\x00-\x7f±]|(?:[pnμcdmkMGT]?(?:m|g|s|[lL]|A|V|W|N|J|F|Ω|Pa|Hz)|[KC]|in|ft|h|hr|min|sq|o'clock)\b"
    r"|(?<=\s)(?!(?:and|not|than|more|less|plus|minus|over)\b)[^\W\d_]{3,})[^\d\\]*(?:\^?\(?-?\d\)?)?")
_UNIT_NAMES = dict(pair.split(":") for pair in (
    "meter:m metre:m gram:g second:s sec:s liter:L litre:L amp:A ampere:A volt:V watt:W newton:N joule:J farad:F "
    "ohm:Ω hertz:Hz pascal:Pa inch:in inche:in foot:ft feet:ft hour:h hr:h minute:min celsius:C degree:° "
    "percent:% percentage:% pct:% unit: per:/ ':ft \":in").split())
_UNIT_NAMES |= {prefix + name: short + symbol for name, symbol in _UNIT_NAMES.items() for prefix, short in (
    ("kilo", "k"), ("centi", "c"), ("milli", "m"), ("micro", "μ"), ("mega", "M"))}


@lru_cache(2**12)
def quantity(text):
    """A number with or without a unit, else None."""
    if len(text) > MAX_FORMULA:
        return None
    text = said_once(plain(text).rstrip(" .,;:"))
    pair = _EQUAL_PAIR.fullmatch(text)
    if pair and pair[1] != pair[2]:  # not "5 (5)", which is 25
        first, second = quantity(pair[1]), quantity(pair[2])
        if first and second and _same_quantity(first, second):
            return first
    if fraction := _FRACTION_WORD.match(text):
        text = _fraction(fraction) + text[fraction.end():]
    text = _HUNDRED.sub(lambda word: str(100 * int(word[1] or 1) + int(word[2] or 0)), _in_digits(text))
    text = re.sub(r"(?<=\d) and a half\b", ".5", text)
    if re.search(r"/|%|frac", text):
        text = re.sub(r"\sof\s\D*$", "", text)  # "1/2 of the cake"; "one of them" is no 1
    text = _arithmetic(text)
    tokens, end = _tokens(text, _TOKEN)
    literal = re.fullmatch(r"-?\s*(\d*)\.(\d\d+)", text[:end].strip())
    places = len(literal[2]) if literal and len((literal[1] + literal[2]).lstrip("0")) >= 2 else 0
    number = None if SEQUENCE.fullmatch(text) else _value(tokens)
    if number is None or not _UNIT.fullmatch(text, end):
        return None
    return Quantity(number, _unit(text[end:]), places)


def _unit(text):
    """A unit in symbols: "square centimeters" is cm2, "feet per second" ft/s. Other words lose a plural s."""
    def symbol(word):
        singular = word[0].removesuffix("s") if len(word[0]) > 3 else word[0]
        return _UNIT_NAMES.get(word[0].lower(), _UNIT_NAMES.get(singular.lower(), singular))

    text = re.sub(r"\b(?:square|sq\.?|(cubic))\s(\w+)", lambda power: power[2] + "23"[bool(power[1])], text)
    text = re.sub(r"[\s^()*]", "", re.sub(r"[^\W\d_]+|['\"]", symbol, text))
    return text if text.strip("23") else ""


def _in_digits(text):
    return NUMBER_WORD.sub(lambda word: _NUMBERS[word[0].lower().replace("-", " ")], text)


def said_once(text):
    """A number that is said in words and in digits, once: "seven (7) cubes" is "7 cubes"; "six (7)" stays."""
    def digits(pair):
        same = pair[1] != pair[2] and _in_digits(pair[1]) == _in_digits(pair[2])
        return _in_digits(pair[1]) if same else pair[0]

    return _SAID_TWICE.sub(digits, text)


def _fraction(words):
    """"one third" as "1/3"."""
    name = words["one"] or words["name"] or "half"
    return f"{_NUMBERS[(words['count'] or 'one').lower()]}/{_FRACTIONS[name.lower()]}"


def _readings(number, unit, places):
    """What a quantity may mean, as (number, unit, tolerance): 50% is 50% and .5, 1.5 million also 1500000."""
    half = Fraction(1, 2 * 10**places) if places else 0
    yield number, unit, half
    if unit == "%":
        yield number / 100, "ratio", half / 100  # which equals a bare number, and no percentage
    for word, scale in _SCALES.items():
        if re.match(rf"{word}(?!th)", unit, re.IGNORECASE):
            yield Fraction(number) * scale, unit[len(word):], 0


def _same_quantity(a, b):
    """Whether two quantities have a reading in common. A unit counts only if both sides have one."""
    for (x, unit, half), (y, other_unit, other_half) in product(_readings(*a), _readings(*b)):
        x, y = Fraction(x), Fraction(y)
        close = 0 if x.denominator == y.denominator == 1 else CLOSE * max(abs(x), abs(y))
        tolerance = max(close, half * (1 + CLOSE / 1000), other_half * (1 + CLOSE / 1000))
        if abs(x - y) <= tolerance and (not unit or not other_unit or _same_letters(unit, other_unit)):
            return True
    return False


# ---- Formulas

_TOKEN = re.compile(r"\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d))?|[-+*/:^()]|\\frac|\\root|\\?sqrt|pi\b)")
_VARIABLE = re.compile(  # x, x_1, x1, \theta
    r"\s*(\\(?:alpha|beta|gamma|delta|epsilon|theta|lambda|rho|sigma|tau|phi|omega)(?![a-z])"
    r"|[^\W\d_](?:_?\d+|_\(\w+\)|_\w)?)")
_NO_FORMULA = re.compile(  # a word or sin, a prime or a ratio, "1/2x", which is read in two ways
    r"(?<!\\)\b(?!sqrt)[^\W\d_]{3,}|\\(?:sin|cos|tan|log|ln)|[':]|/\s*\d+[^\W\d_(]")
_CHAIN = re.compile(r"[A-Z](?:\s?[-/*]?\s?[A-Z])*")  # AB, A-B-C: names of points, whose order counts
_POINTS = [[Fraction(sign * p, q + 2 * i) for i, p in enumerate((7, 19, 31, 47, 61, 83, 103, 131))]
           for sign, q in ((1, 5), (1, 11), (1, 23), (-1, 17), (1, 41), (-1, 29))]
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, ":": 2, "^": 3}


def _arithmetic(text):
    """Digits without separators, repeating decimals as fractions, mixed numbers as sums, every bracket round."""
    text = _REPEATING.sub(lambda number: "((0{0}{1}{2}-0{0}{1})/({3}-{4}))".format(
        *number.groups(), 10**len(number[2] + number[3]), 10**len(number[2])), text)
    text = _THOUSANDS.sub(lambda number: re.sub(r"[,\s]", "", number[0]), text)
    text = _MIXED.sub(lambda mixed: "({}+{}/{})".format(*filter(None, mixed.groups())), text)
    return text.translate(str.maketrans("{}[]", "()()"))


def _tokens(text, *patterns):
    """The tokens that a text begins with, and their end."""
    tokens, end = [], 0
    while token := next(filter(None, (pattern.match(text, end) for pattern in patterns)), None):
        tokens.append(token[1])
        end = token.end()
    return tokens, end


def _formula(text):
    """(tokens, names of the variables) of a formula in letters, else (None, None)."""
    text = _arithmetic(text)
    tokens, end = _tokens(text, _TOKEN, _VARIABLE)
    names = {token for token in tokens if _VARIABLE.fullmatch(token) and token != "pi"}
    sound = end == len(text) <= MAX_FORMULA and 0 < len(names) <= len(_POINTS[0])
    return (tokens, names) if sound and not _NO_FORMULA.search(text) and not _CHAIN.fullmatch(text) else (None, None)


def _values(a, b):
    """The pairs of values of two formulas in the same variables at the points, or None."""
    (tokens, names), (others, other_names) = _formula(a), _formula(b)
    if not tokens or names != other_names:
        return None
    points = [dict(zip(sorted(names), point)) for point in _POINTS]
    pairs = [(_value(tokens, point), _value(others, point)) for point in points]
    pairs = [pair for pair in pairs if pair != (None, None)]
    return pairs if len(pairs) > 1 and not any(None in pair for pair in pairs) else None


def _close(x, y):
    return x == y if isinstance(x, Fraction) and isinstance(y, Fraction) else math.isclose(x, y, rel_tol=1e-9)


def _same_formula(a, b):
    r"""Whether two formulas have the same values: x/2, \frac{x}{2}. AB and BA, without operator, are names."""
    operators = re.search(r"[-+*/^\\]", a + b) or (a[:1].isdigit() and b[:1].isdigit())
    pairs = _values(a, b) if operators else None
    return pairs is not None and all(_close(*pair) for pair in pairs)


def _same_difference(sides, others, either_sign):
    """Whether the differences of two pairs of sides have one ratio, which is 1 or -1 if there is one variable."""
    difference, other = ("({})-({})".format(*pair) for pair in (sides, others))
    pairs = _values(difference, other)
    if not pairs or not all(x and y for x, y in pairs):  # no point lies on either curve
        return False
    ratio = pairs[0][1] / pairs[0][0]
    several = len(_formula(difference)[1]) > 1
    return ((either_sign or ratio > 0) and (several or _close(abs(ratio), Fraction(1)))
            and all(_close(x * ratio, y) for x, y in pairs))


def _value(tokens, variables=None):
    """A formula's value, or None: off the grammar, cut short, a division by zero, 9^9^9, beyond a float."""
    tokens = list(tokens)
    try:
        number = _evaluate(tokens, variables or {})
        return number if not tokens and math.isfinite(number) else None
    except (ValueError, LookupError, ArithmeticError):
        return None


def _evaluate(tokens, variables, floor=0):
    r"""Precedence climbing over + - * / : ^, brackets, \frac, \sqrt, pi and implied products; consumes
    `tokens`.

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
        value = math.sqrt(_evaluate(tokens, variables, 9))
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
        right = _evaluate(tokens, variables, 2 if operator == "^" else _BINDING[operator])  # 2^3^2 = 2^9
        if operator in "+-":
            value += right if operator == "+" else -right
        elif operator == "^":
            value = _power(value, right)
        else:
            value = value * right if operator == "*" else value / right
    return value


def _power(base, exponent):
    """Exact for an integer exponent, as long as the result stays small."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) < 20_000:
            return base ** int(exponent)
    return math.pow(base, exponent)

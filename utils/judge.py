r"""The judge: what a response answers, and whether that is right. Rules, no model, no `eval`.

    is_correct(r"Three and four make \boxed{7}.", sample)     # True where sample.answer == "7"
    extract_answer("The answer is (B), since (A) is red.", ["red", "blue"])        # "B"
    equivalent("1/2", r"\frac{1}{2}")                         # True

| kind          | a response -> its answer                                               | read by         |
|---------------|------------------------------------------------------------------------|-----------------|
| box           | \boxed{4}, no: \boxed{6} -> 6; \boxed{4} and \boxed{6} -> 4 and 6      | _last_boxes     |
| marker        | The answer is 48, in total. -> 48; "answer": "B" -> B                  | _marked         |
| revision      | \boxed{4} ... The final answer is 6. -> 6; Answer: A ... so **D** -> D | _revision       |
| option        | B. green; (A) is too dark, hence (B); I take D - it is tall; its text  | _closing_option |
| last sentence | So 5 + 4 = 9. -> 9; We find that $x \neq 6$. -> x \neq 6               | _ending         |
| one number    | She took 7 cubes out of the box. -> 7                                  | _only_number    |
| none          | not B; A or B; because (A) ...; all the options again; Is it 7?        |                 |

Which answers are the same: the table in answers.py. With options, B = (B) = b. = the option's text or value.
A response of any length is read in linear time, and no text raises. Left out on purpose: a model as the judge.
The package math-verify changes no verdict unless `use_math_verify` switches it on.
"""
import re
from functools import lru_cache

from utils.answers import EQUALS, LABEL, NUMBER_WORD, SEQUENCE, bare_letter, has_names, is_name, plain

from utils.answers import quantity, said_once, same_answer, same_text  # isort: skip

MAX_RESPONSE = 50_000  # characters of a response that are read: its first fifth, and its end
MAX_ANSWER = 1000      # characters of an answer; longer ones are compared as they stand
MATH_VERIFY = None     # or the package's version, if `use_math_verify` switched it on: store it with the verdicts

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
    r"(?:[\s*]{0,4}(?:\bis\b|\bare\b|\b(?:must|should|would) be\b|[:：=>])|(?P<json>[\"'])\s?:)"
    r"(?:[:：\s*$]|\\[\[(]){0,9}"
    r"|(?:^|\n)[^\w\n]{0,6}(?:final )?answer[\s*]{0,4}(?=\\[\[(]|\$)(?:[\s$]|\\[\[(]){1,9}"
    r"|(?:答案(?:应?(?:[为选]|是(?!否))|(?=[:：]))"
    r"|(?<!\w)(?:所以|因此|故|我|应)?选(?=\s?[(（]?[A-Z](?!\w)))[:：\s*$]{0,9}", re.IGNORECASE)
_WOULD_BE = re.compile(r"\bwould be\W{0,9}$", re.IGNORECASE)          # "the answer would be: "
_SUPPOSED = re.compile(r"\b(?:if|whether|suppose)\b", re.IGNORECASE)  # "if we ignored one, the answer is"
_CONCLUDED = re.compile(r"\W*(?:so|thus|hence|therefore|then)\b(?!.*\bif\b)", re.IGNORECASE)  # "So the answer would be"
_JSON_VALUE = re.compile(r"\"((?:[^\"\\]|\\.)*)\"|'([^']*)'|(\[[^\]]*\]|[^,}\n]*)", re.DOTALL)  # "B", 'B', [1, 2], 7
_BOXES_JOINED = re.compile(  # between two boxes: "and", ", or", "and the area is", ", y ="
    r"(?:,|;|&|and\b|(?P<either>,?\s?or\b))\s?(?:and\b|or\b)?\s?(?:(?:\w+ ){0,3}\w+ ?(?:=|\bis\b|\bare\b))?",
    re.IGNORECASE)
_CLOSING_BOLD = re.compile(r"(?P<line>[^\n]*)\*\*\W?(?P<bold>[^*\n]{1,80})\*\*[\s.]*$")  # "so\n**D**"
_SECOND_THOUGHT = re.compile(r"\b(?:no,|wait\b|actually\b|correction\b|on second thoughts?\b)", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=[\s*]|$)|[。！？\n]|</")  # "It is B." and "<answer>B</answer>", not "3.5"
_CLAUSE_END = re.compile(  # "8, not 6", "B; A is wrong"; the joining word opens a clause, but "since (A) is red," goes
    r";|^\W*not\s[^,;]{1,40}?,?\sbut\s(?:rather\s)?|^\W*(?:because|since|as|although|while)\s[^,;]*,\s"
    r"|,\s(?=(?:as|which|while|but|however|in|exactly|respectively)\b)|(?:,\s|\()(?=not\s)"
    r"|\((?=(?:because|since|as|confidence)\b)|[,，]\s?(?=而?不是|因为)"
    r"|,?\s(?=(?:because|since|although|whereas|rather than|instead of|and not|so|hence|thus|therefore)\b)",
    re.IGNORECASE)
_ASIDE = re.compile(  # "because A is too dark", "in total"
    r"\W*(?:(?:because|since|confidence|although|whereas|rather|instead|and not|not|as|while|in (?:total|all)|exactly"
    r"|respectively)\b|而?不是|因为)", re.IGNORECASE)
_NEGATED = re.compile(r"\b(?:not|neither|nor|never|cannot)\b|n['’]t\b", re.IGNORECASE)  # "We do not see 5"
_REJECTED = re.compile(  # "B is wrong"
    _NEGATED.pattern + r"|\b(?:except|wrong|incorrect|false|eliminated?|excluded?|ruled? out)\b|[不错]", re.IGNORECASE)
_DOUBTED = re.compile(  # "more than 7 cubes", "it might be 7"
    _REJECTED.pattern + r"|\b(?:if|would|could|might|may|suppose|assum\w+|either|or|than|least|most|each|every|per)\b",
    re.IGNORECASE)

# ---- Patterns of a last sentence: the value that it arrives at

_VALUE_STARTS = re.compile(  # "The sum is 7", "5 + 4 = 9", but not "7 is the answer"
    r"\s(?:is|are|be|was|were|equals)\s(?!the (?:\w+ )?answer$)|(?<![<>!])[=≈](?!=)|:\s")
_TRAILING_NUMBER = re.compile(  # "7 red circles"
    r"-?[$€£]?\d[\d,.]*(?:\s?[/:]\s?\d+)?\s?[%°]?(?:\s[^\W\d]+){0,4}$")
_SUBJECT_NUMBER = re.compile(  # "42 is the sum"
    r"\W{0,9}(?:(?:so|thus|hence|therefore),?\s)?[*$]{0,3}(-?[$€£]?\d[\d,.]*(?:/\d+)?\s?[%°]?)[*$]{0,3}"
    r"\s(?:is|are)\sthe\s", re.IGNORECASE)
_COUNTED = re.compile(  # a verb before the one number: "took 7 cubes out of ...", but not "of 7", "figure 7"
    r"\b(?:is|are|was|were|has|have|had|took|takes?|taken|removed?|removes|used?|uses|counted|count|needed|needs?"
    r"|sees?|saw|found|gets?|got|makes?|made|gives?|leaves?|left|contains?|shows?|bought|sold|ate)"
    r"\s(?:exactly\s|only\s|a total of\s)?[*$]{0,3}(-?\d[\d,.]*\s?[%°]?)[*$]{0,3}(?=\s[a-z])", re.IGNORECASE)
_STATED = re.compile(  # what comes before a value that a sentence arrives at: "36 minus 12 gives **"
    r"(?:\b(?:is|are|was|were|be|equals?|gives?|yields?|makes?|leaves?|gets?|have)|[=≈])[\s*$]*$", re.IGNORECASE)
_STATEMENT_STARTS = re.compile(  # "We find that $x \neq 3$"
    r"\b(?:is|are|be|that|so|thus|hence|therefore|get|have|means|find|obtain|then)\b[,:]?\s|:\s", re.IGNORECASE)


def extract_answer(text, choices=None):
    r"""The final answer of a response, or None. With `choices`, the option's letter where one is recognised.

    In order: the last non-empty balanced `\boxed{}` (or else `\fbox{}`), or several that one sentence joins;
    what follows the last "answer is", `"answer":` or "答案是" (an "answer would be" gives way to an earlier one);
    with choices, the option that the response opens or closes with, the last letter named, the last option
    quoted, the value that the last sentence arrives at; without, an opening "Yes," or "No,", or what the last
    sentence ends in: a formula, a number, at most four words, or its only number. A closing "answer is 7" or
    "**D**", or a second thought, revises what comes before. No answer is what is denied ("not B"), left open
    ("A or B"), only argued with ("because (A) ..."), or an echo of all the options.
    """
    if not isinstance(text, str):
        return None
    choices, text = _texts(choices), _response(text)
    boxed, end = _last_boxes(text)
    if boxed:
        answer = _letter(_option(boxed, choices)) if choices else boxed
        return (answer and _revision(text[end:], choices, boxed=True)) or answer or boxed
    answer, end = _marked(text, choices)
    if answer:
        return _revision(text[end:], choices) or answer
    if choices:
        return _revision(text, choices) or _letter(_closing_option(text, choices))
    verdict = re.match(r"\s*(yes|no|true|false)\s*[,.;\n]", text, re.IGNORECASE)
    if verdict:
        return verdict[1]
    sentence = re.split(r"[.!?]\s+|\n", text[-MAX_ANSWER:].rstrip(" .!?*$`\n"))[-1]
    answer = None if _asks(text) else _ending(sentence) or _only_number(sentence)
    return answer and re.sub(r"^[A-J]\.(?=\d)", "", answer)  # "C.162 °": an option's letter, glued on


def _texts(choices):
    """The options' texts, at most 26. MMStar has "nan" for an option that a question lacks."""
    choices = [str(choice).strip() for choice in choices or ()][:26]
    while choices and choices[-1] == "nan":
        choices.pop()
    return ["" if choice == "nan" else choice for choice in choices]


def _response(text):
    """The first turn, without "I hope it is correct" at its end. Of a very long one, beginning and end."""
    roles = ("", "assistant", "user", "model")
    text = text.replace("<|begin_of_box|>", r"\boxed{").replace("<|end_of_box|>", "}")  # GLM-4.1V
    text = next((turn for turn in _CHAT_TOKEN.split(text) if turn.strip() not in roles), "").rstrip()
    if len(text) > MAX_RESPONSE:
        text = text[:MAX_RESPONSE // 5] + "\n" + text[-MAX_RESPONSE * 4 // 5:]
    return text[:-300] + _FAREWELL.sub("", text[-300:])


def boxes(text):
    r"""(start, slice of the content) of each balanced `\boxed{...}`, an outer box after its inner ones."""
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
    r"""The last box's content, or a list of those that one sentence joins ("4 and 6"); and where it ends."""
    text = text if boxes(text) else text.replace(r"\fbox", r"\boxed")
    filled = [(start, content) for start, content in boxes(text) if text[content].strip()]
    if not filled:
        return None, 0
    contents, end = [text[filled[-1][1]].strip()], filled[-1][1].stop
    for (start, _), (_, before) in zip(filled[:0:-1][:9], filled[-2::-1]):
        between = text[before.stop + 1:start]  # empty for an outer box
        joint = _BOXES_JOINED.fullmatch(plain(between[:80]))
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
            answer = (_clauses(clause) or [clause])[0].strip(" *")
            if len(answer.split()) > 4:
                answer = _ending(answer) or _only_number(answer) or answer
            if marker is not markers[-1] and not quantity(answer):  # "the answer is found so: ... would be 7"
                continue
        if answer:
            return answer, marker.end() + len(clause)
    return None, 0


def _settled(text, markers):
    """The last "answer is" before a closing "if we ..., the answer would be": a list of one marker, or none."""
    if not markers or not _WOULD_BE.search(markers[-1][0]):
        return []
    end = markers[-1].end()
    if _CONCLUDED.match(_before(text, markers[-1]) + _SENTENCE_END.split(text[end:end + 200], maxsplit=1)[0]):
        return []
    return [marker for marker in reversed(markers) if _states(text, marker)][:1]


def _before(text, marker):
    """What a marker's sentence begins with."""
    return _SENTENCE_END.split(text[max(0, marker.start() - 200):marker.start()])[-1]


def _states(text, marker):
    """Whether a marker states an answer, and does not suppose one."""
    return not _WOULD_BE.search(marker[0]) and not _SUPPOSED.search(_before(text, marker))


def _revision(rest, choices, boxed=False):
    r"""What the text behind an answer puts in its place: "**D**", "No, it is C", after a box "answer is 7"."""
    closing = _CLOSING_BOLD.search(rest[-MAX_ANSWER:])
    if closing and not _REJECTED.search(closing["line"]):
        option = _labelled(closing["bold"], choices) if choices else None
        if option is not None:
            return _letter(option)
        if not choices and not closing["line"].strip() and quantity(closing["bold"]):
            return closing["bold"].strip()
    markers = list(_MARKER.finditer(rest)) if boxed else []
    if markers and _states(rest, markers[-1]):
        answer, _ = _marked(rest, choices)
        rough = re.match(r"about|approx|around|roughly|≈|\\approx", answer or "", re.IGNORECASE)
        if answer and (len(answer) == 1 if choices else quantity(answer) and len(answer) < 40 and not rough):
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


def _clauses(sentence):
    """The clauses of a sentence that may state its answer: no reason, nothing that it is set against."""
    return [clause for clause in _CLAUSE_END.split(sentence) if clause.strip() and not _ASIDE.match(clause)]


def _ending(sentence):
    """The formula, the number, or the at most four words that a sentence leads up to, and does not deny."""
    clause = (_clauses(sentence) or [""])[-1]
    clause = re.sub(r",?\sI (?:believe|think|guess|suppose)\W*$", "", clause)
    clause = re.sub(r"[\s$]+is (?:the|our|my) (?:answer|solution)\W*$", "", clause)
    if statement := _statement(clause):
        return statement
    *others, value = _VALUE_STARTS.split(clause)
    subject = _SUBJECT_NUMBER.match(clause)
    if subject and len(others) == 1 and not _DOUBTED.search(clause):
        return subject[1].strip()
    value = re.sub(r"\W* (?:is|are) the (?:\w+ )?answer$", "", value.strip(" *$`,"))
    if _NEGATED.search(value):
        return None
    number = _TRAILING_NUMBER.search(value)
    counted = number and re.match(r"\D*[\s*$]$", value[:number.start()])  # "I count 7 circles"
    bounded = number and re.search(r"\b(?:than|least|most)\s$", value[:number.start()])  # "at least 12"
    wordy = (len(value.split()) > 4 or counted) and not bounded
    if value and (quantity(value) or not wordy):
        return value
    return number[0] if number else None


def _statement(clause):
    r"""The formula that a sentence ends in: "x \neq 3", "5 = 2a + b", a span in $. Not "x = 5", which is 5."""
    clause = re.sub(r"(=[^$]*)\$\s*(,?\s*(?:and|or)|,)\s*\$(?=[^$]*=)", r"\1 \2 ", clause)  # $a=2$ and $b=3$
    spans = re.split(r"\$+|\\[()\[\]]", clause.strip(" *`,."))
    in_span = len(spans) % 2 == 0 or (len(spans) > 1 and not spans[-1])
    formula = ((spans[-1] or spans[-2]) if in_span else _STATEMENT_STARTS.split(clause)[-1]).strip(" *$`,.")
    text = plain(formula)
    if in_span and re.search(r"\\(?:text|mbox)", formula) and "=" not in text:
        return formula
    if re.search(r"(?<![\\a-zA-Z])(?!infinity|sqrt|and\b)[a-zA-Z]{3,}", text) or not re.search(r"\w", text):
        return None
    sides = EQUALS.split(text)
    if len(sides) == 1:
        return formula if in_span or re.search(r"[<>≤≥≠∈±∪]", text) else None
    named = any(map(is_name, sides)) and formula != clause.strip(" *$`,.") and not re.search("[±∈]", text)
    free = len(sides) == 2 and not named and re.search("[a-zA-Z]", text)
    return formula if has_names(text) or free else None


def _only_number(sentence):
    """The only number of a sentence that neither denies nor doubts it: "She took 7 cubes out of the box"."""
    sentence = said_once(sentence)
    numbers = re.findall(r"\d+(?:[.,:]\d+)*", sentence) + NUMBER_WORD.findall(sentence)
    if len(numbers) != 1 or _DOUBTED.search(sentence):
        return None
    counted = _COUNTED.search(" ".join(_clauses(sentence)))
    return counted and counted[1].strip()


def equivalent(a, b, choices=None):
    """Whether two answers are the same. Symmetric; never raises, never evaluates code; None equals nothing.

    With `choices`, a letter in any dress and an option's text both name the option. Two letters are the same
    only where the two options are one text. Text: spaces, articles, LaTeX dress and, in words of three letters
    or more, case are ignored. Numbers: relative tolerance 1e-6, integers exactly. A decimal with two places and
    two significant digits, or more, also equals what rounds to it (0.333 and 1/3). A unit counts only if both
    sides have one. A percentage against a bare number is read as written or as a ratio (50% equals 50 and 0.5).
    "1.5 million" equals 1.5 and 1500000. More: the table in answers.py.
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
    """R_out: does the response `text` answer `sample` correctly (a data.Sample: .id, .answer, .choices, .meta)?

    Unanswered: False. sample.answer: with choices the option's letter, else a value; a list or tuple means any of it. As in
    MathVista's judge, meta["answer_type"] == "float" rounds both sides to meta["precision"] decimals. Raises
    ValueError if the sample has no gold answer.
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
            value, target = quantity(str(answer)), quantity(str(gold))
            if value and target and round(float(value.number), places) == round(float(target.number), places):
                return True
    return False


def _decimals(precision):
    """A meta["precision"] as a number of decimals; None for what is no number from 0 to 15."""
    try:
        return int(float(precision)) if 0 <= float(precision) <= 15 else None
    except (TypeError, ValueError, OverflowError):
        return None


# ---- Options

_QUOTED = "\ue000"  # stands before the letter of an option whose text was here
_ARTICLE_OR_PRONOUN = r"(?!(?<=[AI])\s(?!is\b)[a-z])"  # after a letter: "A dog", "I am sure"


def _letter(option):
    return None if option is None else chr(ord("A") + option)


def _labelled(text, choices):
    """Index of the option that a text is by its letter, alone or before the option's text; or None."""
    match = LABEL.fullmatch(re.sub(r"^(\W*[A-Z]\.)(?=[^\W\d])", r"\1 ", plain(text).strip(" *#$\"")))  # "B.red"
    option = ord(match[1].upper()) - ord("A") if match else len(choices)
    named = option < len(choices) and (not match[3] or same_text(match[3], choices[option]))
    return option if named else None


def _is_option(text, choices):
    """Index of the option that a text is, by its very text, its letter or its value; or None."""
    text = text.strip()
    if not text or len(text) > MAX_ANSWER:
        return None
    if text in choices and not re.fullmatch("[A-Z]", text):  # even where that text is "(b)"
        return choices.index(text)
    labelled = _labelled(text, choices)
    if labelled is not None:
        return labelled
    for same in (lambda x, y: plain(x) == plain(y), same_text, _same):
        matches = [i for i, choice in enumerate(choices) if choice and same(text, choice)]
        if matches:
            return matches[0] if len({choices[i] for i in matches}) == 1 else None
    return None


def _option(answer, choices):
    """Index of the option that a short answer is, or that its first words, else later ones, name; or None."""
    option = _is_option(answer, choices)
    if option is not None or len(answer) > MAX_ANSWER:
        return option
    letter = f"[A-{_letter(len(choices) - 1)}]"
    opening = re.match(rf"(?:\W|{_QUOTED}|(?:the|option|choice)\s)*({letter})(?![\w']|\s*=)(?!(?<=[AI])\s[a-z])"
                       rf"(?!\W*(?:[,/&、]|\b(?:and|or)\b)\W{{0,3}}{letter}\b)",
                       "".join(_claims(answer, choices)[:1]))
    return ord(opening[1]) - ord("A") if opening else _named([answer], choices)


def _closing_option(text, choices):
    """Index of the option that a response without box and marker decides for; or None."""
    echo = r"\W{1,6}".join(
        rf"\b{_letter(i)}\W{{1,4}}{re.escape(choice)}" for i, choice in enumerate(choices) if choice)
    text = re.sub(echo, "\n", text).strip() if len(choices) > 1 else text.strip()
    sentences = [line for line in _SENTENCE_END.split(text[-MAX_ANSWER:]) if re.search(r"\w", line)]
    opening = _labelled(_SENTENCE_END.split(text[:MAX_ANSWER], maxsplit=1)[0], choices)
    if opening is not None and {_labelled(line, choices) for line in sentences} <= {None, opening}:
        return opening
    option = _is_option(text, choices)
    if option is None and len(sentences) == 1 and bare_letter(text):  # "B) the green one"
        return _option(text, choices)
    if option is None:
        option = _named(sentences, choices)
    return _arrived_at(sentences[-1:], choices) if option is None and not _asks(text) else option


def _arrived_at(sentences, choices):
    """Index of the one option whose value a last sentence arrives at: "36 minus 12 gives 24"."""
    clause = "".join(sentences) and (_clauses(sentences[0]) or [""])[-1]
    value = _ending(clause)
    if not value or not quantity(value) or _DOUBTED.search(clause) or not _STATED.search(clause[:clause.rfind(value)]):
        return None
    return _is_option(value, choices)


def _claims(sentence, choices):
    """The clauses of a sentence that deny nothing; options' texts in them become a mark and their letter."""
    sentence = plain(re.sub(r"\s?—\s?|\s(?:–|--+)\s", " ; ", sentence))
    quotes = {plain(choice).strip(" ."): i for i, choice in enumerate(choices)}
    fold = re.IGNORECASE if len({quote.lower() for quote in quotes}) == len(quotes) else 0
    for quote in sorted(quotes, key=len, reverse=True):  # "Aa or AA" does not also quote "AA"
        if len(quote) > 1 or quote.isdigit():
            pattern = rf"(?<![\w./-]){re.escape(quote)}(?!\w|[.,/^]\d)"
            sentence = re.sub(pattern, _QUOTED + _letter(quotes[quote]), sentence, flags=fold)
    sentence = re.sub(r"\s;\s[a-z][^A-Z;]*$", "", sentence)  # "D - it is the tallest": an aside
    # "What is not blue is (B)": the end counts
    ends = [(clause, re.split(r"\s(?:is|are|was|were)\s", clause)[-1]) for clause in _clauses(sentence)]
    return [end if _REJECTED.search(clause) else clause for clause, end in ends if not _REJECTED.search(end)]


def _named(sentences, choices):
    """Index of the option that the last clause to name one names, a letter before a text; else None."""
    clauses = [clause for sentence in sentences for clause in _claims(sentence, choices)][::-1]
    letter = f"[A-{_letter(len(choices) - 1)}]"
    listed = rf"(?<!{_QUOTED})\b{letter}\b\W{{0,3}}(?:[,/&]|\b(?:and|to|(or))\b)\W{{0,3}}{letter}\b"
    letters = (rf"[(\[]({letter})[)\]]|\b(?i:option|choice|answer)\s\W?({letter})\b(?!(?<=I)\s[a-z])"
               rf"|\b({letter})(?=\s(?:is|was|must be)\s(?:the\s)?(?:\w+ly\s)?(?:correct|right|best|better|answer))")
    for i, clause in enumerate(clauses):
        several = re.search(listed, clause)
        if several and several[1]:  # "A or B" leaves it open
            return None
        last = rf"|(?:^|\s)({letter})\W*$" if i == 0 else ""  # earlier, "the point B." is a point
        if not several and (matches := re.findall(letters + last, clause)):
            return ord("".join(matches[-1])) - ord("A")
    for clause in clauses:
        for piece in (clause if re.search(r"\b(?:and|or)\b", clause) else _VALUE_STARTS.split(clause)[-1], clause):
            if quoted := set(re.findall(f"{_QUOTED}({letter})", piece)):
                return ord(quoted.pop()) - ord("A") if len(quoted) == 1 else None
    return None


# ---- Comparison, and the optional math-verify

@lru_cache(2**14)      # a vote table compares the same few answers again and again
def _same(a, b):
    """`equivalent` without options, on at most MAX_ANSWER characters."""
    if same_answer(a, b) or MATH_VERIFY is None or (quantity(a) and quantity(b)):
        return same_answer(a, b)
    return _math_verify(a, b)


def use_math_verify(on=True):
    """Let the package `math-verify` accept what these rules refuse (log_2 8 = 3), or not -> MATH_VERIFY.

    Raises ImportError, one sentence, if it is missing.
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
            message = "math-verify is not installed; pip install math-verify, or judge without it."
            raise ImportError(message) from None
    return MATH_VERIFY


def _math_verify(a, b):
    """The verdict of `math-verify`; False if it fails, or where it is known to accept too much."""
    letters = [re.sub(r"\\[a-zA-Z]+|sin|cos|tan|log|exp", " ", answer) for answer in (a, b)]
    variables = [set(re.findall("[a-zA-Z]", text)) for text in letters]
    words = re.compile(r"[a-zA-Z]{3}|['’′]|(?<!\w)\d+\s+\d|\bor\b")
    prose = any(words.search(text) or SEQUENCE.fullmatch(text) for text in letters)
    # Towers of powers and factorials end in big-integer code that no timeout can interrupt.
    huge = any(re.search(r"\^[^+\-*/]*\^|\^\W*\d{3}|!", answer) for answer in (a, b))
    if variables[0] != variables[1] or prose or huge or max(len(a), len(b)) > 200:
        return False
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException  # not an Exception, so it has to be named
    try:
        first, second = (parse(f"${answer}$", parsing_timeout=1) for answer in (a, b))
        return any(verify(*pair, timeout_seconds=1) for pair in ((first, second), (second, first)))
    except (Exception, TimeoutException):  # noqa: BLE001 - a foreign parser failed: equality was not shown
        return False

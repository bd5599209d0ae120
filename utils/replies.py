"""What a model's reply says: thoughts taken out, and each role's words read where they are unambiguous.

    without_thoughts("<think>3 or 4?</think>3")                # -> ("3", True, False)
    parse_probabilities("Here: [0.9, 0.1]", 2)                 # -> [0.9, 0.1]

Anything else is refused with a ValueError that says what is wrong. A reply is parsed, never run.
"""
import json
import re

MAX_CRITIQUE = 1000             # characters of a critique that the base model is shown
MAX_TEXT = 100_000              # characters of a reply that are read


def read_body(data):
    """A reply's body (bytes) -> its JSON object (dict); a stream that nobody asked for is put together. Lines
    that start with a colon are comments. Raises ValueError or RecursionError."""
    text = re.sub(r"\A(\s*:[^\n]*\n)+", "", data.decode("utf-8-sig"))
    value = _assembled(text) if text.lstrip().startswith(("data:", "event:")) else json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _assembled(text):
    """The events of a whole stream -> the reply that they make (dict). ValueError where it is torn."""
    reply, choices = {}, {}
    lines = [line[5:].strip() for line in text.splitlines() if line.startswith("data:")]
    for line in lines:
        event = {} if line == "[DONE]" else json.loads(line)
        reply |= {name: value for name, value in event.items() if name != "choices" and value is not None}
        for piece in event.get("choices") or []:
            choice = choices.setdefault(piece.get("index", 0), {"message": {}, "finish_reason": None})
            message = choice["message"]
            for name, value in (piece.get("delta") or piece.get("message") or {}).items():
                is_more = isinstance(value, (str, list)) and isinstance(message.get(name), type(value))
                if is_more and name != "role":
                    message[name] += value
                elif value is not None:
                    message[name] = value
            if tokens := (piece.get("logprobs") or {}).get("content"):
                choice.setdefault("logprobs", {"content": []})["content"] += tokens
            choice["finish_reason"] = piece.get("finish_reason") or choice["finish_reason"]
    if not reply.get("error") and (not choices or not all(c["finish_reason"] for c in choices.values())):
        raise ValueError("a stream that ends before its reply does")
    return reply | {"choices": [choices[index] for index in sorted(choices)]}


TAG = re.compile(r"<(/?)(?:think|thinking|thoughts?|reasoning)>|◁(/?)think▷|\[(/?)THINK\]", re.IGNORECASE)


def without_thoughts(text):
    """A reply -> (what is said outside of <think> and its kin, whether there were any, whether one never
    ends)."""
    text = text[:MAX_TEXT]
    if "<|channel|>" in text:                               # gpt-oss, where its server leaves the channels in
        final = text.rpartition("<|channel|>final<|message|>")
        return re.sub(r"<\|[a-z]+\|>", "", final[2]).strip() if final[1] else "", True, not final[1]
    outside, start, inside, tagged = [], 0, False, False
    for tag in TAG.finditer(text):
        tagged = True
        if "/" in tag[0]:
            outside = outside if inside else []             # the prompt had opened it
            inside, start = False, tag.end()
        elif not inside:
            outside.append(text[start:tag.start()])
            inside = True
    if not tagged:
        return re.sub(r"<\|(begin|end)_of_box\|>", "", text), False, False
    return "".join([*outside, "" if inside else text[start:]]).strip(), True, inside


def _json(text):
    """The value of a JSON text. ValueError; NaN is no JSON."""
    def refuse(constant):
        raise ValueError(f"{constant} is no number")
    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("a pit of brackets") from error


def _only_list(value):
    """A JSON list, also as the one list of an object such as {"probabilities": [...]} -> list. ValueError."""
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 else None
    if not isinstance(value, list):
        raise ValueError("not a JSON list")
    return value


def _unfenced(text):
    """A text without the code fence around it, and blanks at its ends."""
    text = text.strip()
    if len(text) >= 6 and text.startswith("```") and text.endswith("```"):
        text = text[3:-3].removeprefix("json").strip()
    return text


def parse_list(text):
    """A reply that is one JSON list, perhaps in a code fence -> list. ValueError otherwise; NaN is no
    JSON."""
    try:
        return _only_list(_json(_unfenced(text)[:10_000]))
    except ValueError as error:
        raise ValueError("not a JSON list") from error


def _in_prose(text, read):
    """What `read` makes of the one JSON list or object in a longer text that it accepts. ValueError where
    there is none, or several that differ."""
    text, values = text[:10_000], []
    for span in re.findall(r"\[[^\[\]]*\]", text) + re.findall(r"\{[^{}]*\}", text):
        try:
            value = read(_json(span))
        except ValueError:
            continue
        if value not in values:
            values.append(value)
    if len(values) != 1:
        raise ValueError("several lists that differ" if values else "not a JSON list")
    return values[0]


def _number(value):
    """A probability as a model writes it: 0.9, "0.9", "90%" -> float. ValueError."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\.\d+)?\s*%?\s*", value):
        return float(value.strip(" %")) / (100 if "%" in value else 1)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("something in the list is no number")
    return value


def _probabilities(value, n, candidates):
    """A JSON value -> n numbers >= 0: a list of numbers, {"1": 0.9, ...}, or a list of {"candidate": ...,
    "probability": ...}. ValueError."""
    if isinstance(value, dict) and not any(isinstance(item, list) for item in value.values()):
        orders = [names for names in ([str(i) for i in range(1, n + 1)], [str(c) for c in candidates or []])
                  if len(names) == n and value.keys() == set(names)]
        if len(orders) == 2 and orders[0] != orders[1]:
            raise ValueError("numbers that may mean candidates or their places")
        value = [value[name] for name in orders[0]] if orders else value
    values = _only_list(value)
    if values and all(isinstance(item, dict) for item in values):
        values = [_entry(item, i, candidates) for i, item in enumerate(values, 1)]
    if len({isinstance(item, str) for item in values}) > 1:
        raise ValueError("something in the list is no number, or text beside numbers")
    values = [_number(item) for item in values]
    if len(values) != n:
        raise ValueError(f"{len(values)} numbers for {n} candidates")
    if not all(0 <= item < 1e9 for item in values) or not sum(values) > 0:
        raise ValueError("numbers that are negative, all zero or not finite")
    return values


PROBABILITY = re.compile("prob|score|confidence|likelihood|p$", re.IGNORECASE)


def _entry(item, i, candidates):
    """The probability of {"candidate": ..., "probability": ...} in its place i, from 1. ValueError, also
    where a number may be a candidate or its place."""
    names = [str(candidate) for candidate in candidates or []]
    numbers = [value for key, value in item.items() if PROBABILITY.match(key)]
    rest = {key: str(value) for key, value in item.items() if not PROBABILITY.match(key)}
    fits = [(key, word) for key, word in rest.items() if word in (str(i), *names[i - 1:i])]
    if len(numbers) != 1 or rest and not fits:
        raise ValueError("an entry that names no candidate in its place")
    if any(word in names and word in map(str, range(1, len(names) + 1)) and names[i - 1] != str(i)
           for _, word in fits):
        raise ValueError("numbers that may mean candidates or their places")
    return numbers[0]


def parse_probabilities(text, n, candidates=None):
    """The Voter's reply -> n probabilities that sum to 1. ValueError says what is wrong with it.

    It may think aloud first: then the list is its last line, or the only list in the text. In a text only
    numbers that sum to about 1 (or 100) count: other lists may be anything.
    """
    def read_strictly(value):
        values = _probabilities(value, n, candidates)
        total = sum(values)
        if not 0.9 <= total <= 1.1 and not 90 <= total <= 110:
            raise ValueError("numbers in a text that are no probabilities")
        return [item / total for item in values]

    text = re.sub(r"(?<=\d)\s*%(?=\s*[,\]}])", "", text.strip()[:MAX_TEXT])          # [90%, 10%] is no JSON
    reasons = []
    for candidate_text in (_unfenced(text), text.rsplit("\n", 1)[-1]):
        try:
            value = _json(candidate_text[:10_000])
        except ValueError:
            reasons.append("not a JSON list")
            continue
        try:
            values = _probabilities(value, n, candidates)
            return [item / sum(values) for item in values]
        except ValueError as error:
            reasons.append(str(error))
    try:
        return _in_prose(text, read_strictly)
    except ValueError as error:
        raise ValueError(next((reason for reason in reasons if reason != "not a JSON list"),
                              str(error))) from error


def parse_order(text, modules):
    """The Planner's reply -> the names of `modules` in its order; those before "stop" where it ends the list
    early. ValueError otherwise."""
    def read(value):
        names = _only_list(value)
        if not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
        if names[-1:] == ["stop"] and len({*names}) == len(names) and {*names[:-1]} <= {*modules}:
            return names[:-1]
        if sorted(names) != sorted(modules):
            raise ValueError(f"not each of {', '.join(modules)} once, nor a shorter list that ends in stop")
        return names
    try:
        value = parse_list(text)
    except ValueError:
        return _in_prose(text, read)
    return read(value)


def parse_critique(text):
    """The Critic's reply -> one line of at most MAX_CRITIQUE characters. ValueError when it is empty."""
    line = " ".join(text.split())[:MAX_CRITIQUE]
    if not line:
        raise ValueError("an empty critique")
    return line

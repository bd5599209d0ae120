"""Imitations of OpenAI-compatible servers, one mood each, on 127.0.0.1. `python tests/servers.py` prints
their table.

A mood is a function: request -> what to send. It plays the Expert as Voter, whose right reply is [0.9, 0.1],
and the base, whose right answer is 3. The expectations beside it hold for both where both are run.
"""
import gzip
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image  # noqa: E402

from utils.cli import InputError  # noqa: E402
from utils.experts import ServerExpert, ServerVLM, ask_role, sample_from  # noqa: E402
from utils.overlap import run_through  # noqa: E402
from utils.replies import parse_probabilities  # noqa: E402
from utils.server import Server  # noqa: E402
from vlm import Rollout  # noqa: E402

KEY = "sk-very-secret-0123"
WORDS = "How probable is each of 2 candidates?"


@dataclass
class Request:
    """What a server gets, and count, the number of requests so far, this one included."""
    path: str
    headers: dict
    body: dict
    count: int

    def good(self, content="[0.9, 0.1]", reason="stop", logprob=-0.1, tops=None, **message):
        """The right reply: of the Voter, or of the base where log-probs are asked for. n choices, as
        asked."""
        choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": reason}
        if self.body.get("logprobs"):
            tops = tops or [{"token": "y", "logprob": -0.1 - i} for i in range(self.body["top_logprobs"])]
            choice["message"]["content"] = "It is \\boxed{3}" if content == "[0.9, 0.1]" else content
            choice["logprobs"] = {"content": [{"token": "x", "logprob": -0.1, "top_logprobs": [
                {"token": "y", "logprob": -0.1 - i} for i in range(len(tops))]}] * 3 + [
                {"token": "x", "logprob": logprob, "top_logprobs": tops}]}
        return {"id": "1", "object": "chat.completion", "choices": [choice] * self.body.get("n", 1),
                "usage": {"prompt_tokens": 300, "completion_tokens": 7}}


@dataclass
class Mood:
    """kind: of the five of results/reliability.md, or C for log-probs. act: Request -> dict, or (status,
    body, headers).

    expert, base: "right", or a pattern that the sentence of the abstention or of the unanswered question
    holds, None = not run. open: whether the Expert's question is asked again by the same command. most:
    requests for two questions. how: arguments of Server; url: what the user types.
    """
    kind: int | str
    about: str
    act: object
    expert: str | None = "right"
    base: str | None = "right"
    open: bool = True
    most: int | None = None
    how: dict = field(default_factory=dict)
    url: str = "http://HOST/v1"


def refuse(status, message, headers=None, **fields):
    return status, {"error": {"message": message, **fields}}, headers or {}


def once(failure):
    """A mood that fails on its first request only."""
    return lambda r: failure if r.count == 1 else r.good()


def unknown(*names, words="Unrecognized request argument supplied: {}", status=400):
    """A mood that refuses these fields, one at a time."""
    def act(r):
        name = next((name for name in names if name in r.body), None)
        return (status, {"error": {"message": words.format(name), "param": name}}, {}) if name else r.good()
    return act


def modern(r):
    """A model that thinks: max_completion_tokens, temperature 1 alone, and thoughts that need room."""
    if "max_tokens" in r.body:
        return refuse(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                           "'max_completion_tokens' "
                      "instead.", param="max_tokens", code="unsupported_parameter")
    if r.body.get("temperature", 1) != 1:
        return refuse(400, "Unsupported value: 'temperature' does not support 0 with this model. Only the "
                           "default (1) value is "
                      "supported.", param="temperature", code="unsupported_value")
    return r.good() if r.body["max_completion_tokens"] > 1000 else r.good("", "length")


def few_alternatives(r):
    return refuse(400, "Invalid value for 'top_logprobs': must be less than or equal to 5.") if r.body.get(
        "top_logprobs", 0) > 5 else r.good()


def azure(r):
    return r.good() if r.headers.get("api-key") == KEY and "api-version=2024-10-21" in r.path and "deployments/gpt/" in r.path \
        else refuse(401, "Access denied due to invalid subscription key or wrong API endpoint.")


def streamed(r):
    """The reply as a stream that nobody asked for, with comments before it."""
    events = []
    for index, choice in enumerate(r.good()["choices"]):
        text, tokens = choice["message"]["content"], (choice.get("logprobs") or {}).get("content", [])
        for piece, part, reason in ((text[:3], tokens[:1], None), (text[3:], tokens[1:], "stop")):
            events.append({"choices": [{"index": index, "delta": {"content": piece}, "finish_reason": reason,
                                        "logprobs": {"content": part} if part else None}]})
    return 200, ": PROCESSING\n\n" + "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n", {}


def without_one(r):
    """No alternatives for one token."""
    reply = r.good()
    reply["choices"][0]["logprobs"]["content"][3]["top_logprobs"] = None
    return reply


def at(path):
    """A mood that serves one path alone."""
    return lambda r: r.good() if r.path == path else (404, "<html><title>404 Not Found</title></html>", {})


def thinks_too_long(r):
    return {**r.good(None, "length", reasoning_content="Let me see"),
            "usage": {"completion_tokens": r.body["max_tokens"],
                      "completion_tokens_details": {"reasoning_tokens": 9}}}


def needs_room(r):
    return r.good() if r.body["max_tokens"] > 1000 else r.good("<think>Let me see, the picture", "length")


def in_choice(r):
    return {"choices": [{"error": {"code": 502, "message": "Upstream idle timeout exceeded"},
                         "message": {"content": ""},
                         "finish_reason": "error"}]}


def zipped(r):
    return 200, gzip.compress(json.dumps(r.good()).encode()), {"Content-Encoding": "gzip"}


def sentinels(value):
    """A base that knows no log-prob of one token, and of some of its alternatives."""
    return lambda r: r.good(logprob=-0.1 if value is None else value,
                            tops=[{"token": "y", "logprob": -0.1 - i} for i in range(12)] +
                            [{"logprob": value}] * 8)


REMEDY = "raise|lower|check|set|choose|add|correct|same command|top up|_body|give that URL"     # what a user can do
DEAD = "http://127.0.0.1:9/v1"

MOODS = {
    # 1 What the server says is shown
    "wrong key": Mood(1, "401 with words", lambda r: refuse(401, f"Incorrect API key provided: {KEY}"),
                      r"Incorrect API key provided: \[key\].*EXPERT_API_KEY",
                      r"Incorrect API key.*MODEL_API_KEY", most=2),
    "unknown model": Mood(1, "404 that names the model", lambda r: refuse(404, "The model `big` does not "
                                                                               "exist"),
                          "`big` does not exist.*--expert_model", "`big` does not exist.*--model_name",
                          most=2),
    "router, nested": Mood(1, "an error of a provider inside a 200", lambda r: {"error": {
        "message": "Provider returned error", "code": 502, "metadata": {"raw": "upstream connect error"}}},
        "502.*upstream connect error.*same command", "upstream connect error.*same command"),
    "error in a choice": Mood(1, "an error inside a choice", in_choice, "Upstream idle.*same command",
                              "Upstream idle"),
    "Azure's filter": Mood(1, "a 400 of the content filter", lambda r: refuse(
        400, "The response was filtered due to the prompt triggering Azure OpenAI's content management policy",
        code="content_filter"), "content management policy.*filter declines", "content management policy",
        open=False),
    "filtered reply": Mood(1, "finish_reason content_filter, no text",
                           lambda r: r.good(None, "content_filter"),
                           "refuses.*content_filter", "refuses.*content_filter", open=False),
    "refusal": Mood(1, "a refusal field", lambda r: r.good(None, refusal="I cannot help with that"),
                    "refuses.*I cannot help", "refuses.*I cannot help", open=False),
    "blocked prompt": Mood(1, "200 without choices, blocked for safety", lambda r: {
        "choices": [], "prompt_feedback": {"reason": "blocked: SAFETY"}}, "filter declines",
        "filter declines", open=False),
    "validation list": Mood(1, "FastAPI's 422 with a list", lambda r: (422, {"detail": [
        {"loc": ["body", "messages", 0], "msg": "Input should be a valid dictionary"}]}, {}),
        "body.messages.0: Input should be.*--expert_body", "Input should be.*--model_body"),
    "error list": Mood(1, "Gemini's list of errors", lambda r: (400, [{"error": {
        "code": 400, "message": "API key not valid. Please pass a valid API key.",
        "status": "INVALID_ARGUMENT"}}], {}),
        "API key not valid.*EXPERT_API_KEY", "API key not valid.*MODEL_API_KEY"),
    "gateway page": Mood(1, "a page of HTML with 502", lambda r: (502, "<html><head><title>502 Bad "
                                                                       "Gateway</title></head>"
                         "<body><h1>nginx says no</h1></body></html>", {}), "nginx says no.*same command",
                         "nginx says no"),
    "too long": Mood(1, "more tokens than the context holds", lambda r: refuse(
        400, "'max_tokens' or 'max_completion_tokens' is too large: 256. This model's maximum context "
             "length is 4096 tokens"),
        "maximum context length.*--max_side", "maximum context length.*--max_side"),
    "too large": Mood(1, "413", lambda r: (413, "Request Entity Too Large", {}), "413.*--max_side",
                      "413.*--max_side"),
    # 2 Dialects
    "modern": Mood(2, "max_completion_tokens, temperature 1 alone, thinks", modern),
    "plain": Mood(2, "knows neither seed nor top_k nor n", unknown("seed", "top_k", "n")),
    "strict": Mood(2, "422, extra inputs are not permitted", lambda r: (422, {"detail": [
        {"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "Extra inputs are not permitted"}]}, {})
        if "top_k" in r.body else r.good()),
    "Gemini's words": Mood(2, "Unknown name: Cannot find field", unknown(
        "top_k", "seed", words='Invalid JSON payload received. Unknown name "{}": Cannot find field.')),
    "Groq's words": Mood(2, "property is unsupported", unknown("top_k", "n", words="property '{}' is "
                                                                                   "unsupported")),
    "range of n": Mood(2, "n within [1, 1]",
                       lambda r: refuse(400, "<400> InternalError.Algo.InvalidParameter: Range of n "
                       "should be [1, 1]") if r.body.get("n", 1) > 1 else r.good()),
    "one at a time": Mood(2, "one choice, whatever n",
                          lambda r: {**r.good(), "choices": r.good()["choices"][:1]}),
    "five alternatives": Mood(2, "top_logprobs at most 5", few_alternatives),
    "Azure": Mood(2, "api-key, api-version in the URL", azure,
                  url="http://HOST/openai/deployments/gpt?api-version=2024-10-21"),
    "whole endpoint": Mood(2, "URL with /chat/completions", at("/v1/chat/completions"),
                           url="http://HOST/v1/chat/completions"),
    "bare root": Mood(2, "URL without a path", at("/v1/chat/completions"), url="http://HOST"),
    "no scheme": Mood(2, "URL without http://", at("/v1/chat/completions"), url="HOST/v1/"),
    "no version": Mood(2, "an API at the root", at("/chat/completions"), url="http://HOST/"),
    "user and password": Mood(2, "Basic authorisation in the URL", lambda r: r.good() if r.headers.get(
        "authorization") == "Basic dXNlcjpwYXNzd29yZDE=" else refuse(401, "no user"),
        url="http://user:password1@HOST/v1"),
    "Cloudflare": Mood(2, "refuses Python-urllib", lambda r: (403, "error code: 1010", {})
                       if "python" in r.headers.get(
        "user-agent", "python").lower() else r.good()),
    "thinking switch": Mood(2, "wants enable_thinking", lambda r: r.good()
                            if r.body.get("enable_thinking") is False else refuse(
        400, "parameter.enable_thinking must be set to false for non-streaming calls"),
        how={"body": {"enable_thinking": False}}),
    "no switch": Mood(2, "the same without --expert_body", lambda r: refuse(
        400, "parameter.enable_thinking must be set to false for non-streaming calls"),
        "enable_thinking must be.*--expert_body", "enable_thinking must be.*--model_body"),
    "gzip": Mood(2, "a zipped reply", zipped),
    "streams": Mood(2, "streams without being asked", lambda r: (200, 'data: {"choices": []}\n\ndata: '
                                                                      '[DONE]\n\n', {}),
                    "--expert_body.*stream", "--model_body.*stream"),
    "one choice alone": Mood(2, "only one completion choice", lambda r: refuse(
        400, "Only one completion choice is allowed") if r.body.get("n", 1) > 1 else r.good(), None),
    "exclusive range": Mood(2, "top_logprobs below 20", lambda r: refuse(
        400, "logprobs is 20 but the supported range is from 1 (inclusive) to 20 (exclusive)")
        if r.body.get("top_logprobs", 0) > 19 else r.good(), None),
    "500 names a field": Mood(2, "unexpected keyword argument", unknown(
        "top_k", "seed", words="__init__() got an unexpected keyword argument '{}'", status=500)),
    "stream, whole": Mood(2, "streams a whole reply, unasked", streamed),
    "byte order mark": Mood(2, "a byte order mark before the JSON", lambda r: (
        200, b"\xef\xbb\xbf" + json.dumps(r.good()).encode(), {})),
    # 3 Nobody there
    "dead": Mood(3, "nobody listens", None, "start it, or correct the URL", "start it, or correct the URL",
                 url=DEAD),
    "silent": Mood(3, "says nothing at all", lambda r: time.sleep(1.2), "no whole reply.*--timeout",
                   "no whole reply.*--timeout",
                   how={"timeout": 0.3}),
    "TLS": Mood(3, "https:// to a server without", lambda r: r.good(), "cannot be trusted.*http",
                "cannot be trusted.*http",
                url="https://HOST/v1"),
    "redirect": Mood(3, "redirects elsewhere", lambda r: (307, "", {"Location": "http://127.0.0.1:9/other"}),
                     "redirects to http://127.0.0.1:9/other", "redirects to", most=2),
    # 4 What a model says
    "think block": Mood(4, "<think> before the reply", lambda r: r.good(
        "<think>maybe [0.5, 0.5]</think>\n[0.9, 0.1]" if not r.body.get("logprobs")
        else "<think>\\boxed{9}</think>\\boxed{3}")),
    "think, not opened": Mood(4, "</think> alone: the template opened it", lambda r: r.good(
        "maybe [0.5, 0.5]</think>[0.9, 0.1]" if not r.body.get("logprobs")
        else "\\boxed{9}</think>\\boxed{3}")),
    "reasoning field": Mood(4, "reasoning_content beside the reply",
                            lambda r: r.good(reasoning_content="[0.5, 0.5]")),
    "channels": Mood(4, "gpt-oss's channels in the text", lambda r: r.good(
        "<|channel|>analysis<|message|>[0.5, 0.5]<|end|><|start|>assistant<|channel|>final<|message|>[0.9, "
        "0.1]<|return|>"),
        base=None),
    "parts": Mood(4, "content as a list of parts", lambda r: r.good([
        {"type": "thinking", "thinking": "[0.5, 0.5]"},
        {"type": "text", "text": r.good()["choices"][0]["message"]["content"]}])),
    "prose": Mood(4, "one list in prose",
                  lambda r: r.good("Here are the odds: [0.9, 0.1]. I hope this helps!"), base=None),
    "fence in prose": Mood(4, "a fence in prose", lambda r: r.good("Sure!\n```json\n[0.9, 0.1]\n```\nDone."),
                           base=None),
    "strings": Mood(4, "numbers as strings", lambda r: r.good('["0.9", "0.1"]'), base=None),
    "percentages": Mood(4, "percentages", lambda r: r.good("[90%, 10%]"), base=None),
    "numbered": Mood(4, 'an object {"1": 0.9, ...}', lambda r: r.good('{"1": 0.9, "2": 0.1}'), base=None),
    "named": Mood(4, "an object with one list", lambda r: r.good('{"probabilities": [0.9, 0.1]}'), base=None),
    "entries": Mood(4, "a list of objects", lambda r: r.good(
        '[{"candidate": 1, "probability": 0.9}, {"candidate": 2, "probability": 0.1}]'), base=None),
    "two lists": Mood(4, "two lists that differ",
                      lambda r: r.good("Either [0.9, 0.1] or [0.2, 0.8], I think."),
                      "several lists that differ.*Either", None, open=False),
    "chatter": Mood(4, "no list", lambda r: r.good("I see a cat."), "not a JSON list.*I see a cat", None,
                    open=False),
    "cut list": Mood(4, "cut at the longest reply", lambda r: r.good("The first candidate is [0.", "length"),
                     "cut, raise --expert_tokens", None, open=False),
    "needs room": Mood(4, "thoughts that fill the reply", needs_room),
    "endless thoughts": Mood(4, "thoughts that fill any room", thinks_too_long,
                             "all of them thoughts.*--thinking_tokens",
                             "was cut before.*--max_new_tokens"),
    "tool call": Mood(4, "calls a tool", lambda r: r.good("", "tool_calls", tool_calls=[{"id": "1"}]),
                      "calls a tool.*--expert_body.*tool_choice", "calls a tool.*--model_body", open=False),
    "reasoning alone": Mood(4, "all words in the reasoning field", lambda r: r.good("", reasoning_content="[0.5, 0.5]"),
                            "in its reasoning; --expert_body", "in its reasoning; --model_body", open=False),
    "content object": Mood(4, "content as an object", lambda r: r.good(
        {"text": r.good()["choices"][0]["message"]["content"]})),
    # 5 Retries
    "wait in seconds": Mood(5, "429, Retry-After: 0.2",
                            once(refuse(429, "slow down", {"Retry-After": "0.2"}))),
    "wait in ms": Mood(5, "429, retry-after-ms", once(refuse(429, "slow down", {"retry-after-ms": "150"}))),
    "wait till a date": Mood(5, "429, Retry-After: a date", lambda r: refuse(429, "slow down", {
        "Retry-After": formatdate(time.time() + 1, usegmt=True)}) if r.count == 1 else r.good()),
    "wait in words": Mood(5, "429, the wait in the body", once(refuse(429, "Rate limit reached. Please try "
                                                                           "again in 200ms."))),
    "quota a minute": Mood(5, "429 of a quota, with a wait", once(refuse(
        429, "You exceeded your current quota, please check your plan and billing details. Please retry in "
             "0.2s."))),
    "daily limit": Mood(5, "429, a wait of an hour", lambda r: refuse(429, "Rate limit reached, try again "
                                                                           "in 1h0m5.5s"),
                        "again in 3606 s", "again in 3606 s"),
    "quota": Mood(5, "429 insufficient_quota",
                  lambda r: refuse(429, "You exceeded your current quota", code="insufficient_quota"),
                  "exceeded your current quota.*top up", "exceeded your current quota.*top up", most=2),
    "no credit": Mood(5, "402", lambda r: refuse(402, "Insufficient credits"), "Insufficient credits.*top up",
                      "top up", most=2),
    "no vision": Mood(5, "sees no pictures", lambda r: refuse(404, "No endpoints found that support image "
                                                                   "input"),
                      "support image input.*--expert_model", "support image input.*--model_name", most=2),
    "text parser": Mood(5, "refuses image_url", lambda r: refuse(400, "unknown variant `image_url`, "
                                                                      "expected `text`"),
                        "image_url.*sees pictures", "image_url.*sees pictures", most=2),
    "hiccup": Mood(5, "500 once", once(refuse(500, "oops"))),
    "torn": Mood(5, "half a body once", once((200, '{"choices": [{"mess', {}))),
    "busy": Mood(5, "503 always", lambda r: refuse(503, "overloaded"), "503.*overloaded", "503.*overloaded"),
    # C from log-probs
    "-9999": Mood("C", "-9999 for what it does not know", sentinels(-9999.0), None),
    "-inf": Mood("C", "-Infinity", sentinels(float("-inf")), None),
    "null": Mood("C", "null", sentinels(None), None),
    "no alternatives": Mood("C", "none for one token", without_one, None),
    "no logprobs": Mood("C", "no logprobs",
                        lambda r: {"choices": [{"message": {"content": "3"}}] * r.body.get("n", 1)}, None,
                        "gives no logprobs.*--model"),
}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(Request(self.path, {k.lower(): v for k, v in self.headers.items()},
                                                body,
                                                len(self.server.requests) + 1))
            request = self.server.requests[-1]
            self.server.now += 1
            self.server.active.append(self.server.now)
        outcome = self.server.act(request)
        with self.server.lock:
            self.server.now -= 1
        status, content, headers = outcome if isinstance(outcome, tuple) else (200, outcome, {})
        content = content if isinstance(content, bytes) else (
            content if isinstance(content, str) else json.dumps(content)).encode()
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass                    # the client has had enough

    def log_message(self, *_):
        pass


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        pass                        # a TLS handshake is no HTTP request


def start(act):
    """A server that acts so -> it, with its host, requests, and how many were active at once. `shutdown` ends
    it."""
    server = Quiet(("127.0.0.1", 0), Handler)
    server.act, server.requests, server.lock, server.now, server.active = act, [], threading.Lock(), 0, []
    server.host = f"127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def client(mood, server, flag):
    how = {"timeout": 3, "retries": 1, "backoff": 0.01, "workers": 2, "flag": flag, **mood.how}
    return Server(mood.url.replace("HOST", server.host), "big", KEY, **how)


def as_expert(mood):
    """Two questions to the Expert as Voter -> (list of RoleReply, requests that arrived)."""
    server, picture = start(mood.act), Image.new("RGB", (8, 8), "red")
    try:
        expert = ServerExpert(client(mood, server, "expert"), 256)
        turns = [SimpleNamespace(pictures=[picture], number=i) for i in range(2)]
        replies = [ask_role(expert, [turn], lambda turn: f"{WORDS} {turn.number}",
                            lambda _, text: parse_probabilities(text, 2, ["3", "4"]))[0] for turn in turns]
        return replies, len(server.requests)
    finally:
        server.shutdown()


def as_base(mood):
    """Two questions to the base, two samples each -> (list of Rollouts, or an InputError; requests that
    arrived)."""
    server, picture = start(mood.act), Image.new("RGB", (8, 8), "red")
    try:
        vlm = ServerVLM(client(mood, server, "model"), Rollout)
        try:
            groups = [run_through(sample_from(vlm, [[picture]], [f"{WORDS} {i}"], 2, top_k=40, seed=i,
                                          max_new_tokens=64))[0] for i in range(2)]
        except InputError as error:
            return error, len(server.requests)
        return [rollout for group in groups for rollout in group], len(server.requests)
    finally:
        server.shutdown()


def table():
    """The table of results/reliability.md (str)."""
    lines = ["| kind | server | as the Expert | as the base |", "|---|---|---|---|"]

    def short(text):
        return re.sub(r"127.0.0.1:\d+", "HOST", str(text)).replace("|", "\\|")

    for name, mood in MOODS.items():
        cells = ["", ""]
        if mood.expert:
            replies, _ = as_expert(mood)
            said = f"{'open' if replies[0].failed else 'abstains'}: {short(replies[0].reason)}"
            cells[0] = "right" if replies[0].value else said
        if mood.base:
            outcome, _ = as_base(mood)
            failed = isinstance(outcome, InputError)
            cells[1] = short(f"stops: {outcome}" if failed else f"unanswered: {outcome[0].failure}"
                             if outcome[0].failure else
                             f"right, C = {outcome[0].confidences.mean():.2f}")
        lines.append(f"| {mood.kind} | {name}: {mood.about} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

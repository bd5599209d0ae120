"""One OpenAI-compatible chat server over HTTP(S): its dialect, its pace, and what it says when it fails.

    server = Server("https://host/v1", "gpt-x", key)
    answer = server.chat(pictures, prompt, read, reply_tokens=256, temperature=0.0)

Servers differ in the fields that they take, the headers that they want and the errors that they give. A
refusal that names a field is learned once. Each failure has a kind, which decides about retries and about
what is stored:

    run        nothing will work until the user changes something: key, quota, model, TLS, URL
    request    this one request cannot be served, such as a prompt that is too long. The next may.
    temporary  busy, broken or silent. Asked again, at the pace that the server names.
    refused    the model or a filter declines this question: an answer of its kind, not a failure.

The clock runs over the whole reply, the body is capped, redirects are not followed, and secrets are cut out
of all that comes back. What a server says is data: it is parsed, never run.
"""
import base64
import hashlib
import html
import io
import ipaddress
import json
import os
import random
import re
import ssl
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx2
from PIL import Image

from utils.cli import PUBLIC, InputError, parse_json, printable, public_url, secrets_in_path, warn
from utils.replies import read_body

MAX_BODY = 4 * 2**20            # bytes of a reply without log-probs that are read
BYTES_PER_TOKEN = 4096          # of a reply with 20 alternatives a token
JPEG_ABOVE = 2**20              # bytes of a PNG above which a picture travels as a JPEG
MAX_WORDS = 300                 # characters of a server's error that are shown
COOLDOWN = 30.0                 # seconds before a dead server is tried again; doubles up to 10 minutes
LESSONS = 12                    # how often one request may be spelt anew
UNUSABLE = (KeyError, IndexError, TypeError, ValueError, OverflowError, AttributeError)
AGENT = "cdrl-catts/1.0"


class ServerError(InputError):
    """A server could not be used: one sentence with its words and the remedy, without the key.

    kind: see above. wait: seconds that the server asked for, or None. weight: 8 = nobody answers there; less:
    only several in a row mean that. requests: how many were sent.
    """

    def __init__(self, sentence, kind="temporary", wait=None, weight=1):
        super().__init__(sentence)
        self.kind, self.wait, self.weight, self.requests = kind, wait, weight, 0


class Lesson(Exception):
    """The server wants the request in another form, which its Dialect knows by now."""


class Cut(Exception):
    """The model thought until its tokens were used up and said nothing. read: what to call where there was
    room for thoughts; None: then it failed."""

    def __init__(self, read=None):
        super().__init__()
        self.read = read


@dataclass
class Answer:
    """value: what `read` made of the reply; requests: how many it took; path: its file in the cache, or
    None."""
    value: object
    cached: bool = False
    requests: int = 1
    path: Path | None = None

    def forget(self):
        """Take the reply out of the cache: what nobody could use is asked for anew."""
        if self.path:
            self.path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------
# URLs

ENDPOINT = re.compile(r"/(chat/completions|completions|responses|models|chat)/*$")


def is_url(text):
    """Whether a user's word for a model means a server: http(s)://..., or host[:port][/path] that is no path
    or hub id."""
    if re.match("https?:", text, re.IGNORECASE):
        return True
    host = text.partition("/")[0]
    named = r"localhost(:\d+)?|[\w-]+(\.[\w-]+)*:\d+|\[[0-9a-f:]+\](:\d+)?"
    named += r"|([\w-]+\.)+[a-z]{2,}" if "/" in text else ""
    return bool(re.fullmatch(named, host.rpartition("@")[2], re.IGNORECASE)) and not Path(text).exists()


def split_url(url):
    """A user's URL -> urllib's SplitResult, with a scheme; path without the endpoint. Raises InputError."""
    text = url.strip()
    try:
        if "://" not in text:
            text = f"{'http' if _is_local(urllib.parse.urlsplit('//' + text).hostname) else 'https'}://{text}"
        address = urllib.parse.urlsplit(text)
        fine = (address.scheme in ("http", "https") and address.hostname.encode("idna")
                and (address.port or True))
    except (AttributeError, ValueError):
        fine = False
    if not fine:
        raise InputError(f"server {public_url(url)!r} is not of the form http(s)://host/v1")
    return address._replace(path=ENDPOINT.sub("", address.path).rstrip("/"), fragment="")


def _endpoints(address):
    """Where the chat may be, the likeliest first; the others are tried after a 404."""
    path, is_azure = address.path, (address.hostname or "").endswith(".openai.azure.com")
    root = "/openai/v1" if is_azure else "/v1"
    paths = [path, path + "/v1"] if path else [root, "", "/api/v1"]
    paths = paths[:1] if re.search(r"/v\d\w*(/|$)|/deployments/", path) else paths
    netloc = address.netloc.rpartition("@")[2]
    return [urllib.parse.urlunsplit(address._replace(netloc=netloc, path=p + "/chat/completions"))
            for p in paths]


def _is_local(host):
    """Whether a host without a scheme is one of this house, which seldom has a certificate."""
    try:
        return "." not in host or ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def _is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback or host == "0.0.0.0"
    except ValueError:
        return False


# ----------------------------------------------------------------------------------------------------------
# What a server says

def _message(value, depth=0):
    """The words of an error in JSON, whatever its shape: OpenAI's, FastAPI's, Gemini's list, OpenRouter's
    nest (str)."""
    if isinstance(value, str):
        return value
    if depth > 6:
        return ""
    if isinstance(value, list):
        return "; ".join(filter(None, (_message(item, depth + 1) for item in value[:3])))
    if not isinstance(value, dict):
        return ""
    words = [_message(value[key], depth + 1)
             for key in ("error", "errors", "message", "msg", "detail", "error_msg", "raw",
                                                         "metadata", "title", "reason") if value.get(key)]
    if isinstance(value.get("loc"), list):
        words.insert(0, ".".join(map(str, value["loc"])) + ":")
    text = " ".join(filter(None, words))
    codes = [str(value[key]) for key in ("code", "type", "status", "param")
             if isinstance(value.get(key), str)
             and not re.search(rf"(?<!\w){re.escape(value[key])}(?!\w)", text)]
    return f"{text} ({', '.join(codes)})" if codes and text else text or " ".join(codes)


def words_of(body):
    """What a body of bytes says, as text of any length: the message of its JSON, or its text without
    markup."""
    text = body.decode("utf-8", "replace")
    try:
        return _message(parse_json(text)) or text[:MAX_WORDS]
    except (ValueError, RecursionError):
        text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text[:20_000]).replace("\\/", "/")
        text = re.sub(r"(?is)<(script|style|svg)\b.*?</\1>|<[^>]{0,2000}>", " ", text)
        return html.unescape(text)


UNIT = {"ms": 1e-3, "milliseconds": 1e-3, "millisecond": 1e-3, "s": 1, "sec": 1, "secs": 1, "second": 1,
        "seconds": 1,
        "m": 60, "min": 60, "mins": 60, "minute": 60, "minutes": 60, "h": 3600, "hour": 3600, "hours": 3600}
DURATION = r"\d+(?:\.\d+)?\s*(?:" + "|".join(sorted(UNIT, key=len, reverse=True)) + r")(?![a-z])"


def told_wait(headers, text, now=None):
    """Seconds that a server asks to wait, or None: Retry-After in seconds or as a date, retry-after-ms, or
    its words."""
    now = now or datetime.now(UTC)
    try:
        if headers.get("retry-after-ms"):
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if after := headers.get("retry-after", "").strip():
            if re.fullmatch(r"\d+(\.\d+)?", after):
                return float(after)
            now = parsedate_to_datetime(headers["date"]) if headers.get("date") else now
            return max(0.0, (parsedate_to_datetime(after) - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        pass                            # a header that says nothing: perhaps the body does
    text = text[:20_000].lower()
    named = r"(?:try again|retry|wait|resets?|available)\W*(?:\w+\W+){0,3}?((?:" + DURATION + r"\s*)+)"
    if match := re.search(named, text):
        return sum(float(re.match(r"[\d.]+", duration)[0]) * UNIT[re.sub(r"[\d.\s]", "", duration)]
                   for duration in re.findall(DURATION, match[1]))
    match = re.search(r"retry[_ -]?after\w*\W{0,5}(\d+(?:\.\d+)?)", text)
    return float(match[1]) if match else None


def _any(*patterns):
    return re.compile("|".join(patterns), re.IGNORECASE)


# Words by which servers tell one refusal from another; statuses differ too much.
SECRET = _any(r"api.?key.{0,30}(not valid|invalid|incorrect|expired|missing)",
              r"(invalid|incorrect|missing) api.?key", "unauthori[sz]ed", "authentication")
QUOTA = _any(r"insufficient[_ ](quota|balance|credit|fund)", "quota exhausted", "billing", "payment",
             "arrear", r"exceeded your (current )?quota", "credit balance", "out of credit", "more credits",
             r"free (tier|quota).{0,40}exhaust", "spending limit")
FILTER = _any("content[_ -]?(filter|management|policy)", "responsible.?ai", "moderation", "flagged", "safety",
              "data.?inspection", "inappropriate content", "prohibited.?content",
              "sensitive (content|words|info)")
BLIND = _any(r"(not|n't|endpoints found that) support.{0,40}(image|vision|multi.?modal)",
             r"(image|vision|multi.?modal)( input| content|_url|s)* (is|are) not (supported|allowed)",
             r"unknown variant.{0,4}image", "mmproj", "not a (multi.?modal|vision)", "at most 0 image",
             r"only (supports? )?text", r"type.{0,20}image_url.{0,20}not supp",
             r"content.{0,20}(must|should) be (a )?string")
MODEL = _any(r"model.{0,80}(not found|n[o']t exist|not available|not a valid|not loaded)",
             r"model.{0,80}(no such|unknown|invalid)",
             r"model.{0,80}(decommission|deprecated)", "(invalid|unknown|no such) model", "no models? loaded",
             r"deployment.{0,60}not exist", "model_not_found")
UNWANTED = _any("unexpected", "un(known|supported|recogni[sz]ed)", "invalid", "not (supported|permitted)")
LONG = _any(r"context.?(length|window|size)", r"too many.{0,10}tokens", "prompt is too long",
            r"exceed.{0,40}tokens", r"maximum.{0,20}(tokens|input)", "longer than the (maximum|max)")
LARGE = _any("too (large|big)", "entity", "payload", r"size (limit|exceed)",
             r"exceed.{0,30}(size|bytes|mb)\b")


# ----------------------------------------------------------------------------------------------------------
# The dialect and the pace of one server

class Dialect:
    """What a server was seen to want: fields under another name, without some, with other values; room for
    thoughts.

    OPTIONAL: fields that may be left out, and what that means for the results.
    """
    OPTIONAL = {"temperature": "it samples at its own temperature",
                "seed": "its samples cannot be drawn again",
                "top_k": "it samples from all tokens", "n": "each sample is a request of its own"}
    ONE = _any("(only|just|exactly) (one|1|a single) (completion|choice|candidate|response)",
               "multiple (completion|choice|candidate|response)s?")
    LIMIT = _any("too (large|long|big|high|many)", "context length", "less than or equal", "at most",
                 "exceed", "<=", "between", "range", "maximum", "greater than", "allowed")

    def __init__(self, say):
        self.names, self.dropped, self.limits, self.thinks, self.say = {}, set(), {}, False, say

    def spell(self, body, thinking_tokens):
        """The request in this dialect (a new dict)."""
        spelt = {key: min(value, self.limits.get(key, value)) if key in self.limits else value
                 for key, value in body.items() if key not in self.dropped}
        spelt = {self.names.get(key, key): value for key, value in spelt.items()}
        name = self.names.get("max_tokens", "max_tokens")
        if self.thinks and name in spelt:
            spelt[name] += thinking_tokens
        return spelt

    def learn(self, words, body):
        """Whether a refusal names a field of `body`, as it was sent, that can be changed: then it is from now
        on."""
        if body.get("n", 1) > 1 and self.ONE.search(words):
            return self.drop("n")
        if self.LIMIT.search(words) and not re.search("max_completion_tokens.{0,20}instead", words):
            return self._learn_limit(words, body)
        if "max_tokens" in body and _names(words, "max_tokens"):
            self.names["max_tokens"], self.thinks = "max_completion_tokens", True
            self.say("wants max_completion_tokens, as models that think do")
            return True
        return any([self.drop(key, words) for key in self.OPTIONAL if key in body])

    def drop(self, key, words=None):
        if words is not None and not _names(words, key):
            return False
        self.dropped.add(key)
        self.say(f"takes no {key}: {self.OPTIONAL[key]}")
        return True

    def _learn_limit(self, words, body):
        if "top_logprobs" in body and "logprobs" in words:
            numbers = [int(number) for number in re.findall(r"(?<![\w.])\d{1,6}(?!\w|\.\d)", words)]
            limit, sent = None, body["top_logprobs"]
            if not re.search(rf"\b{sent}( \(exclusive|\))|less than {sent}\b", words):
                limit = max((number for number in numbers if 0 < number < sent), default=5)
            limit = limit or sent - 1
            if limit < body["top_logprobs"]:
                self.limits["top_logprobs"] = limit
                self.say(f"gives at most {limit} top_logprobs")
                return True
            return False
        return any([self.drop(key, words) for key in self.OPTIONAL if key in body])


def _names(words, key):
    """Whether an error is about a field: as a word, and one letter only in quotes or beside 'parameter' or a
    limit."""
    if len(key) > 2:
        return bool(re.search(rf"(?<![\w]){key}(?![\w])", words))
    return bool(re.search(rf"""["'`]{key}["'`]|"""
                          rf"(parameter|param|argument|field|property|name|body|of)\W{{1,3}}{key}\b|"
                          rf"(^|[\s.]){key}(:|\s+(must|should|is|greater|>|<|=|!=))|[:(,]\s?{key}(?!\w)",
                          words))


@dataclass
class Pace:
    """How many requests may travel at once, and when; shared by all threads that ask one server.

    A 429 halves the number, successes raise it again. A server that is dead, after a whole request with its
    retries and no success elsewhere, is left alone for COOLDOWN seconds; then one request tries it.
    """
    workers: int
    limit: int = 0
    active: int = 0
    streak: int = 0
    strikes: int = 0
    not_before: float = 0.0
    last_success: float = 0.0
    down: ServerError | None = None
    down_until: float = 0.0
    cooldown: float = COOLDOWN
    room: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self):
        self.limit = self.workers

    def enter(self, trial=False):
        """Wait for a place -> whether this request tries a dead server out. Raises ServerError while that is
        left alone."""
        with self.room:
            while self.active >= self.limit or time.monotonic() < self.not_before:
                self.room.wait(max(self.not_before - time.monotonic(), 0.0) or None)
            if self.down and not trial:
                left = self.down_until - time.monotonic()
                if left > 0:
                    raise ServerError(f"{self.down} (not tried again for {left:.0f} s)")
                trial, self.cooldown = True, min(600.0, 2 * self.cooldown)
                self.down_until = time.monotonic() + self.cooldown
            self.active += 1
            return trial

    def leave(self):
        with self.room:
            self.active -= 1
            self.room.notify_all()

    def succeeded(self):
        with self.room:
            self.last_success, self.strikes, self.down, self.cooldown = time.monotonic(), 0, None, COOLDOWN
            self.streak += 1
            if self.streak >= 10 * self.limit and self.limit < self.workers:
                self.limit, self.streak = self.limit + 1, 0
            self.room.notify_all()

    def slow_down(self, wait):
        """After a 429: fewer at once, and none before the time that the server names."""
        with self.room:
            now = time.monotonic()
            if now >= self.not_before:                      # those that travelled together say the same thing
                self.limit, self.streak = max(1, self.limit // 2), 0
            self.not_before = max(self.not_before, now + wait)

    def gave_up(self, error, started):
        """A request that began at `started` failed, with all its retries."""
        with self.room:
            self.strikes += error.weight
            if self.strikes >= 8 and self.last_success < started and self.down is None:
                self.down, self.down_until = error, time.monotonic() + self.cooldown


# ----------------------------------------------------------------------------------------------------------

class Server:
    """An OpenAI-compatible chat endpoint; pictures travel as data URLs.

    url: up to /v1, the whole endpoint, or the host alone; its query is kept. key: sent as a bearer token
    (`api-key` at Azure), and cut out of everything the server says (a key of fewer than 8 characters is no
    secret, and cutting it would cut words). timeout: seconds for a whole reply. retries: of temporary
    failures, with back-off; waits that the server names come on top, up to `patience` seconds. cache: folder
    of earlier replies, keyed by model, prompt, pictures and options; None = no cache. body: fields added to
    every request, None takes one out. headers: {name: value}; {key} in a value stands for the key. max_side:
    pixels of a picture's longer side, 0 = any. thinking_tokens: added to the reply's once the model is seen
    to think. flag: "expert" or "model", the flags that errors name.
    """

    def __init__(self, url, model, key=None, timeout=60.0, retries=4, cache=None, backoff=0.5, workers=8, *,
                 body=None,
                 headers=None, max_side=2048, thinking_tokens=4096, patience=120.0, flag="expert"):
        address = split_url(url)
        self.flag, self.model = flag, model
        self.name_flag = "--expert_model" if flag == "expert" else "--model_name"
        self.url = public_url(_endpoints(address)[0])
        if not model:
            raise InputError(f"server {public_url(url)!r} needs the name of a model: --expert_model or "
                             f"--model_name")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise InputError("the API key holds blanks or other characters that no header can carry; set it "
                             "again")
        self.key, self.timeout, self.retries, self.backoff = key, timeout, retries, backoff
        self.workers, self.patience = workers, patience
        self.body, self.max_side, self.thinking_tokens = body or {}, max_side, thinking_tokens
        self.cache = Path(cache) if cache else None
        self.headers, self.secrets = self._headers(address, headers or {}), [key or ""]
        self.secrets += [address.password or "", urllib.parse.unquote(address.password or ""),
                         *(headers or {}).values()]
        self.secrets += [value for name, value in urllib.parse.parse_qsl(address.query)
                         if name.lower() not in PUBLIC]
        self.secrets += [self.headers.get("Authorization", "").partition(" ")[2]]
        self.secrets += secrets_in_path(address.path)
        self.secrets = [urllib.parse.quote(s, safe="") for s in self.secrets] + self.secrets
        self.secrets = sorted({secret for secret in self.secrets if len(secret) >= 8}, key=len, reverse=True)
        self.urls, self.sayings = _endpoints(address), set()
        self.dialect, self.pace, self.broken, self.refusals = Dialect(self.say), Pace(workers), None, 0
        self.proxy = None
        self.client = self._client(address)

    def _headers(self, address, more):
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": AGENT}
        azure = (address.hostname or "").endswith((".azure.com", ".azure-api.net"))
        azure = azure or "api-version" in address.query
        if address.username is not None:
            pair = f"{urllib.parse.unquote(address.username)}:{urllib.parse.unquote(address.password or '')}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif self.key and not any("{key}" in value for value in more.values()):
            headers |= {"api-key": self.key} if azure else {"Authorization": f"Bearer {self.key}"}
        for name, value in more.items():
            value = value.replace("{key}", self.key or "")
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not re.fullmatch(r"[ -~]*", value):
                raise InputError(f"--{self.flag}_header {name!r}: a header's name and plain characters are "
                                 f"expected")
            headers[name] = value
        return headers

    def _client(self, address):
        """httpx2's client: proxies of the environment but for this machine, certificates also from
        REQUESTS_CA_BUNDLE."""
        loopback = _is_loopback(address.hostname)
        if not loopback and not urllib.request.proxy_bypass(address.hostname):
            proxies = urllib.request.getproxies()
            self.proxy = proxies.get(address.scheme) or proxies.get("all")
        bundle = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
        try:
            verify = (ssl.create_default_context(cafile=bundle) if bundle and address.scheme == "https"
                      else True)
            return httpx2.Client(verify=verify, trust_env=not loopback,
                                 timeout=httpx2.Timeout(self.timeout, pool=None),
                                 limits=httpx2.Limits(max_connections=None,
                                                      max_keepalive_connections=self.workers))
        except OSError as error:
            raise InputError(f"the certificates of {bundle!r} (SSL_CERT_FILE or REQUESTS_CA_BUNDLE) cannot "
                             f"be read: {error}; "
                             "name a PEM file that is there") from error
        except (ImportError, ValueError, httpx2.InvalidURL) as error:
            raise InputError(f"the proxy {public_url(self.proxy or '')!r} of the environment cannot be used: "
                             f"{printable(str(error))[:120]}; unset it, or set "
                             f"NO_PROXY={address.hostname}") from error

    def say(self, words):
        """What was learned about the server, once, on stderr."""
        if words not in self.sayings:
            self.sayings.add(words)
            warn(f"server {self.url} {words}")

    # ---- One request

    def chat(self, pictures, prompt, read, attempt=0, reply_tokens=256, **options):
        """One question -> Answer with read(the reply's JSON object). Raises ServerError.

        read: raises KeyError, IndexError, TypeError, ValueError, AttributeError or OverflowError for a reply
        that cannot be used (it is asked for again and never cached), ServerError for one that need not be
        asked for again, Cut for one that holds thoughts alone, Lesson for one in another form.
        """
        urls = [data_url(picture, self.max_side) for picture in pictures]
        content = [*({"type": "image_url", "image_url": {"url": url}} for url in urls),
                   {"type": "text", "text": prompt}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}],
                "max_tokens": reply_tokens, **options}
        body = {key: value for key, value in (body | self.body).items() if value is not None}
        name = hashlib.sha256(f"{self.url} {attempt} {json.dumps(body)}".encode()).hexdigest()
        path = self.cache / name[:2] / f"{name}.json" if self.cache else None
        if path and path.is_file():
            try:
                return Answer(_read_cut(read, parse_json(path.read_text())), True, 1, path)
            except (*UNUSABLE, ServerError, Cut, Lesson):
                pass                # torn by a full disk or a kill, or of no use: asked again, written again
        reply, value, requests = self._ask(body, read)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.{random.getrandbits(32)}.tmp")
            temporary.write_text(json.dumps(reply))
            os.replace(temporary, path)
        return Answer(value, False, requests, path)

    def _ask(self, body, read):
        """Send until there is a reply that `read` takes -> (reply, value, requests sent). Raises
        ServerError."""
        requests = retries = timeouts = lessons = named_waits = 0
        waited, trial, started = 0.0, False, time.monotonic()
        while True:
            if self.broken:
                raise ServerError(str(self.broken), "run")
            trial = self.pace.enter(trial)
            try:
                requests += 1
                reply, value = self._attempt(body, read)
                self.pace.succeeded()
                self.refusals = -1                  # it does serve requests of this kind
                return reply, value, requests
            except Lesson as lesson:
                lessons += 1
                if lessons <= LESSONS:
                    continue
                error = ServerError(self.sentence(f"wants the request in ever new forms ({lesson})",
                                                   f"--{self.flag}_body adds and removes fields"), "run")
            except ServerError as failure:
                error = failure
            finally:
                self.pace.leave()
            error.requests = requests
            if error.kind != "temporary":
                if error.kind == "run":
                    self.broken = error
                else:
                    self.pace.succeeded()
                raise error
            timeouts += isinstance(error.__cause__, TimeoutError)
            if error.wait is not None:
                self.pace.slow_down(error.wait if error.wait <= self.patience else 0.0)
            if error.wait and waited + error.wait <= self.patience and named_waits < 8:
                # Told to wait: no retry is used up.
                named_waits, waited = named_waits + 1, waited + error.wait
                time.sleep(error.wait * (1 + random.random() / 10))
            elif retries >= self.retries or timeouts >= 2 or trial or (error.wait or 0) > self.patience:
                self.pace.gave_up(error, started)
                raise error
            else:
                time.sleep(self.backoff * 2**min(retries, 6) * (0.5 + random.random() / 2))
                retries += 1

    def _attempt(self, body, read):
        """One request -> (reply, value). Raises ServerError of any kind, or Lesson."""
        spelt, url, sent = self.dialect.spell(body, self.thinking_tokens), self.urls[0], self.headers
        cap = MAX_BODY + (BYTES_PER_TOKEN * body.get("n", 1) * body.get("max_tokens", 0)
                          if body.get("logprobs") else 0)
        try:
            status, headers, data = self._exchange(url, json.dumps(spelt).encode(), sent, cap)
        except (TimeoutError, httpx2.TimeoutException) as error:
            remedy = "raise --timeout, or lower --workers"
            why = f"no whole reply in {self.timeout:g} s"
            raise self._unreachable(why, remedy) from TimeoutError(str(error))
        except (httpx2.DecodingError, ValueError) as error:
            raise ServerError(self.sentence(f"sent a reply that cannot be read ({error})")) from error
        except httpx2.HTTPError as error:
            text = self.hide(printable(str(error)))[:MAX_WORDS]
            if "CERTIFICATE" in text.upper() or "SSL" in text:
                raise ServerError(self.sentence(f"cannot be trusted: {text}",
                                                "set SSL_CERT_FILE to the CA bundle of your "
                                                 "network, or correct http:// and https://"),
                                                 "run") from error
            raise self._unreachable(f"{type(error).__name__}: {text or 'the connection broke'}",
                                    "start it, or correct the URL") from error
        if not 200 <= status < 300:
            self._learn(status, data, spelt, url, sent)
            raise self._refusal(status, headers, data)
        try:
            reply = self.hide(read_body(data))
        except (ValueError, RecursionError) as error:
            remedy = "check that the URL ends at the API, often /v1"
            if data.lstrip().startswith(b"data:"):
                remedy = f"add --{self.flag}_body '{{\"stream\": false}}'"
            why = f"sent a reply that is no JSON object: {self._words(data)[:80]!r}"
            raise ServerError(self.sentence(why, remedy)) from error
        self._look_for_errors(reply, headers, spelt, url, sent)
        try:
            had_room = spelt != self.dialect.spell(body, 0) or not self.thinking_tokens
            return reply, _read_cut(read, reply) if had_room else read(reply)
        except Cut as error:
            if not had_room:
                self.dialect.thinks = True
                self.say(f"thinks before it speaks: up to {self.thinking_tokens} tokens more "
                         f"(--thinking_tokens)")
                raise Lesson("room for thoughts") from error
            count = spelt.get("max_completion_tokens", spelt.get("max_tokens"))
            raise ServerError(self.sentence(f"was cut after {count} tokens, all of them thoughts",
                                            "raise --thinking_tokens"), "request") from error
        except UNUSABLE as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(self.sentence(f"sent a reply that cannot be used ({type(error).__name__}: "
                                             f"{self.hide(printable(str(error)))[:80]})")) from error

    def _exchange(self, url, payload, sent, cap):
        """One exchange -> (status, headers, body). On a thread of its own: a socket's time-out starts anew
        with every byte, also of the headers, so that only the clock outside bounds a server that drips."""
        outcome, deadline = [], time.monotonic() + self.timeout

        def exchange():
            try:
                body = bytearray()
                with self.client.stream("POST", url, content=payload, headers=sent) as response:
                    for chunk in response.iter_bytes(2**16):
                        body += chunk
                        if len(body) > cap:
                            raise ValueError(f"longer than {cap:,} bytes")
                        if time.monotonic() > deadline:
                            return
                outcome.append((response.status_code, response.headers, bytes(body)))
            except Exception as error:                      # raised below, by the thread that asked
                outcome.append(error)

        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not outcome:
            raise TimeoutError(f"no whole reply in {self.timeout:g} s")
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]

    # ---- What went wrong

    def sentence(self, what, remedy=""):
        return f"server {self.url}: it {what}" + (f"; {remedy}" if remedy else "")

    def _words(self, data):
        return self.hide(printable(self.hide(words_of(data))))[:MAX_WORDS].rstrip(" .")

    def _unreachable(self, what, remedy):
        through = f", through the proxy {public_url(self.proxy)}" if self.proxy else ""
        remedy += f", or set NO_PROXY={urllib.parse.urlsplit(self.url).hostname}" if self.proxy else ""
        return ServerError(f"server {self.url}: {what}{through}; {remedy}", weight=8)

    def _look_for_errors(self, reply, headers, spelt, url, sent):
        """Raises for an error inside a reply of status 200, as routers and gateways send them."""
        choices = reply.get("choices")
        choices = choices if isinstance(choices, list) else []
        nested = [choice["error"] for choice in choices if isinstance(choice, dict) and choice.get("error")]
        error = reply.get("error") or (nested[0] if nested else None)
        if error or not choices:
            code = error.get("code") if isinstance(error, dict) else None
            status = int(code) if str(code).isdecimal() and 400 <= int(code) < 600 else 200
            said = error or {key: value for key, value in reply.items()
                             if key not in ("id", "object", "created", "model")}
            data = json.dumps(said).encode()
            self._learn(status, data, spelt, url, sent)
            raise self._refusal(status, headers, data, not error)

    def _learn(self, status, data, spelt, url, sent):
        """Raises Lesson where a refusal says how the request can be changed. spelt, url, sent: as it was."""
        words = self._words(data)
        if status in (400, 422, 501, 200) and self.dialect.learn(words, spelt):
            raise Lesson(words)
        if status == 404 and "parameter" in words and self.dialect.learn(words, spelt):
            raise Lesson(words)
        was_moved = self.urls[0] != url                     # by a request beside this one
        if status in (404, 405) and (len(self.urls) > 1 or was_moved) and not (
                MODEL.search(words) or BLIND.search(words)):
            if not was_moved:
                self.urls = self.urls[1:]
                self.url = public_url(self.urls[0])
            raise Lesson(f"nothing at {public_url(url)}")
        if status == 500 and UNWANTED.search(words) and self.dialect.learn(words, spelt):
            raise Lesson(words)
        wants_header = re.search(r"api.?key.{0,20}header|header.{0,20}api.?key|subscription key", words,
                                 re.IGNORECASE)
        if status == 401 and self.key and sent.get("Authorization") == f"Bearer {self.key}" and wants_header:
            others = {name: value for name, value in self.headers.items() if name != "Authorization"}
            self.headers = others | {"api-key": self.key}
            raise Lesson("the key in api-key")

    def _refusal(self, status, headers, data, silent=False):
        """The ServerError for a reply that is an error; silent: one without choices and without words."""
        words = self._words(data)
        wait = told_wait(headers, words_of(data) + " " + data[:20_000].decode("utf-8", "replace"))
        what = "no choices" if silent else "an error in its reply"
        what = what if status == 200 else f"HTTP status {status}"
        what = f"answers with {what}" + (f": {words!r}" if words else "")

        def error(kind, remedy="", **how):
            return ServerError(self.sentence(what, remedy), kind, **how)

        if self.flag == "model" and 200 <= status < 500 and status != 429 and re.search("log_?probs", words):
            return error("run", "a base model's server must return logprobs and top_logprobs; choose another "
                                "with --model")
        if 300 <= status < 400:
            target = printable(public_url(self.hide(headers.get("location", "another place"))))[:200]
            return error("run", f"it redirects to {target}, which is not followed; give that URL")
        if status == 402 or (status in (400, 403, 429, 200) and QUOTA.search(words)
                             and (wait is None or "insufficient" in words)):
            return error("run", "top up the account or raise its limit; then the same command goes on")
        if status == 451 or status in (400, 403, 422, 200) and FILTER.search(words):
            return error("refused", "its filter declines this question")
        if status in (400, 404, 415, 422, 500, 501, 200) and BLIND.search(words):
            return error("run", f"choose a model that sees pictures with {self.name_flag}")
        if status in (401, 403, 407) or (status in (400, 200) and SECRET.search(words)):
            return error("run", f"check the key in {self.flag.upper()}_API_KEY, what it may use, and "
                                f"--{self.flag}_header")
        if status in (400, 413, 422, 200) and LONG.search(words):
            return error("request", f"lower --max_side ({self.max_side}) or the tokens of a reply")
        if status in (400, 404, 422, 200) and MODEL.search(words):
            return error("run", f"check {self.name_flag} {self.model!r}")
        if status in (404, 405, 410):
            return error("run", f"check the URL, often up to /v1, and {self.name_flag} {self.model!r}")
        if status == 413 or (status in (400, 422, 200) and LARGE.search(words)):
            return error("request", f"lower --max_side ({self.max_side})")
        if status == 429:
            longer = wait is not None and wait > self.patience
            return error("temporary", f"run the same command again in {wait:.0f} s" if longer else
                         "lower --workers, or run the same command again later", wait=wait or 0.0, weight=8)
        if status in (408, 409, 425) or status >= 500 or status == 200:
            weight = 8 if status in (502, 503, 504) or status >= 520 else 3 if status >= 500 else 1
            return error("temporary", "the same command asks again", wait=wait, weight=weight)
        self.refusals += self.refusals >= 0
        remedy = f"--{self.flag}_body adds, changes or (null) removes a field of the request"
        # Three of three refused: it is not the question.
        return error("run" if self.refusals >= 3 else "request",
                     remedy)

    def hide(self, value):
        """The secrets cut out of every string of a JSON value, after decoding: an escaped key is a key."""
        if not self.secrets:
            return value
        if isinstance(value, str):
            for secret in self.secrets:
                value = value.replace(secret, "[key]")
            return value
        if isinstance(value, list):
            return [self.hide(item) for item in value]
        if isinstance(value, dict):
            return {self.hide(name): self.hide(item) for name, item in value.items()}
        return value


def _read_cut(read, reply):
    """What `read` makes of a reply, also where thoughts had room and were cut. Raises as it does."""
    try:
        return read(reply)
    except Cut as error:
        if error.read is None:
            raise
        return error.read()


def data_url(picture, max_side=0):
    """A PIL picture -> data URL: PNG, or a JPEG of quality 95 where that is large; the longer side at most
    max_side."""
    picture = picture.convert("RGB")
    if max_side and max(picture.size) > max_side:
        scale = max_side / max(picture.size)
        picture = picture.resize([max(1, round(side * scale)) for side in picture.size],
                                 Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png"
    picture.save(buffer, "PNG")
    if buffer.tell() > JPEG_ABOVE:
        buffer, kind = io.BytesIO(), "jpeg"
        picture.save(buffer, "JPEG", quality=95)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()

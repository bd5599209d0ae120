"""Whom a prompt can be put to besides a local base model: an Expert, local or behind a server, and a base
behind a server.

    LocalExpert(vlm).ask([(pictures, prompt)])                                   # a VLM in the Expert's roles
    ServerExpert(Server("https://host/v1", "gpt-x", key)).ask([...])             # any OpenAI-compatible
    endpoint ServerVLM(Server("http://host:8000/v1", "qwen"), Rollout).sample(images, prompts, 8)      # the
    base, e.g. vLLM

HTTP(S) by the standard library: a time-out for the whole reply, retries with back-off, a cache on disk of
replies that could be used, a cap on what is read, and the key cut out of everything that comes back. What a
server says is data: it is parsed, never run.
"""
import base64
import hashlib
import http.client
import io
import json
import os
import queue
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import torch

from utils.cli import InputError

MAX_BODY = 4 * 2**20            # bytes of a server's reply that are read
ALTERNATIVES = 20               # top_logprobs asked for: the k of Eq. 3


@dataclass
class Reply:
    """What an Expert said; or error, one sentence, and whether asking again is useless (`final`).

    probability: of the least probable token of the reply, in (0, 1]; 1 where the Expert does not tell.
    """
    text: str = ""
    tokens: int = 0
    cached: bool = False
    error: str = ""
    final: bool = False
    probability: float = 1.0


class LocalExpert:
    """A VLM in the Expert's roles. The first attempt is greedy; the others are drawn."""

    def __init__(self, vlm, max_new_tokens=256):
        self.vlm, self.max_new_tokens = vlm, max_new_tokens

    def ask(self, turns, attempt=0):
        """[(pictures, prompt), ...] -> list of Reply."""
        if not turns:
            return []
        groups = self.vlm.sample([pictures for pictures, _ in turns], [prompt for _, prompt in turns],
                                 greedy=attempt == 0,
                                 seed=[f"expert {attempt} {prompt}" for _, prompt in turns],
                                 max_new_tokens=self.max_new_tokens)
        return [Reply(r.text, len(r.tokens), probability=r.logprobs.min().exp().item()) for (r,) in groups]


class ServerError(Exception):
    """A server could not be used: one sentence, without the key."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


def at_once(function, items, workers):
    """[function(item), ...] on several threads. They are daemons: Ctrl-C does not wait for a server that
    hangs."""
    results, work = [None] * len(items), queue.SimpleQueue()
    for pair in enumerate(items):
        work.put(pair)

    def labour():
        try:
            while True:
                i, item = work.get_nowait()
                try:
                    results[i] = (True, function(item))
                except Exception as error:                  # raised below, in the order of the items
                    results[i] = (False, error)
        except queue.Empty:
            pass

    threads = [threading.Thread(target=labour, daemon=True) for _ in range(min(workers, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for fine, value in results:
        if not fine:
            raise value
    return [value for _, value in results]


class Server:
    """An OpenAI-compatible chat endpoint over HTTP(S); pictures travel as data URLs.

    url: up to and including /v1. key: sent as a bearer token, and cut out of everything the server says (a
    key of fewer than 8 characters is no secret, and cutting it would cut words). timeout: seconds for a whole
    reply. retries: on 429, 5xx, time-outs, broken connections and replies that cannot be used, with
    exponential back-off. cache: folder of earlier replies, keyed by model, prompt, pictures and options; None
    = no cache.
    """

    def __init__(self, url, model, key=None, timeout=60.0, retries=4, cache=None, backoff=0.5, workers=8):
        try:
            parts = urllib.parse.urlsplit(url)
            fine = parts.scheme in ("http", "https") and parts.hostname.encode("idna")
        except (AttributeError, ValueError):
            fine = False
        if not fine:
            raise InputError(f"server {url!r} is not of the form http(s)://host/v1")
        if not model:
            raise InputError(f"server {url!r} needs the name of a model: --expert_model or --model_name")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise InputError("the API key holds blanks or other characters that no header can carry; set it "
                             "again")
        self.url, self.model, self.key = url.rstrip("/") + "/chat/completions", model, key
        self.timeout, self.retries, self.backoff, self.workers = timeout, retries, backoff, workers
        self.cache = Path(cache) if cache else None
        self.opener = urllib.request.build_opener(_NoRedirect)

    def chat(self, pictures, prompt, read, attempt=0, **options):
        """One request -> (read(the reply's JSON object), from the cache?). Raises ServerError.

        read: raises KeyError, IndexError, TypeError, ValueError or OverflowError for a reply that cannot be
        used; that one is asked for again and never cached.
        """
        content = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
        body = {"model": self.model,
                "messages": [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
                **options}
        payload = json.dumps(body).encode()
        name = hashlib.sha256(f"{self.url} {attempt} ".encode() + payload).hexdigest()
        path = self.cache / name[:2] / f"{name}.json" if self.cache else None
        if path and path.is_file():
            try:
                return read(json.loads(path.read_text())), True
            except (KeyError, IndexError, TypeError, ValueError, OverflowError):
                pass                # torn by a full disk or a kill: asked again, written again
        reply, found = self._post(payload, read)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.{random.getrandbits(32)}.tmp")
            temporary.write_text(json.dumps(reply))
            os.replace(temporary, path)
        return found, False

    def _post(self, payload, read):
        headers = {"Content-Type": "application/json",
                   **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        why = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * (0.5 + random.random() / 2)
            try:
                reply = self._reply(urllib.request.Request(self.url, payload, headers))
                return reply, read(reply)
            except urllib.error.HTTPError as error:
                why = f"HTTP status {error.code}"
                if error.code != 429 and error.code < 500:
                    break
                after = error.headers.get("Retry-After", "")
                wait = min(30.0, float(after)) if re.fullmatch(r"\d{1,6}", after) else wait
            # time-outs and refused connections are OSErrors
            except (OSError, http.client.HTTPException) as error:
                why = self._hide(f"{type(error).__name__}: {error}")
            except RecursionError:
                why = "a reply that is no JSON object, but a pit of brackets"
            except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
                why = self._hide(f"a reply that cannot be used ({type(error).__name__}: {str(error)[:80]})")
            if attempt < self.retries:
                time.sleep(wait)
        raise ServerError(f"server {self.url}: {why}")

    def _reply(self, request):
        """One exchange -> the reply's JSON object. On a thread of its own: a socket's time-out starts anew
        with every byte, also of the headers, so that only the clock outside bounds a server that drips."""
        found = []

        def exchange():
            try:
                body = b""
                with self.opener.open(request, timeout=self.timeout) as response:
                    while chunk := response.read1(2**16):
                        body += chunk
                        if len(body) > MAX_BODY:
                            raise ValueError(f"longer than {MAX_BODY:,} bytes")
                found.append(body)
            except Exception as error:                      # raised below, by the thread that asked
                found.append(error)

        thread = threading.Thread(target=exchange, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not found:
            raise TimeoutError(f"no whole reply in {self.timeout:g} s")
        if isinstance(found[0], Exception):
            raise found[0]
        reply = self._hide(json.loads(found[0].decode()))
        if not isinstance(reply, dict):
            raise ValueError("not a JSON object")
        if not isinstance(reply.get("choices"), list) or not reply["choices"]:
            raise ValueError(f"no choices, but {json.dumps(reply)[:60]}")
        return reply

    def _hide(self, value):
        """The key cut out of every string of a JSON value, after decoding: an escaped key is a key."""
        if not self.key or len(self.key) < 8:
            return value
        if isinstance(value, str):
            return value.replace(self.key, "[key]")
        if isinstance(value, list):
            return [self._hide(item) for item in value]
        if isinstance(value, dict):
            return {self._hide(name): self._hide(item) for name, item in value.items()}
        return value


def _data_url(picture):
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class ServerExpert:
    """An Expert behind a Server. The first attempt is at temperature 0, the others at 1."""

    def __init__(self, server, max_new_tokens=256):
        self.server, self.max_new_tokens = server, max_new_tokens

    def ask(self, turns, attempt=0):
        """[(pictures, prompt), ...] -> list of Reply, several requests at once."""
        return at_once(lambda turn: self._one(*turn, attempt), turns, self.server.workers)

    def _one(self, pictures, prompt, attempt):
        try:
            (text, tokens), cached = self.server.chat(pictures, prompt, self._read, attempt,
                                                      temperature=float(attempt > 0),
                                                      max_tokens=self.max_new_tokens)
        except ServerError as error:
            return Reply(error=str(error), final=True)
        return Reply(text, tokens, cached)

    @staticmethod
    def _read(reply):
        text, usage = reply["choices"][0]["message"]["content"], reply.get("usage")
        if not isinstance(text, str):
            raise TypeError("choices[0].message.content is no text")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return text, tokens if isinstance(tokens, int) and 0 <= tokens < 10**7 else 0


class ServerVLM:
    """The base model behind a Server (vLLM and others): `sample` as that of VLM. C is read from `logprobs`
    with `top_logprobs` = 20; a Rollout's token ids are unknown, -1 each.

    A completion that is empty or whose numbers make no sense is a Rollout without words and without
    confidence: unanswered.

    rollout: the class of what `sample` returns, `vlm.Rollout`.
    """

    def __init__(self, server, rollout):
        self.server, self.rollout, self.warned = server, rollout, set()

    def sample(self, images, prompts, n=1, *, max_new_tokens=256, temperature=1.0, top_k=0, greedy=False,
               seed=0,
               first=0):
        """As VLM.sample. top_k travels as vLLM's parameter of that name. Raises InputError when the server
        cannot serve."""
        seeds = seed if isinstance(seed, (list, tuple)) else [f"{seed} {b}" for b in range(len(prompts))]
        return at_once(lambda i: self._one(images[i], prompts[i], n, f"{seeds[i]} {first}" if not greedy
                                           else "greedy",
                                           max_new_tokens, 0.0 if greedy else temperature, top_k),
                       range(len(prompts)), self.server.workers)

    def _one(self, pictures, prompt, n, seed, max_new_tokens, temperature, top_k):
        number = random.Random(seed).getrandbits(31)

        def read(reply):
            if len(reply["choices"]) != n:
                raise ValueError(f"{len(reply['choices'])} answers where {n} were asked for")
            return [self._rollout(choice) for choice in reply["choices"]]

        try:
            rollouts, _ = self.server.chat(pictures, prompt, read, n=n, max_tokens=max_new_tokens,
                                           temperature=temperature,
                                           seed=number, logprobs=True, top_logprobs=ALTERNATIVES,
                                           **({"top_k": top_k} if top_k else {}))
        except ServerError as error:
            raise InputError(f"{error}; a base model's server must return text, logprobs and top_logprobs; "
                             f"what was done is "
                             "kept, the same command goes on") from error
        return rollouts

    def _rollout(self, choice):
        """One of a reply's choices -> Rollout. Raises KeyError, TypeError or ValueError where logprobs are
        missing."""
        content, text = choice["logprobs"]["content"], choice["message"]["content"]
        counts = {len(token["top_logprobs"]) for token in content}
        if 0 in counts:
            raise ValueError("no top_logprobs")
        try:
            logprobs = torch.tensor([float(token["logprob"]) for token in content])
            # k alternatives of every token: a mean over more of them would be on another scale
            tops = torch.tensor([[float(top["logprob"]) for top in token["top_logprobs"][:min(counts)]]
                                 for token in content])
            sane = bool(text) and isinstance(text, str) and all(bool((-1e4 <= x).all() and (x <= 1e-3).all())
                                                               for x in (logprobs, tops))
        except (ValueError, OverflowError):
            sane = False
        if not content or not sane:
            return self.rollout("", torch.tensor([-1]), torch.tensor([-100.0]), torch.zeros(1), False)
        if min(counts) < ALTERNATIVES and min(counts) not in self.warned:
            self.warned.add(min(counts))
            print(f"server {self.server.url} gives {min(counts)} top_logprobs where {ALTERNATIVES} were "
                  f"asked for: C is read "
                  "from those, on another scale", file=sys.stderr)
        text = text.encode(errors="replace").decode()                   # JSON may hold half a character
        finished = choice.get("finish_reason") == "stop"
        return self.rollout(text, torch.full((len(content),), -1), logprobs, -tops.mean(-1), finished)


ATTEMPTS = 3                    # how often a role is asked before it abstains
MAX_CRITIQUE = 1000             # characters of a critique that the base model is shown


def parse_list(text):
    """A reply that is one JSON list, perhaps in a code fence -> list. ValueError otherwise; NaN is no
    JSON."""
    def refuse(constant):
        raise ValueError(f"{constant} is no number")
    text = text.strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text[:10_000], re.DOTALL)
    try:
        value = json.loads(fenced[1] if fenced else text[:10_000], parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError("not a JSON list") from error
    if not isinstance(value, list):
        raise ValueError("not a JSON list")
    return value


def parse_probabilities(text, n):
    """The Voter's reply -> n probabilities that sum to 1. It may think aloud first: then the list is its last
    line. ValueError says what is wrong with it."""
    try:
        values = parse_list(text)
    except ValueError:
        values = parse_list(text.strip().rsplit("\n", 1)[-1])
    if len(values) != n:
        raise ValueError(f"{len(values)} numbers for {n} candidates")
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise ValueError("something in the list is no number")
    if not all(0 <= value < 1e9 for value in values) or not sum(values) > 0:
        raise ValueError("numbers that are negative, all zero or not finite")
    return [value / sum(values) for value in values]


def parse_order(text, modules):
    """The Planner's reply -> the names of `modules` in its order. ValueError otherwise."""
    names = parse_list(text)
    if not all(isinstance(name, str) for name in names) or sorted(names) != sorted(modules):
        raise ValueError(f"not each of {', '.join(modules)} once")
    return names


def parse_critique(text):
    """The Critic's reply -> one line of at most MAX_CRITIQUE characters. ValueError when it is empty."""
    line = " ".join(text.split())[:MAX_CRITIQUE]
    if not line:
        raise ValueError("an empty critique")
    return line


def consult(expert, role, turns, make_prompt, parse):
    """Ask the Expert in a role about every turn -> what `parse(turn, text)` made of each reply, None where it
    abstains.

    A reply that does not parse is asked for again, ATTEMPTS times in all; every request goes into the ledger.
    """
    found, reasons, pending = {}, {}, list(range(len(turns)))
    prompts = [make_prompt(turn) for turn in turns]
    for attempt in range(ATTEMPTS):
        replies = expert.ask([(turns[i].pictures, prompts[i]) for i in pending], attempt)
        again = []
        for i, reply in zip(pending, replies):
            turns[i].result.ledger.add(role, expert_calls=int(not reply.cached),
                                       cached_calls=int(reply.cached),
                                       expert_tokens=reply.tokens)
            text = reply.text.encode(errors="replace").decode()         # JSON may hold half a character
            try:
                if reply.error:
                    raise ValueError(reply.error)
                found[i] = parse(turns[i], text)
                turns[i].result.texts[role] = text[:MAX_CRITIQUE]
                turns[i].result.probabilities[role] = reply.probability
            except ValueError as error:
                reasons[i] = str(error)
                if not reply.final:
                    again.append(i)
        pending = again
        if not pending:
            break
    for i in range(len(turns)):
        if i not in found:
            turns[i].result.ledger.notes.append(f"{role} abstained: {reasons[i]}")
    return [found.get(i) for i in range(len(turns))]

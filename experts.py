"""Whom a prompt can be put to besides a local base model: an Expert, local or behind a server, and a base behind a server.

    LocalExpert(vlm).ask([(pictures, prompt)])                                   # a VLM in the Expert's roles
    ServerExpert(Server("https://host/v1", "gpt-x", key)).ask([...])             # any OpenAI-compatible endpoint
    ServerVLM(Server("http://host:8000/v1", "qwen")).sample(images, prompts, 8)  # the base, e.g. in vLLM; C from its logprobs

HTTP(S) by the standard library: a time-out for the whole reply, retries with back-off, a cache on disk, a cap on what is
read, and the key cut out of everything that comes back. What a server says is data: it is parsed, never run.
"""
import base64
import hashlib
import http.client
import io
import json
import os
import random
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from data import InputError
from vlm import Rollout

MAX_BODY = 4 * 2**20            # bytes of a server's reply that are read


@dataclass
class Reply:
    """What an Expert said; or error, one sentence, and whether asking again is useless (`final`)."""
    text: str = ""
    tokens: int = 0
    cached: bool = False
    error: str = ""
    final: bool = False


class LocalExpert:
    """A VLM in the Expert's roles. The first attempt is greedy; the others are drawn."""

    def __init__(self, vlm, max_new_tokens=256):
        self.vlm, self.max_new_tokens = vlm, max_new_tokens

    def ask(self, turns, attempt=0):
        """[(pictures, prompt), ...] -> list of Reply."""
        if not turns:
            return []
        groups = self.vlm.sample([pictures for pictures, _ in turns], [prompt for _, prompt in turns], greedy=attempt == 0,
                                 seed=[f"expert {attempt} {prompt}" for _, prompt in turns],
                                 max_new_tokens=self.max_new_tokens)
        return [Reply(r.text, len(r.tokens)) for (r,) in groups]


class ServerError(Exception):
    """A server could not be used: one sentence, without the key."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *_):
        return None


class Server:
    """An OpenAI-compatible chat endpoint over HTTP(S); pictures travel as data URLs.

    url: up to and including /v1. key: sent as a bearer token, and cut out of everything the server says. timeout: seconds
    for a whole reply. retries: on 429, 5xx, time-outs, broken connections and broken JSON, with exponential back-off.
    cache: folder of earlier replies, keyed by model, prompt, pictures and options; None = no cache.
    """

    def __init__(self, url, model, key=None, timeout=60.0, retries=4, cache=None, backoff=0.5, workers=8):
        if not re.match(r"https?://[^/\s]", url):
            raise InputError(f"server {url!r} is not of the form http(s)://host/v1")
        if not model:
            raise InputError(f"server {url!r} needs the name of a model: --expert_model or --model_name")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise InputError("the API key holds blanks or other characters that no header can carry; set it again")
        self.url, self.model, self.key = url.rstrip("/") + "/chat/completions", model, key
        self.timeout, self.retries, self.backoff, self.workers = timeout, retries, backoff, workers
        self.cache = Path(cache) if cache else None
        self.opener = urllib.request.build_opener(_NoRedirect)

    def chat(self, pictures, prompt, attempt=0, **options):
        """One request -> (the reply's JSON object, from the cache?). Raises ServerError."""
        content = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
        body = {"model": self.model, "messages": [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}],
                **options}
        payload = json.dumps(body).encode()
        name = hashlib.sha256(f"{self.url} {attempt} ".encode() + payload).hexdigest()
        path = self.cache / name[:2] / f"{name}.json" if self.cache else None
        if path and path.is_file():
            try:
                return json.loads(path.read_text()), True
            except ValueError:
                pass                # torn by a full disk or a kill: asked again, written again
        reply = self._post(payload)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.{random.getrandbits(32)}.tmp")
            temporary.write_text(json.dumps(reply))
            os.replace(temporary, path)
        return reply, False

    def _post(self, payload):
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        why = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * (0.5 + random.random() / 2)
            try:
                return self._read(urllib.request.Request(self.url, payload, headers))
            except urllib.error.HTTPError as error:
                why = f"HTTP status {error.code}"
                if error.code != 429 and error.code < 500:
                    break
                after = error.headers.get("Retry-After", "")
                wait = min(30.0, float(after)) if re.fullmatch(r"\d{1,6}", after) else wait
            except (OSError, http.client.HTTPException) as error:      # time-outs and refused connections are OSErrors
                why = self._hide(f"{type(error).__name__}: {error}")
            except (ValueError, RecursionError) as error:
                why = self._hide(f"a reply that is no JSON object ({type(error).__name__})")
            if attempt < self.retries:
                time.sleep(wait)
        raise ServerError(f"server {self.url}: {why}")

    def _read(self, request):
        deadline, body = time.monotonic() + self.timeout, b""
        with self.opener.open(request, timeout=self.timeout) as response:
            while chunk := response.read1(2**16):
                body += chunk
                if len(body) > MAX_BODY:
                    raise ValueError("too long")
                if time.monotonic() > deadline:         # the socket's own time-out starts anew with every byte
                    raise TimeoutError(f"no whole reply in {self.timeout:g} s")
        reply = json.loads(self._hide(body.decode()))
        if not isinstance(reply, dict):
            raise ValueError("not an object")
        return reply

    def _hide(self, text):
        return text.replace(self.key, "[key]") if self.key else text


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
        with ThreadPoolExecutor(self.server.workers) as pool:
            return list(pool.map(lambda turn: self._one(*turn, attempt), turns))

    def _one(self, pictures, prompt, attempt):
        try:
            reply, cached = self.server.chat(pictures, prompt, attempt, temperature=float(attempt > 0),
                                             max_tokens=self.max_new_tokens)
            text = reply["choices"][0]["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
        except ServerError as error:
            return Reply(error=str(error), final=True)
        except (KeyError, IndexError, TypeError):
            return Reply(error="a reply without choices[0].message.content")
        usage = reply.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        return Reply(text, tokens if isinstance(tokens, int) and 0 <= tokens < 10**7 else 0, cached)


class ServerVLM:
    """The base model behind a Server (vLLM and others): `sample` as that of VLM. C is read from `logprobs` with
    `top_logprobs` = 20; a Rollout's token ids are unknown, -1 each."""

    def __init__(self, server):
        self.server = server

    def sample(self, images, prompts, n=1, *, max_new_tokens=256, temperature=1.0, top_k=0, greedy=False, seed=0,
               first=0):
        """As VLM.sample. top_k travels as vLLM's parameter of that name. Raises InputError when the server cannot serve."""
        seeds = seed if isinstance(seed, (list, tuple)) else [f"{seed} {b}" for b in range(len(prompts))]
        with ThreadPoolExecutor(self.server.workers) as pool:
            return list(pool.map(lambda i: self._one(images[i], prompts[i], n, f"{seeds[i]} {first}", max_new_tokens,
                                                     0.0 if greedy else temperature, top_k), range(len(prompts))))

    def _one(self, pictures, prompt, n, seed, max_new_tokens, temperature, top_k):
        number = random.Random(seed).getrandbits(31)
        try:
            reply, _ = self.server.chat(pictures, prompt, n=n, max_tokens=max_new_tokens, temperature=temperature, seed=number,
                                        logprobs=True, top_logprobs=20, **({"top_k": top_k} if top_k else {}))
            rollouts = [self._rollout(choice) for choice in reply["choices"]]
        except ServerError as error:
            raise InputError(f"{error}; what was done is kept, the same command goes on") from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"server {self.server.url}: a reply without text, logprobs or top_logprobs; the base model's "
                             "server must return them") from error
        if len(rollouts) != n:
            raise InputError(f"server {self.server.url} gave {len(rollouts)} answers where {n} were asked for")
        return rollouts

    @staticmethod
    def _rollout(choice):
        content = choice["logprobs"]["content"]
        if not content or not all(token["top_logprobs"] for token in content):
            raise ValueError("no tokens, or none beside the sampled ones")
        logprobs = torch.tensor([float(token["logprob"]) for token in content])
        confidences = torch.stack([-torch.tensor([float(top["logprob"]) for top in token["top_logprobs"]]).mean()
                                   for token in content])
        if not (logprobs.isfinite().all() and confidences.isfinite().all() and isinstance(choice["message"]["content"], str)):
            raise ValueError("numbers that are not finite, or no text")
        text = choice["message"]["content"].encode(errors="replace").decode()      # JSON may hold half a character
        return Rollout(text, torch.full((len(content),), -1), logprobs, confidences, choice.get("finish_reason") == "stop")

"""The Expert, local or behind a server, its roles, and a base model behind a server.

    LocalExpert(vlm).ask([(pictures, prompt)])                            # a VLM in the Expert's roles
    ServerExpert(Server("https://host/v1", "gpt-x", key)).ask([...])      # any OpenAI-compatible endpoint
    ServerVLM(Server("http://host:8000/v1", "qwen"), Rollout).sample(images, prompts, 8)        # e.g. vLLM

A reply is read where it is unambiguous (replies.py). What cannot be read is asked for again; then the role
abstains and says why. A role that failed because of the server leaves its question open, for the same command
to ask again.
"""
import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from utils.overlap import at_once, in_background, waited
from utils.replies import MAX_CRITIQUE, without_thoughts
from utils.server import Cut, Server, ServerError

ALTERNATIVES = 20               # top_logprobs asked for: the k of Eq. 3
ATTEMPTS = 3                    # how often a role is asked before it abstains
SENTINEL = -1000.0              # log-probs from here down stand for "unknown": servers send -9999 and -inf


# ----------------------------------------------------------------------------------------------------------
# Who is asked

@dataclass
class Reply:
    """What an Expert replied; or error, one sentence, and whether asking again is useless (`final`).

    tokens, prompt_tokens: None where nobody counted them. requests: sent for it, 0 = none. failed: the error
    is the server's, so that the question stays open. cut: at the longest reply. forget: takes the reply out
    of the cache. silence: why there is no text. probability: of the least probable token, in (0, 1]; 1 where
    the Expert does not tell.
    """
    text: str = ""
    tokens: int | None = 0
    cached: bool = False
    error: str = ""
    final: bool = False
    prompt_tokens: int | None = None
    requests: int = 1
    failed: bool = False
    cut: bool = False
    silence: str = ""
    probability: float = 1.0
    forget: Callable = lambda: None

    def costs(self):
        """What it adds to a ledger (dict). A reply from the cache costs nothing."""
        if self.cached or not self.requests:
            return {"expert_calls": 0, "cached_calls": int(self.cached), "expert_retries": 0,
                    "expert_tokens": 0,
                    "expert_prompt_tokens": 0}
        return {"expert_calls": 1, "cached_calls": 0, "expert_retries": self.requests - 1,
                "expert_tokens": self.tokens,
                "expert_prompt_tokens": self.prompt_tokens}


class LocalExpert:
    """A VLM in the Expert's roles. The first attempt is greedy; the others are drawn."""

    remote = False

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
        return [Reply(r.text, len(r.tokens), cut=not r.finished, probability=r.logprobs.min().exp().item())
                for (r,) in groups]


class Memo:
    """Caches an Expert's replies. A cached reply, also one from the disk, is charged in full: each method's
    cost is what it would be if it ran alone. Several threads may ask at once, each other things."""

    def __init__(self, expert):
        self.expert, self.replies, self.remote = expert, {}, getattr(expert, "remote", False)

    def ask(self, turns, attempt=0):
        """As the Expert's."""
        keys = [(attempt, prompt, *(zlib.crc32(p.tobytes()) for p in pictures)) for pictures, prompt in turns]
        new = {key: turn for key, turn in zip(keys, turns) if key not in self.replies}
        replies = self.expert.ask(list(new.values()), attempt) if new else []
        self.replies |= {key: replace(reply, cached=False) for key, reply in zip(new, replies)}
        return [self.replies[key] for key in keys]


class ServerExpert:
    """An Expert behind a Server. The first attempt is at temperature 0, the others at 1."""

    remote = True

    def __init__(self, server: Server, max_new_tokens=256):
        self.server, self.max_new_tokens = server, max_new_tokens

    def ask(self, turns, attempt=0):
        """[(pictures, prompt), ...] -> list of Reply, several requests at once."""
        return at_once(lambda turn: self._one(*turn, attempt), turns, self.server.workers)

    def _one(self, pictures, prompt, attempt):
        try:
            answer = self.server.chat(pictures, prompt, self._read, attempt, self.max_new_tokens,
                                      temperature=float(attempt > 0))
        except ServerError as error:
            return Reply(error=str(error), final=True, prompt_tokens=0, requests=error.requests,
                         failed=error.kind != "refused")
        text, tokens, prompt_tokens, is_cut, silence = answer.value
        return Reply(text, tokens, answer.cached, prompt_tokens=prompt_tokens, requests=answer.requests,
                     cut=is_cut, silence=silence, forget=answer.forget)

    def _read(self, reply):
        text, is_cut, silence = read_choice(self.server, reply["choices"][0])
        usage = reply.get("usage") if isinstance(reply.get("usage"), dict) else {}
        details = usage.get("completion_tokens_details")
        if isinstance(details, dict) and _count(details.get("reasoning_tokens")):
            self.server.dialect.thinks = True
        counts = _count(usage.get("completion_tokens")), _count(usage.get("prompt_tokens"))
        return text, *counts, is_cut, silence


def _count(number):
    """A count of tokens as a server gives it, or None."""
    return number if isinstance(number, int) and not isinstance(number,
                                                                bool) and 0 <= number < 10**7 else None


REFUSALS = ("content_filter", "safety", "recitation", "prohibited_content", "blocklist", "spii", "refusal")


def read_choice(server, choice):
    """One of a reply's choices -> (its text without thoughts, whether it was cut, why it says nothing or "").
    Raises what `Server.chat` expects."""
    message = choice.get("message") or {}
    reason = str(choice.get("finish_reason") or choice.get("native_finish_reason") or "").lower()
    content, is_cut = message.get("content"), reason in ("length", "max_tokens", "max_output_tokens")
    if isinstance(content, (list, dict)):   # parts; those of another type are thoughts
        pieces = content if isinstance(content, list) else [content]
        content = "".join(piece if isinstance(piece, str) else piece.get("text") or "" for piece in pieces
                          if isinstance(piece, str) or piece.get("type", "text") in ("text", "output_text"))
    thoughts = message.get("reasoning_content") or message.get("reasoning") or message.get("thinking")
    text, is_tagged, is_unfinished = (without_thoughts(content) if isinstance(content, str)
                                      else ("", False, False))
    if thoughts or is_tagged:
        # Where it was cut, `chat` makes room and says so.
        server.dialect.thinks = server.dialect.thinks or not is_cut
    if text.strip():
        return text, is_cut, ""
    if message.get("refusal") or reason in REFUSALS:
        refusal = message.get("refusal")
        words = refusal if isinstance(refusal, str) else f"finish_reason {reason}"
        raise ServerError(server.sentence(f"refuses to answer this question: {words[:200]!r}"), "refused")
    if is_unfinished or (is_cut and (thoughts or not content)):
        raise Cut
    body = f"--{server.flag}_body"
    if message.get("tool_calls") or message.get("function_call"):
        return "", is_cut, f"""it calls a tool and says nothing; try {body} '{{"tool_choice": "none"}}'"""
    if thoughts or is_tagged:
        return "", is_cut, f"all its words are in its reasoning; {body} may switch that off"
    if not isinstance(content, str):
        raise TypeError(f"choices[0].message.content is no text, finish_reason {reason or 'unknown'}")
    return "", is_cut, "an empty reply"


# ----------------------------------------------------------------------------------------------------------
# The base model behind a server

class _OneByOne(Exception):
    """The server gives fewer answers than were asked for."""


class ServerVLM:
    """The base model behind a Server (vLLM and others): `sample` as that of VLM. C is read from `logprobs`
    with `top_logprobs` = 20; a Rollout's token ids are unknown, -1 each.

    A completion that is empty or whose numbers make no sense is a Rollout without words and without
    confidence: unanswered. A question that failed is n of those; their `failure` says why.

    rollout: the class of what `sample` returns, `vlm.Rollout`.
    """

    def __init__(self, server: Server, rollout):
        self.server, self.rollout, self.warned, self.gave_logprobs = server, rollout, set(), False
        self.few = ""               # what it did when it was asked for several answers

    def sample(self, images, prompts, n=1, *, max_new_tokens=256, temperature=1.0, top_k=0, greedy=False,
               seed=0,
               first=0):
        """As VLM.sample. top_k travels as vLLM's parameter of that name. Raises ServerError when no question
        was served."""
        seeds = seed if isinstance(seed, (list, tuple)) else [f"{seed} {b}" for b in range(len(prompts))]
        options = {"temperature": 0.0 if greedy else temperature, "logprobs": True,
                   "top_logprobs": ALTERNATIVES,
                   **({"top_k": top_k} if top_k else {})}

        def ask(i, count, sample=""):
            seed = "greedy" if greedy else f"{seeds[i]} {first}{sample}"

            def read(reply):
                if count > 1 and len(reply["choices"]) < count:
                    raise _OneByOne(f"{len(reply['choices'])} answers where {count} were asked for")
                return self._read(reply["choices"][:count])
            try:
                return self.server.chat(images[i], prompts[i], read, f"sample{sample}" if sample else 0,
                                        max_new_tokens,
                                        n=count, seed=random.Random(seed).getrandbits(31), **options).value
            except ServerError as error:
                return error

        def together(i):
            if n > 1 and "n" in self.server.dialect.dropped:
                return None
            try:
                return ask(i, n)
            except _OneByOne as error:
                self.few = f"; it gave {error}"
                self.server.dialect.drop("n")
                return None

        groups = at_once(together, range(len(prompts)), self.server.workers)
        single = [(i, j) for i, group in enumerate(groups) if group is None for j in range(n)]
        replies = dict(zip(single,
                           at_once(lambda pair: ask(pair[0], 1, f" {pair[1]}"), single, self.server.workers)))
        for i in {i for i, _ in single}:
            samples = [replies[i, j] for j in range(n)]
            failed = [s for s in samples if isinstance(s, ServerError) and s.kind != "refused"]
            groups[i] = failed[0] if failed else [self._unanswered(s) if isinstance(s, ServerError) else s[0]
                                                  for s in samples]
        failures = [group for group in groups if isinstance(group, ServerError) and group.kind != "refused"]
        if failures and len(failures) == len(prompts):
            raise ServerError(f"{failures[0]}{self.few}; what was done is kept, the same command goes on",
                              failures[0].kind)
        return [self.unanswered(n, group) if isinstance(group, ServerError) else group for group in groups]

    def unanswered(self, n, failure):
        """n Rollouts without words, of a question that failed."""
        return [self._unanswered(failure) for _ in range(n)]

    def _unanswered(self, failure=None):
        return self.rollout("", torch.tensor([-1]), torch.tensor([-100.0]), torch.zeros(1), False,
                            failure=failure)

    def _read(self, choices, had_room=False):
        """A reply's choices -> list of Rollout. Raises ServerError, KeyError, TypeError or ValueError where
        logprobs are missing, and Cut where thoughts need more room."""
        try:
            completions = [self._completion(choice, had_room) for choice in choices]
        except Cut:
            raise Cut(lambda: self._read(choices, True)) from None
        tops = [token for completion in completions if completion.usable
                for token in completion.tops if token]
        # k alternatives of every token: a mean over more of them would be on another scale
        k = min(map(len, tops), default=0)
        numbers = sorted((sum(x is not None for x in token[:k]) for token in tops), reverse=True)
        if numbers and numbers[len(numbers) // 2] < k:      # most tokens lack some
            k = numbers[len(numbers) // 2]
        if tops and 0 < k < ALTERNATIVES and k not in self.warned:
            self.warned.add(k)
            self.server.say(f"gives {k} top_logprobs where {ALTERNATIVES} were asked for: C is read from "
                            f"those, on another "
                            "scale")
        return [self._rollout(completion, k) for completion in completions]

    def _completion(self, choice, had_room):
        """One of a reply's choices -> Completion. had_room: for its thoughts."""
        try:
            text, _, silence = read_choice(self.server, choice)
            is_odd, sentence = silence not in ("", "an empty reply"), self.server.sentence
            failure = ServerError(sentence(f"says nothing: {silence}"), "refused") if is_odd else None
        except Cut:
            if not had_room:
                raise                   # `chat` makes room for its thoughts
            text, failure = "", ServerError(self.server.sentence(
                "was cut before it answered", "raise --max_new_tokens or --thinking_tokens"), "refused")
        except TypeError:
            text, failure = "", None
        except ServerError as error:
            text, failure = "", error
        if failure:
            return Completion(failure=failure)
        logprobs = choice.get("logprobs") or {}
        content = logprobs.get("content") if isinstance(logprobs, dict) else None
        if content is None:
            raise ServerError(self.server.sentence(
                "gives no logprobs", "a base model's server must return logprobs and top_logprobs; choose "
                                     "another with --model"
                ), "temporary" if self.gave_logprobs else "run")
        self.gave_logprobs = self.gave_logprobs or bool(content)
        if content and 2 * sum(not token.get("top_logprobs") for token in content) >= len(content):
            raise ValueError("no top_logprobs")
        try:
            logprobs = [_logprob(token["logprob"]) for token in content]
            tops = [[_logprob(top["logprob"]) for top in token["top_logprobs"] or []] for token in content]
        except OverflowError:
            return Completion()
        if content and 2 * sum(x is None for x in logprobs) >= len(logprobs):
            raise ValueError("half of its logprobs are missing")
        text = text.encode(errors="replace").decode()                   # JSON may hold half a character
        return Completion(text, logprobs, tops, choice.get("finish_reason") == "stop", bool(text and content))

    def _rollout(self, completion, k):
        full = [[x for x in token if x is not None][:k] for token in completion.tops]
        confidences = [-math.fsum(token) / k if k and len(token) == k else None for token in full]
        present = [c for c in confidences if c is not None]
        if not completion.usable or not present:
            return self._unanswered(completion.failure)
        return self.rollout(completion.text, torch.full((len(confidences),), -1),
                            _filled(completion.logprobs),
                            _filled(confidences), completion.finished)


@dataclass
class Completion:
    """A choice of a base model's server: logprobs a token and of its alternatives, None where the server
    knows none."""
    text: str = ""
    logprobs: list = field(default_factory=list)
    tops: list = field(default_factory=list)
    finished: bool = False
    usable: bool = False
    failure: ServerError | None = None


def _logprob(value):
    """A log-prob as a server gives it -> float, or None where it stands for "unknown". OverflowError where it
    is neither."""
    try:
        number = -math.inf if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise OverflowError("no number") from error
    if math.isnan(number) or number > 1e-3 or -math.inf < number < -1e4:
        raise OverflowError("no log-prob")
    return None if number <= SENTINEL else number


def _filled(values):
    """Numbers of a completion's tokens -> tensor (T,); what is missing takes the mean of the others."""
    present = [value for value in values if value is not None]
    mean = math.fsum(present) / len(present)
    return torch.tensor([mean if value is None else value for value in values])



# ----------------------------------------------------------------------------------------------------------
# The Expert's roles

@dataclass
class RoleReply:
    """What came of one role for one question. value: parsed, None where it abstains; text: the reply;
    probability: see Reply; reason: why it abstains; failed: because of the server; costs: one dict for each
    request, for the ledger."""
    value: object = None
    text: str = ""
    probability: float = 1.0
    reason: str = ""
    failed: bool = False
    costs: list = field(default_factory=list)


def ask_role(expert, states, make_prompt, parse):
    """Ask the Expert about every question -> list of RoleReply. Changes no state, so that several roles can
    be asked at once.

    parse(state, text): raises ValueError for a reply that cannot be read; that one is asked for again,
    ATTEMPTS times in all.
    """
    outcomes, pending = [RoleReply() for _ in states], list(range(len(states)))
    prompts = [make_prompt(state) for state in states]
    for attempt in range(ATTEMPTS):
        replies = expert.ask([(states[i].pictures, prompts[i]) for i in pending], attempt)
        to_retry = []
        for i, reply in zip(pending, replies):
            outcome = outcomes[i]
            outcome.costs.append(reply.costs())
            # JSON may hold half a character.
            text, _, is_unfinished = without_thoughts(reply.text.encode(errors="replace").decode())
            try:
                if reply.error:
                    raise ValueError(reply.error)
                if reply.silence or (is_unfinished and not text):
                    raise ValueError(reply.silence or "nothing but thoughts")
                outcome.value, outcome.text, outcome.reason = parse(states[i], text), text, ""
                outcome.probability = reply.probability
            except ValueError as error:
                reply.forget()
                outcome.reason, outcome.failed = str(error), reply.failed
                if not reply.error:
                    outcome.reason += "; its reply was cut, raise --expert_tokens" if reply.cut else ""
                    outcome.reason += f"; it began {' '.join(text.split())[:60]!r}" if text.strip() else ""
                if not reply.final:
                    to_retry.append(i)
        pending = to_retry
        if not pending:
            break
    return outcomes


def record_role(role, states, outcomes):
    """Write what came of a role into its questions' results -> list of values, None where it abstains."""
    for state, outcome in zip(states, outcomes):
        for costs in outcome.costs:
            state.result.ledger.add(role, **costs)
        if outcome.value is not None:
            state.result.texts[role] = outcome.text[:MAX_CRITIQUE]
            state.result.probabilities[role] = outcome.probability
            continue
        state.result.ledger.notes.append(f"{role} abstained: {outcome.reason}")
        if outcome.failed:
            state.result.open[role] = outcome.reason
    return [outcome.value for outcome in outcomes]


def consult(expert, role, states, make_prompt, parse):
    """A generator: ask the Expert in a role about every question -> what `parse(state, text)` made of each
    reply, None where it abstains. A server's reply is waited for.

    Every request goes into the ledger. A server's failure goes into `open` of the question's result.
    """
    if getattr(expert, "remote", False) and states:
        outcomes = yield from waited(in_background(ask_role, expert, states, make_prompt, parse))
    else:
        outcomes = ask_role(expert, states, make_prompt, parse) if states else []
    return record_role(role, states, outcomes)


def sample_from(vlm, pictures, prompts, n=1, **how):
    """A generator: `vlm.sample`. A server's reply is waited for. Where it fails on these questions alone,
    there are Rollouts that say so. Raises ServerError where it is down."""
    if not isinstance(vlm, ServerVLM):
        return vlm.sample(pictures, prompts, n, **how)
    try:
        return (yield from waited(in_background(lambda: vlm.sample(pictures, prompts, n, **how))))
    except ServerError as error:
        if error.kind == "run" or vlm.server.pace.down:
            raise
        return [vlm.unanswered(n, error) for _ in prompts]


def batches_in_flight(batch_size, *models):
    """How many batches to have under way so that no server waits for the base, nor the base for a server
    (int)."""
    workers = [model.server.workers for model in models if hasattr(model, "server")]
    return 2 + math.ceil(max(workers) / batch_size) if workers else 1

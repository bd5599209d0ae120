"""CA-TTS: calibrated confidence steers test-time compute (paper 3.3, Eq. 5-10).

    python catts.py photo.png "How many red circles are there?"               # the built-in base and expert
    python catts.py --data questions.jsonl --output results.jsonl             # many; resumes; torchrun splits them
    python catts.py photo.png "..." --model Qwen/Qwen2.5-VL-7B-Instruct \
        --expert https://host/v1 --expert_model NAME                          # key: EXPERT_API_KEY

One vote table over answers, which are merged by equivalence. N samples vote, weighted by confidence. Then three modules
add their votes: Self-Consistency asks the Expert as Voter (Eq. 6-7), Self-Reflection the Expert as Critic, and the base
answers again (Eq. 8), Visual Self-Check decodes against the noised picture (Eq. 9). The Expert as Planner orders them. The
Critic and the Voter see what the *samples* said, so that modules commute: the order changes the cost, never the votes.

The paper's confidence is mean C; where it is silent about a failing Expert we decide: a role that fails casts no vote, and
the ledger says so. Left out on purpose: streaming, and an Expert that sees the samples' reasoning.
"""
import argparse
import math
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

import data
import noise
from data import MODULES, Sample
from reward import sequence_confidence
from utils import cli, distributed
from utils.cli import InputError, add_options, add_sources, command, names_in, option
from utils.experts import (
    LocalExpert,
    ServerExpert,
    ServerVLM,
    in_background,
    parse_critique,
    parse_order,
    parse_probabilities,
    record_role,
    start_role,
)
from utils.formats import LETTERS
from utils.judge import accepts, equivalent, extract_answer
from utils.results_file import (
    Ledger,
    answer_file,
    ask_consent,
    average,
    describe,
    failures,
    frame_of,
    is_open,
    read_threshold,
    run_through,
    sources_of,
    timed,
    waited,
)
from utils.server import Server, ServerError, is_url
from vlm import VLM, Rollout

STILL_OPEN = 3                  # exit code where a server failed and questions wait for the same command
TIE = 1e-9                      # totals closer than this are equal; the samples' order then decides


@dataclass
class Settings:
    """How a question is answered. Defaults: the paper's, where it gives them."""
    samples: int = option(8, "answers drawn, N")
    temperature: float = option(1.0, "of the samples")
    top_k: int = option(40, "tokens the samples are drawn from; 0 = all")
    max_new_tokens: int = option(64, "longest answer of the base model")
    reading: str = option("mean", "of a sample's confidence (DeepConf)", ("mean", "tail", "bottom", "min"))
    window: int = option(32, "tokens of a window: tail, bottom and min")
    weight: str = option("confidence", "of a sample's vote: C, C ** power, softmax(C / softness), its probability "
                         "exp(mean log-prob), or 1", ("confidence", "power", "softmax", "probability", "equal"))
    power: float = option(2.0, "exponent of --weight power")
    softness: float = option(1.0, "temperature of --weight softmax, nats")
    top_share: float = option(1.0, "share of the samples, the most confident, that vote (DeepConf's filter)")
    modules: str = option(",".join(MODULES), "which modules run, separated by commas; '' = samples only")
    tau1: float = option(0.5, "weight of the Voter")
    tau2: float = option(0.5, "weight of Self-Reflection")
    tau3: float = option(0.5, "weight of Visual Self-Check")
    order: str = option("auto", "of the modules: planner (asks the Expert), a list separated by commas, or auto: planner, but "
                        "cheapest first under --early_exit exact, where the order changes nothing but the cost")
    early_exit: str = option("off", "exact: stop when nothing left can change the answer; gate: when the samples' "
                             "winner holds --gate of their votes", ("off", "exact", "gate"))
    gate: float = option(0.9, "share of the samples' votes that --early_exit gate asks for")
    check_alpha: float = option(0.5, "contrast of Visual Self-Check")
    check_beta: float = option(0.1, "its plausibility cut")
    noise_t: str = option("999", "diffusion step of its noised picture")
    region: str = option("key", "where that noise goes", noise.MODES)
    mass: float = option(0.5, "share of CLIP's attention that the key region holds")
    expert_tokens: int = option(256, "longest reply of the Expert")
    abstain: str = option("", "answer \"I don't know\" below this confidence: a number, or a file written by eval.py")
    seed: int = option(0, "decides samples and noise")

    def check(self):
        """Refuse what cannot work, in a sentence; returns the modules that run, in the table's order."""
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"--{name} is {value}; a finite number is expected")
        for name, low in (("samples", 1), ("max_new_tokens", 1), ("window", 1), ("expert_tokens", 1), ("top_k", 0),
                          ("tau1", 0), ("tau2", 0), ("tau3", 0), ("check_alpha", 0)):
            if not getattr(self, name) >= low:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least {low}")
        for name in ("temperature", "softness", "power"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be above 0")
        for name in ("top_share", "mass", "gate"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"--{name} is {getattr(self, name)}; a number above 0 and at most 1 is expected")
        if not 0 <= self.check_beta <= 1:
            raise InputError(f"--check_beta is {self.check_beta}; a number from 0 to 1 is expected")
        noise.parse_t(self.noise_t)
        for name in ("modules",) if self.order in ("auto", "planner") else ("modules", "order"):
            named = names_in(getattr(self, name))
            if len(set(named)) != len(named) or not set(named) <= set(MODULES):
                raise InputError(f"--{name} is {getattr(self, name)!r}; some of {', '.join(MODULES)} are expected, each once")
        chosen = names_in(self.modules)
        if self.order not in ("auto", "planner") and not set(chosen) <= set(names_in(self.order)):
            raise InputError(f"--order is {self.order!r}; it must name every module that runs: {self.modules}")
        return [module for module in MODULES if module in chosen]

    def taus(self):
        """What each source's vote weighs."""
        return {"samples": 1.0, "voter": self.tau1, "self_reflection": self.tau2, "self_check": self.tau3}


# Votes are counted in this order, whatever order they were cast in.
SOURCES = ("samples", "voter", "self_reflection", "self_check")
# The module behind each source; the samples need none.
SOURCE = {"self_consistency": "voter", "self_reflection": "self_reflection", "self_check": "self_check"}


@dataclass
class Vote:
    """source: one of SOURCES; share: of that source's vote, in [0, 1], before its tau."""
    source: str
    answer: str
    share: float


@dataclass
class Row:
    """One answer of the table: its share of each source's vote, and the total, weighted by tau."""
    answer: str
    shares: dict
    total: float = 0.0


def sample_weights(confidences, probabilities, settings):
    """N confidences (any reals) and probabilities -> N weights >= 0 that sum to 1 (Eq. 5); 0 = dropped by the filter."""
    c = torch.tensor(confidences, dtype=torch.float64)
    positive = c.clamp(min=0)
    weights = {"confidence": lambda: positive, "power": lambda: (positive / positive.max().clamp(min=1e-9)) ** settings.power,
               "softmax": lambda: (c / settings.softness).softmax(0),
               "probability": lambda: torch.tensor(probabilities, dtype=torch.float64),
               "equal": lambda: torch.ones_like(c)}[settings.weight]()
    kept = math.ceil(settings.top_share * len(c) - 1e-9)
    weights[c.argsort(descending=True, stable=True)[kept:]] = 0
    total = weights.sum()
    return (weights / total if total > 0 else torch.full_like(weights, 1 / len(c))).tolist()


def sample_votes(answers, confidences, probabilities, settings):
    """The samples' votes, normalised over those that gave an answer (Eq. 5) -> list of Vote."""
    votes = [Vote("samples", *pair) for pair in zip(answers, sample_weights(confidences, probabilities, settings))]
    votes = [vote for vote in votes if vote.answer is not None and vote.share > 0]
    total = sum(vote.share for vote in votes)
    return [Vote(vote.source, vote.answer, vote.share / total) for vote in votes]


def tally(votes, taus, choices=None):
    """Votes -> Rows; answers equal as values share a row, the first that takes them. The samples' favourite first, then as
    they came.

    taus: {source: weight}. The sums run over SOURCES, so that no order of casting changes a bit of them.
    """
    rows = []
    for source in SOURCES:
        for vote in votes:
            if vote.source == source:
                row = next((r for r in rows if equivalent(r.answer, vote.answer, choices)), None)
                if row is None:
                    rows.append(row := Row(vote.answer, {}))
                row.shares[source] = row.shares.get(source, 0.0) + vote.share
    for row in rows:
        row.total = sum(taus[source] * row.shares.get(source, 0.0) for source in SOURCES)
    return sorted(rows, key=lambda row: -row.shares.get("samples", 0.0))


def winner(rows):
    """The row with the highest total, the first of those that tie; None for an empty table."""
    best = max((row.total for row in rows), default=None)
    return next((row for row in rows if row.total >= best - TIE), None)


def share_of(row, rows):
    """V[answer] / sum V (Eq. 10) of a winner, in [0, 1]; 0 without one, or when nobody's vote weighs anything."""
    total = sum(r.total for r in rows)
    return row.total / total if row is not None and total > 0 else 0.0


def decided(rows, remaining, taus, threshold=None):
    """Whether no outcome of the remaining modules can change the winner: what makes `exact` lossless.

    A rival gains at most the tau of each module that remains, and from the Voter only where there is a choice: it divides
    its vote among the samples' answers. A rival may also be an answer that nobody has given yet. With a threshold, nor
    may the final confidence cross it.
    """
    leader = winner(rows)
    if leader is None or "samples" not in leader.shares:
        return False
    candidates = sum("samples" in row.shares for row in rows)
    single = sum(taus[SOURCE[module]] for module in remaining if module != "self_consistency")
    voter = taus["voter"] if "self_consistency" in remaining and candidates > 1 else 0.0
    place = rows.index(leader)
    for i, rival in enumerate([*rows, Row("", {})]):
        if rival is leader:
            continue
        gain = single + (voter if "samples" in rival.shares else 0.0)
        # A later rival loses a tie.
        if leader.total - rival.total < gain + (2 * TIE if i < place else -TIE / 2):
            return False
    if threshold is None:
        return True
    total, rest = sum(row.total for row in rows), sum(taus[SOURCE[module]] for module in remaining)
    return leader.total / (total + rest) >= threshold or (leader.total + rest) / (total + rest) < threshold


@dataclass
class Result:
    """answer: None when nobody gave one; confidence: V[answer] / sum V (Eq. 10), in [0, 1]; abstained: it lies below the
    threshold; correct: by the judge, None without a gold answer; order: of the modules; skipped: {module: why};
    said: {role: text}; open: {who: why} where a server failed, to be asked again; rollouts: the samples."""
    id: str
    answer: str | None = None
    confidence: float = 0.0
    abstained: bool = False
    correct: bool | None = None
    votes: list = field(default_factory=list)
    order: list = field(default_factory=list)
    skipped: dict = field(default_factory=dict)
    said: dict = field(default_factory=dict)
    open: dict = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    rollouts: list = field(default_factory=list)

    def by_source(self):
        """{source: [[answer, share], ...]} of the samples and of every module that ran, an empty list where it abstained."""
        ran = ["samples", *(SOURCE[module] for module in self.order if module not in self.skipped)]
        return {source: [[v.answer, v.share] for v in self.votes if v.source == source] for source in ran}

    def record(self, sample, window):
        """The line of results.jsonl: all of it, the question's frame, the samples with their confidence in every reading."""
        row = {name: value for name, value in vars(self).items() if name not in ("rollouts", "ledger", "votes")}
        row |= {"votes": self.by_source(), "ledger": asdict(self.ledger), "gold": sample.answer, "choices": sample.choices,
                "question": sample.question, "source": sample.source}
        row["meta"] = {key: value for key, value in sample.meta.items() if isinstance(value, (str, int, float))}
        row["samples"] = [spoken(r, sample, window) for r in self.rollouts]
        return row


def spoken(rollout, sample, window=32):
    """One Rollout as stored: its text, answer and verdict (None without gold), and its confidence in every reading."""
    answer = extract_answer(rollout.text, sample.choices)
    return {"text": rollout.text, "answer": answer, "tokens": len(rollout.tokens), "finished": rollout.finished,
            "correct": None if sample.answer is None else accepts(answer, sample),
            "logprob": rollout.logprobs.mean().item(),
            "confidence": {reading: confidence_of(rollout, reading, window) for reading in ("mean", "tail", "bottom", "min")}}


@dataclass
class Turn:
    """A question under way."""
    sample: Sample
    pictures: list
    result: Result
    stopped: str = ""           # why nothing more is asked


def confidence_of(rollout, reading, window):
    """One reading of a Rollout's confidence (float)."""
    return sequence_confidence(rollout.confidences[None], torch.ones(1, len(rollout.confidences)), reading, window).item()


class Controller:
    """CA-TTS for one base model and one Expert.

    vlm: a VLM, or a ServerVLM. expert: None = the base plays the roles itself; else something with `ask`. checker: the
    VLM of Visual Self-Check, default vlm; without one (vlm is a server) that module is skipped. clip: finds its region.
    """

    def __init__(self, vlm, expert=None, clip=None, settings=None, checker=None):
        self.vlm, self.settings = vlm, settings or Settings()
        self.modules = self.settings.check()
        itself = ServerExpert(vlm.server, self.settings.expert_tokens) if isinstance(vlm, ServerVLM) else LocalExpert(
            vlm, self.settings.expert_tokens)
        self.expert = expert or itself
        self.checker = checker or (None if isinstance(vlm, ServerVLM) else vlm)
        self.clip, self.threshold = clip, read_threshold(self.settings)
        if "self_check" in self.modules and self.checker is not None and self.settings.region != "all" and clip is None:
            self.clip = noise.ClipAttention.from_pretrained()
        self.taus = self.settings.taus()

    def answer(self, sample):
        """One data.Sample -> Result."""
        return self.answer_all([sample])[0]

    def answer_all(self, samples, rollouts=None):
        """A batch of samples -> list of Result. A result does not depend on the rest of its batch.

        rollouts: what was drawn for each sample earlier, N Rollouts each; then nothing is drawn.
        """
        return run_through(self.steps(samples, rollouts))

    def steps(self, samples, rollouts=None, expert=None):
        """`answer_all` as a generator, which yields each Future of a server that it waits for and returns the
        results.

        Without early exit every role is asked as soon as its prompt is there: the Planner before the samples,
        Critic and Voter together. While they travel, the base goes on. Votes are cast in one order, so that
        no reply's speed matters.
        """
        expert = expert or self.expert
        turns = [Turn(sample, sample.pictures(), Result(sample.id)) for sample in samples]
        planner = self._start_planner(turns, expert) if self.settings.early_exit == "off" else None
        if rollouts is None:
            yield from self._draw(turns)
        for turn, given in zip(turns, rollouts or []):
            turn.result.rollouts = list(given)
            turn.result.votes = self._sample_votes(turn)
            self._charge(turn, "samples", turn.result.rollouts)
        pending = self._pending(turns, self.modules)
        planner = planner or self._start_planner(pending, expert)
        if self.settings.early_exit != "exact":
            roles = [module for module in ("self_reflection", "self_consistency") if module in self.modules
                     and pending]
            started = {module: getattr(self, f"_start_{module}")(pending, expert) for module in roles}
            if "self_check" in self.modules and pending:
                self._self_check(pending)
            yield from self._plan(pending, planner)
            for module in roles:                            # the base answers again while Voters travel
                yield from getattr(self, f"_{module}")(*started[module])
        else:
            yield from self._plan(pending, planner)
            for place in range(len(self.modules)):
                for module in self.modules:
                    batch = [turn for turn in pending if turn.result.order[place] == module]
                    if batch and module == "self_check":
                        self._self_check(batch)
                    elif batch:
                        yield from getattr(self,
                                           f"_{module}")(*getattr(self, f"_start_{module}")(batch, expert))
                pending = self._pending(pending, None, place + 1)
        for turn in turns:
            self._conclude(turn)
        return [turn.result for turn in turns]

    def sample(self, pictures, prompts, n=1, **how):
        """`vlm.sample`. Where a server fails on these questions alone, Rollouts that say so; InputError where
        it is down."""
        try:
            return self.vlm.sample(pictures, prompts, n, **how)
        except ServerError as error:
            if error.kind == "run" or self.vlm.server.pace.down:
                raise
            return [self.vlm.unanswered(n, error) for _ in prompts]

    def sampling(self, turns, prompts, n=1, **how):
        """`sample` for turns, as a generator: a local model works at once, a server's reply is waited for."""
        pictures = [turn.pictures for turn in turns]
        if isinstance(self.vlm, ServerVLM):
            return (yield from waited(in_background(lambda: self.sample(pictures, prompts, n, **how)), turns))
        with timed(turns):
            return self.sample(pictures, prompts, n, **how)

    def batches_in_flight(self, batch_size):
        """How many batches to have under way so that no server waits for the base, nor the base for a server
        (int)."""
        servers = [who.server for who in (self.expert, self.vlm) if hasattr(who, "server")]
        return 2 + math.ceil(max(server.workers for server in servers) / batch_size) if servers else 1

    def calls_a_question(self):
        """{"Expert" or "base": (calls of its server for one question at most, longest reply in tokens)}."""
        calls, reflects = {}, "self_reflection" in self.modules
        if getattr(self.expert, "remote", False):
            planned = self.settings.order in ("auto", "planner") and len(self.modules) > 1
            calls["Expert"] = (planned + reflects + ("self_consistency" in self.modules),
                               self.settings.expert_tokens)
        if isinstance(self.vlm, ServerVLM):
            calls["base"] = (1 + reflects, self.settings.max_new_tokens * self.settings.samples)
        return calls

    def _rows(self, turn, only_samples=False):
        votes = [v for v in turn.result.votes if v.source == "samples" or not only_samples]
        return tally(votes, self.taus, turn.sample.choices)

    def _pending(self, turns, modules, place=0):
        """The turns that go on; the others note why. modules: what remains, default: the rest of each turn's order."""
        going = []
        for turn in turns:
            rest, rows = modules if modules is not None else turn.result.order[place:], self._rows(turn)
            share = rows[0].shares.get("samples", 0.0) if rows else 0.0
            if not turn.stopped and self.settings.early_exit == "exact" and decided(
                    rows, rest, self.taus, self.threshold):
                turn.stopped = "nothing left could change the answer"
            elif self.settings.early_exit == "gate" and share >= self.settings.gate - TIE:
                turn.stopped = f"the samples' winner holds {share:.2f} of their votes"
            if turn.stopped:
                turn.result.skipped |= {module: turn.stopped for module in rest}
            elif rest:
                going.append(turn)
        return going

    def _charge(self, turn, source, rollouts, views=1):
        """Base-model work on one question: a prefill a view, then a forward pass a view for every further token."""
        rollouts = [rollout for rollout in rollouts if rollout.failure is None]
        if not rollouts:
            return
        turn.result.ledger.add(source, tokens=sum(len(r.tokens) for r in rollouts),
                               forward_passes=views * max(len(r.tokens) for r in rollouts),
                               image_encodings=views * len(turn.pictures))

    def _seed(self, turn):
        return f"{self.settings.seed} {turn.sample.id}"

    # ---- The samples (Eq. 5)

    def _draw(self, turns):
        """Draw N samples a question, in one go, or under `exact` in rounds that stop once the rest cannot matter."""
        pending = list(turns)
        while pending:
            rounds = {}                 # questions that draw the same number, after the same number, are drawn together
            for turn in pending:
                rounds.setdefault((self._round(turn), len(turn.result.rollouts)), []).append(turn)
            for (size, first), part in rounds.items():
                groups = yield from self.sampling(
                    part, [data.prompt(t.sample) for t in part], size,
                    max_new_tokens=self.settings.max_new_tokens,
                    first=first, temperature=self.settings.temperature, top_k=self.settings.top_k,
                    seed=[self._seed(t) for t in part])
                for turn, group in zip(part, groups):
                    turn.result.rollouts += group
                    turn.result.votes = self._sample_votes(turn)
                    self._charge(turn, "samples", group)
            pending = [turn for turn in pending if self._round(turn)]
        for turn in turns:
            if len(turn.result.rollouts) < self.settings.samples:
                turn.stopped = f"{len(turn.result.rollouts)} samples settled it"

    def _sample_votes(self, turn):
        rollouts, settings = turn.result.rollouts, self.settings
        return sample_votes([extract_answer(r.text, turn.sample.choices) for r in rollouts],
                            [confidence_of(r, settings.reading, settings.window) for r in rollouts],
                            [r.logprobs.mean().exp().item() for r in rollouts], settings)

    def _round(self, turn):
        """How many samples to draw next; 0 = enough.

        `exact` may stop early only where a sample's weight has an upper bound, 1, whatever it will say: weights
        `probability` and `equal`, no filter, no threshold. Then the least number is drawn that could settle it at best.
        A server draws all at once: what it says under one seed depends on how many are asked for.
        """
        settings, drawn = self.settings, len(turn.result.rollouts)
        left = settings.samples - drawn
        if (settings.early_exit != "exact" or settings.weight not in ("probability", "equal") or settings.top_share < 1
                or self.threshold is not None or isinstance(self.vlm, ServerVLM)):
            return left
        gain = sum(self.taus[SOURCE[module]] for module in self.modules)
        mass = sum(1.0 if settings.weight == "equal" else r.logprobs.mean().exp().item() for r in turn.result.rollouts
                   if extract_answer(r.text, turn.sample.choices) is not None)
        shares = [row.shares["samples"] * mass for row in self._rows(turn)] + [0.0, 0.0]
        for extra in range(left):
            worst = left - extra            # the rest, all for one rival, each with the largest weight
            if (shares[0] + extra - shares[1] - worst) / (mass + extra + worst) > gain + TIE:
                return extra
        return left

    # ---- The modules

    def _start_planner(self, turns, expert):
        """Expert as Planner, on its way -> (turns, Future), or None where nobody is asked."""
        auto = self.settings.order == "auto" and self.settings.early_exit != "exact"
        if not (auto or self.settings.order == "planner") or len(self.modules) < 2 or not turns:
            return None
        return turns, start_role(expert, turns, lambda t: data.planner_prompt(t.sample),
                                 lambda _, text: parse_order(text, MODULES))

    def _plan(self, turns, planner):
        """The order of the modules: the Planner's, or the one of the settings."""
        order = self.settings.order
        if order == "auto" and self.settings.early_exit == "exact":
            order = "self_check,self_consistency,self_reflection"       # no Expert; one call; a call and another answer
        plans = {}
        if planner:
            replies = yield from waited(planner[1], planner[0])
            plans = dict(zip(map(id, planner[0]), record_role("planner", planner[0], replies)))
        fixed = MODULES if order in ("auto", "planner") else names_in(order)
        for turn in turns:
            turn.result.order = [module for module in plans.get(id(turn)) or fixed if module in self.modules]

    def _start_self_consistency(self, turns, expert):
        """Expert as Voter, on its way -> what `_self_consistency` takes."""
        candidates = {id(turn): [row.answer for row in self._rows(turn, True)] for turn in turns}
        voters = self._with_answers(turns, "voter")
        return voters, candidates, start_role(
            expert, voters, lambda t: data.voter_prompt(t.sample, candidates[id(t)]),
            lambda t, text: parse_probabilities(text, len(candidates[id(t)]), candidates[id(t)]))

    def _self_consistency(self, turns, candidates, voter):
        """Expert as Voter (Eq. 6, 7): V[k] += tau1 c_k over the samples' answers."""
        shares = record_role("voter", turns, (yield from waited(voter, turns)))
        for turn, probabilities in zip(turns, shares):
            turn.result.votes += [Vote("voter", *pair)
                                  for pair in zip(candidates[id(turn)], probabilities or [])]

    def _start_self_reflection(self, turns, expert):
        """Expert as Critic, on its way -> what `_self_reflection` takes."""
        criticised = self._with_answers(turns, "critic")
        current = {id(turn): self._rows(turn, True)[0].answer for turn in criticised}
        return criticised, current, start_role(expert, criticised,
                                               lambda t: data.critic_prompt(t.sample, current[id(t)]),
                                               lambda _, text: parse_critique(text))

    def _self_reflection(self, turns, current, critic):
        """Expert as Critic; the base model answers again with the critique (Eq. 8): V[A_reflect] += tau2."""
        critiques = record_role("critic", turns, (yield from waited(critic, turns)))
        heard = [(turn, critique) for turn, critique in zip(turns, critiques) if critique is not None]
        if heard:
            groups = yield from self.sampling(
                [turn for turn, _ in heard],
                [data.reflect_prompt(turn.sample, current[id(turn)], critique) for turn, critique in heard],
                greedy=True, max_new_tokens=self.settings.max_new_tokens)
            for (turn, _), (rollout,) in zip(heard, groups):
                self._vote(turn, "self_reflection", rollout)

    def _self_check(self, turns):
        """Visual Self-Check (Eq. 9): contrast the picture with its noised twin: V[A_check] += tau3."""
        settings = self.settings
        if self.checker is None:
            for turn in turns:
                turn.result.skipped["self_check"] = "the base model is a server; --check_model names a local one"
            return
        images = [t.pictures for t in turns]
        with timed(turns):
            noised = noise.make_pairs(
                images, [t.sample.question for t in turns], self.clip, noise.parse_t(settings.noise_t),
                [settings.region] * len(turns), settings.mass, [self._seed(t) for t in turns])
            rollouts = self.checker.contrast(
                images, noised, [data.prompt(t.sample) for t in turns], alpha=settings.check_alpha,
                beta=settings.check_beta, max_new_tokens=settings.max_new_tokens)
        for turn, rollout in zip(turns, rollouts):
            self._vote(turn, "self_check", rollout, views=2)

    def _with_answers(self, turns, role):
        """The turns in which a sample gave an answer; the others have nothing to show to the Expert."""
        for turn in turns:
            if not turn.result.votes or turn.result.votes[0].source != "samples":
                turn.result.ledger.notes.append(f"{role} not asked: no sample gave an answer")
        return [turn for turn in turns if turn.result.votes and turn.result.votes[0].source == "samples"]

    def _vote(self, turn, source, rollout, views=1):
        self._charge(turn, source, [rollout], views)
        if rollout.failure is not None:
            self._note_failure(turn, source, rollout.failure)
            return
        turn.result.said[source] = rollout.text
        answer = extract_answer(rollout.text, turn.sample.choices)
        if answer is None:
            turn.result.ledger.notes.append(f"{source} gave no answer")
        else:
            turn.result.votes.append(Vote(source, answer, 1.0))

    def _note_failure(self, turn, who, failure):
        """A server gave no words: a refusal is noted, any other failure leaves the question open."""
        turn.result.ledger.notes.append(f"{who} gave no answer: {failure}")
        if failure.kind != "refused":
            turn.result.open[who] = str(failure)

    def _conclude(self, turn):
        rows, result = self._rows(turn), turn.result
        for failure in {str(r.failure): r.failure for r in result.rollouts if r.failure is not None}.values():
            self._note_failure(turn, "base", failure)
        best = winner(rows)
        if best is not None:
            result.answer, result.confidence = best.answer, share_of(best, rows)
        silent = sum(extract_answer(r.text, turn.sample.choices) is None for r in result.rollouts)
        if silent:
            result.ledger.notes.append(f"{silent} of {len(result.rollouts)} samples gave no answer")
        result.abstained = result.answer is None or (self.threshold is not None and result.confidence < self.threshold)
        if turn.sample.answer is not None:
            result.correct = accepts(result.answer, turn.sample)


def build(args, settings, model=None):
    """The Controller that the flags of `add_sources` describe; model: instead of --model. Raises InputError."""
    if args.batch_size < 1 or not 0 < args.timeout <= 1e6 or args.retries < 0:
        raise InputError(f"--batch_size {args.batch_size} and --timeout {args.timeout:g} must be above 0 (a time-out at most "
                         f"1e6), --retries {args.retries} not negative")
    if args.workers < 1 or not 0 <= args.patience <= 1e6 or args.max_side < 0 or args.thinking_tokens < 0:
        raise InputError(f"--workers {args.workers} must be at least 1; --patience {args.patience:g} (at "
                         f"most 1e6), --max_side "
                         f"{args.max_side} and --thinking_tokens {args.thinking_tokens} must not be negative")
    settings.check()
    read_threshold(settings, sources_of(args))
    model = model or args.model

    def server(url, name, flag):
        return Server(url, name, os.environ.get(f"{flag.upper()}_API_KEY") or None, args.timeout,
                      args.retries, args.cache,
                      workers=args.workers, patience=args.patience, max_side=args.max_side, flag=flag,
                      body=cli.json_object(f"--{flag}_body", getattr(args, f"{flag}_body")),
                      headers=cli.headers_in(f"--{flag}_header", getattr(args, f"{flag}_header")),
                      thinking_tokens=args.thinking_tokens)

    distributed.start_ranks()                      # before a model is loaded: each rank to a GPU of its own
    clip = noise.ClipAttention.from_pretrained(args.clip)
    vlm = ServerVLM(server(model, args.model_name, "model"), Rollout) if is_url(model) else VLM.load(model)
    expert = None
    if is_url(args.expert):
        expert = ServerExpert(server(args.expert, args.expert_model, "expert"), settings.expert_tokens)
    elif args.expert not in ("self", model):
        expert = LocalExpert(VLM.load(args.expert), settings.expert_tokens)
    return Controller(vlm, expert, clip, settings, VLM.load(args.check_model) if args.check_model else None)


def run(argv=None):
    parser = argparse.ArgumentParser(description="CA-TTS: answer with samples, an Expert, and votes.")
    parser.add_argument("image", nargs="?", help="a picture")
    parser.add_argument("question", nargs="?", help="a question about it")
    parser.add_argument("--choices", nargs="+", help="options of a multiple-choice question")
    parser.add_argument("--output", default="runs/catts/results.jsonl", help="file for the results of --data")
    parser.add_argument("--json", action="store_true", help="print the result, or the summary of --data, as JSON")
    add_sources(parser)
    add_options(parser, Settings)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    if (args.data is None) == (args.image is None) or (args.image is None) != (args.question is None):
        raise InputError("give either IMAGE and \"QUESTION\", or --data FILE")
    options = args.choices
    if options is not None and (not 2 <= len(options) <= len(LETTERS) or not all(o.strip() for o in options)
                                or len(set(options)) < len(options)):
        raise InputError(f"--choices {' '.join(map(repr, options))}: 2 to {len(LETTERS)} different options are expected")
    if args.data:
        samples = data.load(args.data, "test", args.limit, args.data_seed, args.strict)
    else:
        if not args.question.strip():
            raise InputError("the question is empty; give the words that ask for something in the picture")
        samples = [Sample(Path(args.image).name, [args.image], args.question.strip(), None, args.choices)]
        samples[0].pictures()
    controller = build(args, settings)
    if not args.data:
        result = controller.answer(samples[0])
        if args.json:
            print(cli.strict_json(result.record(samples[0], settings.window)))
        else:
            print(describe(result, tally(result.votes, controller.taus, args.choices), args.choices, controller.taus))
            print("next: python catts.py --data questions.jsonl --output results.jsonl        # many questions")
        if result.open:
            print(f"open: {'; '.join(result.open.values())}", file=sys.stderr)
            raise SystemExit(STILL_OPEN)
        return

    def answer_batch(batch):
        results = yield from controller.steps(batch)
        return [r.record(s, settings.window) for s, r in zip(batch, results)]

    # a threshold's file may change between a run and its continuation
    frame = frame_of(args, image=None, question=None, choices=None, abstain=str(controller.threshold))
    ask_consent(args, samples, controller.calls_a_question(), args.output)
    stored = answer_file(answer_batch, samples, args.output, frame, args.batch_size, strict=args.strict,
                         in_flight=controller.batches_in_flight(args.batch_size))
    if stored is not None:
        rows = [stored[name] for name in sorted({s.id for s in samples} & set(stored))]
        if not rows:
            raise InputError(f"no question of {args.data} could be answered; every picture is broken")
        if left_out := len(samples) - len(rows) + getattr(samples, "broken", 0):
            print(f"{left_out} questions left out", file=sys.stderr)
        closed, sentence = [row for row in rows if not is_open(row)], failures(rows)
        if args.json:
            summary = average(closed, args.expert_price) if closed else {"questions": 0}
            print(cli.strict_json(summary | {"open": len(rows) - len(closed)}))
        elif closed:
            print(cli.table({"mean of": average(closed, args.expert_price)}))
        if not args.json:
            print(f"wrote {args.output}")
        if sentence:
            print(sentence, file=sys.stderr)
            raise SystemExit(STILL_OPEN)
        if settings.early_exit == "off" and not args.json:
            exact = Path(args.output).with_name("exact.jsonl")
            command_line = shlex.join([*cli.public_args(argv), "--early_exit", "exact", "--output",
                                       str(exact)])
            print(f"next: python catts.py {command_line}        # the same answers, cheaper")


def main(argv=None):
    try:
        command("catts.py", lambda: run(argv))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

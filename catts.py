"""CA-TTS: calibrated confidence steers test-time compute (paper 3.3, Eq. 5-10).

    python catts.py photo.png "How many red circles are there?"          # the built-in base and Expert
    python catts.py --data questions.jsonl --output results.jsonl        # resumes; torchrun splits them
    python catts.py photo.png "..." --model Qwen/Qwen2.5-VL-7B-Instruct \
        --expert https://host/v1 --expert_model NAME                     # key: EXPERT_API_KEY

N samples vote, each with its confidence as weight (Eq. 5). Equal answers are merged. Three modules add votes:

- Self-Consistency: the Expert as Voter gives each candidate a probability (Eq. 6-7).
- Self-Reflection: the Expert as Critic comments on the favourite, and the base answers again (Eq. 8).
- Visual Self-Check: the base decodes against the noised picture (Eq. 9).

Critic and Voter see the samples' answers only, so the order of the modules changes the cost, never the votes.
The paper does not say what a failing Expert means. Here its role casts no vote, and the ledger says so. A
server that fails leaves the question open, and the same command asks again. While servers are waited for,
other questions go on: what may wait is a generator. With `--policy policy.json` evidence is bought where it
pays (policy.py). Left out on purpose: streaming.
"""
import utils.early  # noqa: F401  # isort: skip
import math
import sys
from dataclasses import dataclass

import torch

import data
import noise
from data import MODULES, Sample
from policy import Evidence, read_policy
from reward import sequence_confidence, window_confidence
from utils import answering, cli, replies, results_file
from utils.cli import InputError, names_in, option
from utils.experts import LocalExpert, ServerExpert, ServerVLM, consult, sample_from
from utils.judge import accepts, equivalent, extract_answer
from utils.model_defaults import fill_in
from utils.overlap import run_through, timed, together
from utils.results_file import SOURCE, SOURCES, Candidate, QuestionState, Result, Vote, read_threshold
from vlm import VLM, Rollout

TIE = 1e-9                      # totals closer than this are equal; the samples' order then decides
# Self-Check asks no Expert, the Voter is one call, Self-Reflection a call and another answer.
CHEAPEST_FIRST = "self_check,self_consistency,self_reflection"
PLANNERS = ("planner", "informed")
READINGS = ("mean", "tail", "bottom", "min")


@dataclass
class Settings:
    """How a question is answered. Defaults: the paper's, where it gives them."""
    samples: int = option(8, "answers drawn, N", least=1)
    temperature: float = option(1.0, "of the samples", above=0)
    top_k: int = option(40, "tokens the samples are drawn from; 0 = all", least=0)
    max_new_tokens: int = option(64, "longest answer of the base model", least=1)
    reading: str = option("mean", "of a sample's confidence (DeepConf)", READINGS)
    window: int = option(32, "tokens of a window: tail, bottom and min", least=1)
    weight: str = option("confidence", "of a sample's vote: C, its probability exp(mean log-prob), or 1",
                         ("confidence", "probability", "equal"))
    top_share: float = option(1.0, "share of the samples, the most confident, that vote (DeepConf's filter)",
                              above=0, most=1)
    modules: str = option(",".join(MODULES), "which modules run, separated by commas; '' = samples only")
    tau1: float = option(0.5, "weight of the Voter", least=0)
    tau2: float = option(0.5, "weight of Self-Reflection", least=0)
    tau3: float = option(0.5, "weight of Visual Self-Check", least=0)
    order: str = option("auto", "of the modules: names with commas; auto: cheapest first; planner: asks the "
                                "Expert, one more call; informed: which also sees the answers, their shares "
                                "and C, and may stop. Only the last changes a vote")
    early_exit: str = option("off", "exact: stop when nothing left can change the answer", ("off", "exact"))
    check_alpha: float = option(0.5, "contrast of Visual Self-Check", least=0)
    check_beta: float = option(0.1, "its plausibility cut", least=0, most=1)
    noise_t: str = option("999", "diffusion step of its noised picture")
    region: str = option("key", "where that noise goes", noise.MODES)
    mass: float = option(0.5, "share of CLIP's attention that the key region holds", above=0, most=1)
    expert_tokens: int = option(256, "longest reply of the Expert", least=1)
    policy: str = option("paper", "paper: every module, fixed weights; or a policy.json, fitted by eval.py")
    budget: float = option(0.0, "mean Expert calls a question of --policy FILE; 0 = as fitted", least=0)
    accuracy: float = option(0.0, "or the accuracy that it aims at; 0 = as fitted", least=0, below=1)
    risk: float = option(0.0, "it abstains so that at most this share of its answers is wrong; 0 = never",
                         least=0, below=1)
    abstain: str = option("", "answer \"I don't know\" below this confidence: a number, or a file of eval.py")
    seed: int = option(0, "decides samples and noise")

    def check(self):
        """Refuse what cannot work, in a sentence -> the modules that run, in the order of MODULES."""
        cli.check_bounds(self)
        noise.parse_t(self.noise_t)
        chosen, order = names_in(self.modules), names_in(self.order)
        if self.order in ("auto", *PLANNERS):
            order = MODULES
        for flag, names in (("modules", chosen), ("order", order)):
            if len(set(names)) != len(names) or not set(names) <= set(MODULES):
                raise InputError(f"--{flag} is {getattr(self, flag)!r}; some of {', '.join(MODULES)} are "
                                 "expected, each once")
        if not set(chosen) <= set(order):
            raise InputError(f"--order is {self.order!r}; it must name all of --modules {self.modules}")
        return [module for module in MODULES if module in chosen]

    def taus(self):
        """What each source's vote weighs."""
        return {"samples": 1.0, "voter": self.tau1, "self_reflection": self.tau2, "self_check": self.tau3}


# ---- The vote table

def sample_weights(confidences, probabilities, settings):
    """N confidences (any reals) and probabilities -> N weights that sum to 1 (Eq. 5); 0 = filtered out."""
    c = torch.tensor(confidences, dtype=torch.float64)
    if settings.weight == "confidence":
        weights = c.clamp(min=0)
    elif settings.weight == "probability":
        weights = torch.tensor(probabilities, dtype=torch.float64)
    else:
        weights = torch.ones_like(c)
    num_kept = len(c) - math.ceil((1 - settings.top_share) * (len(c) - 1) - 1e-9)  # above a percentile
    weights[c.argsort(descending=True, stable=True)[num_kept:]] = 0
    total = weights.sum()
    return (weights / total if total > 0 else torch.full_like(weights, 1 / len(c))).tolist()


def sample_votes(answers, confidences, probabilities, settings):
    """The samples' votes, normalised over those that gave an answer (Eq. 5) -> list of Vote."""
    weights = sample_weights(confidences, probabilities, settings)
    votes = [(answer, weight) for answer, weight in zip(answers, weights) if answer is not None and weight]
    total = sum(weight for _, weight in votes)
    return [Vote("samples", answer, weight / total) for answer, weight in votes]


def tally(votes, taus, choices=None):
    """Votes -> list of Candidate (Eq. 5-9), the samples' favourite first, then as they came.

    Answers that are equal as values share a candidate, the first that takes them. taus: {source: weight}. The
    sums run over SOURCES, so that no order of casting changes a bit of them.
    """
    candidates = []
    for source in SOURCES:
        for vote in votes:
            if vote.source == source:
                match = next((c for c in candidates if equivalent(c.answer, vote.answer, choices)), None)
                if match is None:
                    candidates.append(match := Candidate(vote.answer, {}))
                match.shares[source] = match.shares.get(source, 0.0) + vote.share
    for candidate in candidates:
        candidate.total = sum(taus[source] * candidate.shares.get(source, 0.0) for source in SOURCES)
    return sorted(candidates, key=lambda candidate: -candidate.shares.get("samples", 0.0))


def winner(candidates):
    """The Candidate with the highest total (Eq. 10), the first of those that tie; None without candidates."""
    best = max((candidate.total for candidate in candidates), default=None)
    return next((candidate for candidate in candidates if candidate.total >= best - TIE), None)


def share_of(candidate, candidates):
    """V[answer] / sum V (Eq. 10) of a winner, in [0, 1]; 0 without one, or when no vote weighs anything."""
    total = sum(c.total for c in candidates)
    return candidate.total / total if candidate is not None and total > 0 else 0.0


def can_stop_early(candidates, remaining, taus, threshold=None):
    """Whether no outcome of the remaining modules can change the winner (bool). This makes `exact` lossless.

    A rival gains at most the tau of each remaining module. The Voter divides its vote among the samples'
    answers, so it matters only where there are several. A rival may also be an answer that nobody has given
    yet. With a threshold, the final confidence may not cross it either.
    """
    leader = winner(candidates)
    if leader is None or "samples" not in leader.shares:
        return False
    num_sampled = sum("samples" in candidate.shares for candidate in candidates)
    single = sum(taus[SOURCE[module]] for module in remaining if module != "self_consistency")
    voter = taus["voter"] if "self_consistency" in remaining and num_sampled > 1 else 0.0
    position = candidates.index(leader)
    for i, rival in enumerate([*candidates, Candidate("", {})]):
        if rival is leader:
            continue
        gain = single + (voter if "samples" in rival.shares else 0.0)
        # A later rival loses a tie.
        if leader.total - rival.total < gain + (2 * TIE if i < position else -TIE / 2):
            return False
    if threshold is None:
        return True
    total, rest = sum(c.total for c in candidates), sum(taus[SOURCE[module]] for module in remaining)
    return leader.total / (total + rest) >= threshold or (leader.total + rest) / (total + rest) < threshold


# ---- One question

def rollout_record(rollout, sample, window=32):
    """One Rollout as stored (dict): text, answer, verdict (None without gold), confidence in each reading."""
    answer = extract_answer(rollout.text, sample.choices)
    return {"text": rollout.text, "answer": answer, "tokens": len(rollout.tokens),
            "finished": rollout.finished,
            "correct": None if sample.answer is None else accepts(answer, sample),
            "logprob": rollout.logprobs.mean().item(),
            "confidence": {reading: confidence_of(rollout, reading, window) for reading in READINGS}}


def record(result, sample, window=32):
    """The line of results.jsonl (dict): the result, the question, and the samples."""
    return result.record(sample) | {"samples": [rollout_record(r, sample, window) for r in result.rollouts]}


def confidence_of(rollout, reading, window):
    """One reading of a Rollout's confidence (float), Eq. 3."""
    tokens = rollout.confidences[None], torch.ones(1, len(rollout.confidences))
    if reading == "mean":
        return sequence_confidence(*tokens).item()
    return window_confidence(*tokens, reading, window).item()


class Controller:
    """CA-TTS for one base model and one Expert.

    vlm: a VLM, or a ServerVLM. expert: something with `ask`; None = the base plays the roles itself. checker:
    the VLM of Visual Self-Check, default vlm. A ServerVLM without a checker skips that module. clip: finds
    the region of its noise.
    """

    def __init__(self, vlm, expert=None, clip=None, settings=None, checker=None):
        self.vlm, self.settings, self.clip = vlm, settings or Settings(), clip
        self.modules, self.taus = self.settings.check(), self.settings.taus()
        self.threshold = read_threshold(self.settings)
        is_server = isinstance(vlm, ServerVLM)
        base_as_expert = (ServerExpert(vlm.server, self.settings.expert_tokens) if is_server
                          else LocalExpert(vlm, self.settings.expert_tokens))
        self.expert = expert or base_as_expert
        self.checker = checker or (None if is_server else vlm)
        self.policy = read_policy(self.settings, can_check=self.checker is not None)
        if self.policy:
            self.modules = self.policy.modules
            self.threshold = self.policy.threshold(self.settings.risk) if self.settings.risk else None
        if clip is None and "self_check" in self.modules and self.checker and self.settings.region != "all":
            self.clip = noise.ClipAttention.from_pretrained()

    def answer(self, sample):
        """One data.Sample -> Result."""
        return self.answer_all([sample])[0]

    def answer_all(self, samples, rollouts=None):
        """A batch of samples -> list of Result. A result does not depend on the rest of its batch.

        rollouts: N Rollouts for each sample, where they were drawn before; then nothing is drawn.
        """
        return run_through(self.steps(samples, rollouts))

    def steps(self, samples, rollouts=None):
        """`answer_all` as a generator: it yields the Futures of servers, and returns the results."""
        states = [QuestionState(sample, sample.pictures(), Result(sample.id)) for sample in samples]
        if rollouts is None:
            yield from self.draw(states, self.policy.sizes[0] if self.policy else self.settings.samples)
        for state, given in zip(states, rollouts or []):
            self._add_samples(state, given)
        yield from self.policy.buy(self, states) if self.policy else self._vote_all(states)
        for state in states:
            self._conclude(state)
        return [state.result for state in states]

    def _vote_all(self, states):
        """The paper's way: every module in its order, unless nothing left can change the answer."""
        pending = self._pending(states, self.modules)
        if self.settings.early_exit == "off" and self.settings.order != "informed":
            # All are asked before one is waited for. Reflection comes first: the base answers once more.
            modules = [m for m in ("self_reflection", "self_consistency", "self_check") if m in self.modules]
            steps = [self._plan(pending), *(self._steps(module, pending) for module in modules)]
            return (yield from timed(pending, together(*steps)))
        yield from timed(pending, self._plan(pending))
        pending = self._pending(pending, None)
        for step in range(len(self.modules)):
            for module in self.modules:
                yield from self.run(module, [s for s in pending if s.result.order[step] == module])
            pending = self._pending(pending, None, step + 1)

    def evidence(self, state):
        """What has been bought for a question (policy.Evidence)."""
        result, settings, choices = state.result, self.settings, state.sample.choices
        samples = [(extract_answer(r.text, choices), confidence_of(r, settings.reading, settings.window),
                    r.logprobs.mean().item()) for r in result.rollouts if not r.failure]
        votes = result.by_source()
        return Evidence(samples, {source: votes[source] for source in result.order}, choices)

    def _candidates(self, state, only_samples=False):
        votes = [v for v in state.result.votes if v.source == "samples" or not only_samples]
        return tally(votes, self.taus, state.sample.choices)

    def _pending(self, states, modules, step=0):
        """The questions that go on; others note why. modules: what remains; None = the rest of an order."""
        pending = []
        for state in states:
            remaining = modules if modules is not None else state.result.order[step:]
            if self.settings.early_exit == "exact" and can_stop_early(
                    self._candidates(state), remaining, self.taus, self.threshold):
                state.stopped = "nothing left could change the answer"
                state.result.skipped |= {module: state.stopped for module in remaining}
            elif remaining:
                pending.append(state)
        return pending

    def _charge(self, state, source, rollouts, views=1):
        """Base-model work on one question: a prefill a view, then a forward pass a view for each token."""
        if lengths := [len(r.tokens) for r in rollouts if not r.failure]:
            state.result.ledger.add(source, tokens=sum(lengths), forward_passes=views * max(lengths),
                                    image_encodings=views * len(state.pictures))

    def _seed(self, state):
        return f"{self.settings.seed} {state.sample.id}"

    # ---- The samples (Eq. 5)

    def draw(self, states, n):
        """Draw samples until every question has n; all have equally many so far.

        A question's seed fixes its samples: the first k of n are those of a draw of k, unless a server draws.
        """
        first = len(states[0].result.rollouts) if states else 0
        settings = self.settings
        groups = yield from timed(states, sample_from(
            self.vlm, [s.pictures for s in states], [data.prompt(s.sample) for s in states], n - first,
            first=first, max_new_tokens=settings.max_new_tokens, temperature=settings.temperature,
            top_k=settings.top_k, seed=[self._seed(s) for s in states]))
        for state, group in zip(states, groups):
            self._add_samples(state, group)

    def _add_samples(self, state, rollouts):
        result, settings = state.result, self.settings
        result.rollouts += rollouts
        result.votes = [vote for vote in result.votes if vote.source != "samples"] + sample_votes(
            [extract_answer(r.text, state.sample.choices) for r in result.rollouts],
            [confidence_of(r, settings.reading, settings.window) for r in result.rollouts],
            [r.logprobs.mean().exp().item() for r in result.rollouts], settings)
        self._charge(state, "samples", rollouts)

    # ---- The modules

    def _plan(self, states):
        """The order of the modules. The Expert as Planner is asked where that was wished: it costs a call."""
        order = self.settings.order
        plans = [names_in(CHEAPEST_FIRST if order == "auto" else order)] * len(states)
        if order in PLANNERS:
            plans = yield from consult(self.expert, "planner", states,
                                       lambda s: data.planner_prompt(s.sample, self._signals(s)),
                                       lambda _, text: replies.parse_order(text, MODULES))
        for state, plan in zip(states, plans):
            plan = MODULES if plan is None else plan
            state.result.order = [module for module in plan if module in self.modules]
            state.result.skipped |= {m: "the Planner stopped" for m in self.modules if m not in plan}

    def _signals(self, state):
        return self.evidence(state).signals() if self.settings.order == "informed" else None

    def run(self, module, states):
        """Let a module add its votes to the questions (states)."""
        return timed(states, self._steps(module, states))

    def _steps(self, module, states):
        if states:
            yield from getattr(self, f"_{module}")(states)

    def _self_consistency(self, states):
        """Expert as Voter (Eq. 6, 7): V[k] += tau1 c_k over the samples' answers."""
        states = self._with_answers(states, "voter")
        candidates = {id(s): [c.answer for c in self._candidates(s, True)] for s in states}
        shares = yield from consult(
            self.expert, "voter", states, lambda s: data.voter_prompt(s.sample, candidates[id(s)]),
            lambda s, text: replies.parse_probabilities(text, len(candidates[id(s)]), candidates[id(s)]))
        for state, given in zip(states, shares):
            state.result.votes += [Vote("voter", *pair) for pair in zip(candidates[id(state)], given or [])]

    def _self_reflection(self, states):
        """Expert as Critic; the base model answers again with the critique (Eq. 8): V[A_reflect] += tau2."""
        states = self._with_answers(states, "critic")
        current = {id(s): self._candidates(s, True)[0].answer for s in states}
        critiques = yield from consult(self.expert, "critic", states,
                                       lambda s: data.critic_prompt(s.sample, current[id(s)]),
                                       lambda _, text: replies.parse_critique(text))
        pairs = [(state, critique) for state, critique in zip(states, critiques) if critique is not None]
        if pairs:
            prompts = [data.reflect_prompt(s.sample, current[id(s)], critique) for s, critique in pairs]
            groups = yield from sample_from(self.vlm, [s.pictures for s, _ in pairs], prompts, greedy=True,
                                            max_new_tokens=self.settings.max_new_tokens)
            for (state, _), (rollout,) in zip(pairs, groups):
                self._vote(state, "self_reflection", rollout)

    def _self_check(self, states):
        """Visual Self-Check (Eq. 9): contrast the picture with its noised twin: V[A_check] += tau3."""
        settings = self.settings
        if self.checker is None:
            for state in states:
                state.result.skipped["self_check"] = "the base is a server; --check_model names a local model"
            return
        images = [s.pictures for s in states]
        questions, seeds = [s.sample.question for s in states], [self._seed(s) for s in states]
        noised = noise.make_pairs(images, questions, self.clip, noise.parse_t(settings.noise_t),
                                  [settings.region] * len(states), settings.mass, seeds)
        rollouts = self.checker.contrast(
            images, noised, [data.prompt(s.sample) for s in states], alpha=settings.check_alpha,
            beta=settings.check_beta, max_new_tokens=settings.max_new_tokens)
        for state, rollout in zip(states, rollouts):
            self._vote(state, "self_check", rollout, views=2)
        yield from ()                                       # a local model is not waited for

    def _expert(self, states):
        """The Expert answers the question itself; only a fitted policy asks for that."""
        def parse(state, text):
            answer = extract_answer(text, state.sample.choices)
            if answer is None:
                raise ValueError("no answer")
            return answer

        answers = yield from consult(self.expert, "expert", states, lambda s: data.prompt(s.sample), parse)
        for state, answer in zip(states, answers):
            if answer is not None:
                state.result.votes.append(Vote("expert", answer, state.result.probabilities["expert"]))

    def _with_answers(self, states, role):
        """The questions with an answer among their samples; the others have nothing to show to the Expert."""
        answered = [s for s in states if any(vote.source == "samples" for vote in s.result.votes)]
        for state in states:
            if state not in answered:
                state.result.ledger.notes.append(f"{role} not asked: no sample gave an answer")
        return answered

    def _vote(self, state, source, rollout, views=1):
        self._charge(state, source, [rollout], views)
        if rollout.failure:
            return state.result.note_failure(source, rollout.failure)
        state.result.texts[source] = rollout.text
        answer = extract_answer(rollout.text, state.sample.choices)
        if answer is None:
            state.result.ledger.notes.append(f"{source} gave no answer")
        else:
            state.result.votes.append(Vote(source, answer, 1.0))

    def _conclude(self, state):
        """Answer and confidence (Eq. 10), abstention, and the judge's verdict."""
        result = state.result
        if self.policy:
            result.answer, result.confidence = self.policy.posterior.leader(self.evidence(state))
        else:
            candidates = self._candidates(state)
            if best := winner(candidates):
                result.answer, result.confidence = best.answer, share_of(best, candidates)
        for failure in {str(r.failure): r.failure for r in result.rollouts if r.failure}.values():
            result.note_failure("base", failure)
        unanswered = sum(extract_answer(r.text, state.sample.choices) is None for r in result.rollouts)
        if unanswered:
            result.ledger.notes.append(f"{unanswered} of {len(result.rollouts)} samples gave no answer")
        result.abstained = result.answer is None or result.confidence < (self.threshold or 0)
        if state.sample.answer is not None:
            result.correct = accepts(result.answer, state.sample)


# ---- The command

def build(args, settings, model=None):
    """The Controller that the flags of `add_sources` describe. model: in place of --model."""
    settings.check()
    for read in (read_threshold, read_policy):
        read(settings, results_file.source_fingerprint(args))
    models = answering.load_models(args, settings.expert_tokens, model or args.model, VLM, Rollout,
                                 noise.ClipAttention)
    return Controller(models.base, models.expert, models.clip, settings, models.checker)


def run(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = answering.question_parser(Settings)
    args = answering.parse_with_preset(parser, argv)
    fill_in(args)
    settings = Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})
    if (sample := answering.question_of(args, Sample)) is not None:
        controller = build(args, settings)
        result = controller.answer(sample)
        table = None if controller.policy else tally(result.votes, controller.taus, args.choices)
        return answering.show_answer(result, record(result, sample, settings.window), args, table,
                                     controller.taus)
    samples = data.load(args.data, "test", args.limit, args.data_seed, args.strict,
                        allow_outside=args.allow_outside, wording=args.prompt)
    controller = build(args, settings)
    if args.dry_run:
        return answering.show_cost(samples, data.prompt, args, controller)

    def answer_batch(batch):
        results = yield from controller.steps(batch)
        return [record(r, s, settings.window) for s, r in zip(batch, results)]

    answering.answer_questions(answer_batch, samples, args, parser.parse_args([]), argv, controller)


def main(argv=None):
    cli.command("catts.py", lambda: run(argv))


if __name__ == "__main__":
    main()

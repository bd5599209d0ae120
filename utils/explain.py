"""One training step on one question, with its real numbers: `python train_cdrl.py --explain [ID]`.

The page follows the step in the order in which it runs. The stages are those of train_cdrl.py, which hands
them over. Only the formulas as text are written here. Nothing but one picture is saved.
"""
import re
from pathlib import Path

import torch
from PIL import Image

from utils.cli import InputError, printable, shown

FIRST = "first"                 # what --explain means without an ID
TEXT = 60                       # characters of a rollout that a line has room for
WARMUP = 5                      # the learning rate of the first step is this part of --lr
SIDE = 336                      # pixels; smaller pictures are enlarged towards it in the PNG
MARGIN = 8                      # pixels between the pictures of a pair


def find_question(question_id, questions, held_out):
    """The question with this id (Sample). Built-in ids end in their index, files are searched. InputError."""
    index = re.search(r"\d{1,9}$", question_id)
    if index and int(index[0]) < len(questions) and questions[int(index[0])].id == question_id:
        return questions[int(index[0])]
    for sample in [*(questions if isinstance(questions, list) else []), *held_out]:
        if sample.id == question_id:
            return sample
    raise InputError(f"--explain {question_id!r}: no question has this id; the first one is "
                     f"{questions[0].id!r}")


def choose_question(args, clip, order, prepare_step, roll_out, vlm):
    """The first question of step 0 that shows most (Sample): right and wrong answers, no right one where the
    evidence is noised."""
    samples = order.samples(0)
    original, *noised = roll_out(vlm, *prepare_step(vlm, clip, samples, 0, args), 0, args)
    mixed = original.correct.amax(-1) > original.correct.amin(-1)                               # (Q,)
    blinded = noised[0].correct.amax(-1) == 0 if noised else torch.zeros_like(mixed)
    return samples[int((4 * mixed.int() + 2 * blinded.int() - original.is_control.int()).argmax())]


def write_pair(path, images, noised_images):
    """A question's pictures, each beside its noised twin, as one PNG. Small ones are enlarged."""
    rows = list(zip(images, noised_images)) if noised_images else [(image,) for image in images]
    scales = [max(1, SIDE // max(row[0].size)) for row in rows]
    rows = [[image.convert("RGB").resize([side * scale for side in image.size], Image.Resampling.NEAREST)
             for image in row] for row, scale in zip(rows, scales)]
    width = max(sum(image.width + MARGIN for image in row) for row in rows) - MARGIN
    sheet = Image.new("RGB", (width, sum(row[0].height + MARGIN for row in rows) - MARGIN), "white")
    y = 0
    for row in rows:
        for column, image in enumerate(row):
            sheet.paste(image, (column * (image.width + MARGIN), y))
        y += row[0].height + MARGIN
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def first_update(parameters, lr, max_grad_norm):
    """AdamW's first update without decay, in place -> the gradient's norm before clipping (float).

    After one gradient both of AdamW's averages are that gradient. The update is its sign, and needs no state.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    with torch.no_grad():
        for p in parameters:
            p.sub_(lr * p.grad / (p.grad.abs() + 1e-8))
    return float(norm)


def readings(policy, views, args):
    """What the policy says of the rollouts now: log p of the words and C -> a pair of lists of G a view."""
    pairs = []
    for view in views:
        with torch.no_grad():
            scores = policy.score(view.images, view.prompts, [r.tokens for r in view.rollouts[0]],
                                  temperature=args.temperature)
        confidence = (scores.confidence * scores.mask).sum(-1) / scores.mask.sum(-1)
        pairs.append(((scores.logprobs * scores.mask).sum(-1).tolist(), confidence.tolist()))
    return pairs


def probability(c, confidence_map):
    """c = sigmoid(a C + b) (float)."""
    return float(torch.sigmoid(confidence_map["slope"] * c + confidence_map["intercept"]))


def calibration_formula(view, j, confidence_map, args):
    """The calibration term of rollout j as a formula with its numbers (str), "" without one."""
    c, right = view.confidence[0, j], float(view.correct[0, j])
    if args.calibration == "none":
        return ""
    if args.calibration == "linear":
        group = view.confidence.min(), view.confidence.max()
        lo, hi = group if args.cnorm == "group" else (confidence_map["lo"], confidence_map["hi"])
        ratio = f"({c:.3f} - {lo:.3f}) / ({hi:.3f} - {lo:.3f})"
        c_norm = "0.5" if hi <= lo else ratio if lo <= c <= hi else f"clip({ratio})"
        return f"({2 * right - 1:+.0f}) {c_norm}"
    if args.calibration == "brier":
        return f"1 - ({probability(c, confidence_map):.3f} - {right:.0f})^2"
    return f"{args.calibration} score {view.rewards['calibration'][0, j]:.3f}"


def heading(args, sample, original, noised, picture):
    """What is asked, and of whom (lines)."""
    lines = [f"ONE STEP ON ONE QUESTION: recipe {args.recipe}, model {shown(args.model)}",
             f"{sample.id}: {printable(sample.question)}   answer: {sample.answer}"]
    lines += ["options: " + printable(" | ".join(sample.choices))] if sample.choices else []
    if noised is None:
        return [*lines, f"I. Pictures, in {picture}. No term of this recipe needs a noised one."]
    twin = noised.images[0][0]
    if not hasattr(twin, "t"):                      # a fork's twin
        return [*lines, f"I. Image pair, in {picture}"]
    area = 1.0 if twin.mask is None else float(twin.mask.mean())
    place = "a random region" if original.is_control[0] else f"region '{args.region}'"
    noise = f"noise of step t = {twin.t} on {place}, {area:.0%} of the picture"
    return [*lines, f"I. Image pair, in {picture}: i, and i' with {noise}"]


def rollout_lines(original, noised, confidence_map):
    """The answers on each view, with C and c (lines)."""
    lines = ["II. Rollouts y on i and y' on i'",
             "III. C = mean over tokens of -1/k sum log p of the k most probable (Eq. 3)",
             f"      {'C':>7}  {'c':>5}  right  tokens  text"]
    for view, mark in ((original, " "), (noised, "'")):
        for j, rollout in enumerate(view.rollouts[0] if view else ()):
            c, text = view.confidence[0, j], printable(rollout.text)
            prob = f"{probability(c, confidence_map):.3f}" if confidence_map else "-"
            text = text if len(text) <= TEXT else text[:TEXT - 3] + "..."
            lines.append(f"  y{j + 1}{mark} {c:8.3f}  {prob:>5}  {view.correct[0, j]:5.0f}  "
                         f"{len(rollout.tokens):6}  {text}")
    return lines


def reward_lines(original, noised, confidence_map, args):
    """Each reward as the formula with its numbers (lines)."""
    lines = ["IV. Reward = alpha tanh(beta (C - C')) + calibration + right + format (Eq. 4, 3.2.2)"]
    if confidence_map:
        lines.append(f"  c = sigmoid({confidence_map['slope']:.3f} C {confidence_map['intercept']:+.3f})")
    if original.is_control[0]:
        lines.append("  A control: its noise spares the evidence, so the pair earns no perception term.")
    for view, mark in ((original, " "), (noised, "'")):
        if view is None or view is noised and not args.noised_learns:
            continue
        for j in range(len(view.rollouts[0])):
            values = {name: float(term[0, j]) for name, term in view.rewards.items()}
            formulas = []
            if view is noised:
                values["perception"] = 0.0                      # a term of one objective: it stands with y
            elif noised is not None and args.alpha and not original.is_control[0]:
                gap = f"{original.confidence[0, j]:.3f} - {noised.confidence[0, j]:.3f}"
                formulas.append(f"{args.alpha:g} tanh({args.beta:g} ({gap}))")
            formulas.append(calibration_formula(view, j, confidence_map, args))
            formulas += [f"{values['outcome']:.0f}", f"{values['format']:.0f}"]
            formula = " + ".join(filter(None, formulas))
            lines.append(f"  y{j + 1}{mark}  {formula} = {sum(values.values()):.3f}")
    return lines


def advantage_lines(original, args):
    """The advantages of the original view (lines)."""
    rewards = sum(original.rewards.values())[0]                                                    # (G,)
    baseline = {"loo": "the mean of the others", "std": "the group's mean, divided by its std"}.get(
        args.adv_norm, "the group's mean")
    lines = [f"V. Advantage of y: the reward minus {baseline}"]
    for j, reward in enumerate(rewards):
        others = (rewards.sum() - reward) / (len(rewards) - 1)
        formula = f"{reward:.3f} - {others if args.adv_norm == 'loo' else rewards.mean():.3f}"
        if args.adv_norm == "std":
            formula = f"({formula}) / {rewards.std() + 1e-4:.3f}"
        lines.append(f"  y{j + 1}   {formula} = {original.advantages[0, j]:+.3f}")
    return lines


def loss_lines(original, noised, sums, num_loss_tokens, args):
    """The loss and its two halves (lines)."""
    policy_half = round(float(sums["loss"]) - float(sums["pathwise"]), 4) + 0.0        # -0.0 becomes 0.0
    answers = zip(original.advantages[0], original.rollouts[0])
    products = " ".join(f"{advantage:+.3f}*{len(rollout.tokens)}" for advantage, rollout in answers)
    also = "   and y' alike" if noised is not None and noised.policy_weight else ""
    lines = [f"VI. Loss, over {num_loss_tokens} tokens. Every ratio is 1 on the first update of a batch",
             f"  policy half    -({products}) / {num_loss_tokens} = {policy_half:.4f}{also}"]
    if args.pathwise:
        totals = [original.rewards["perception"].sum() + original.rewards["calibration"].sum()]
        totals += [noised.rewards["calibration"].sum()] if args.noised_learns else []
        terms = [f"{total:.3f}" for total in totals]
        if args.adv_norm == "std":
            views = zip(terms, (original, noised))
            terms = [f"{term} / {view.advantage_divisor:.3f}" for term, view in views]
        lines.append(f"  pathwise half  -{args.pathwise:g} ({' + '.join(terms)}) / {num_loss_tokens} = "
                     f"{sums['pathwise']:.4f}   (terms of y" + " and y'" * (len(terms) > 1) + " with C)")
    return [*lines, f"  loss           {sums['loss']:.4f}   (advantages sum to 0, gradients do not)"]


def push_lines(before, after, original, args, norm):
    """What one update does to the words and to their confidence (lines)."""
    lr = args.lr / WARMUP
    lines = [f"VII. Gradient of norm {norm:.2f}. One update of AdamW on this question, lr {lr:g}:",
             "              log p of the words           C"]
    for view, (rows, rows_after) in enumerate(zip(before, after)):
        for j, (p, p_after, c, c_after) in enumerate(zip(rows[0], rows_after[0], rows[1], rows_after[1])):
            verdict = "right" if original.correct[0, j] else "wrong"
            name = f"y{j + 1}' noised" if view else f"y{j + 1} {verdict}"
            lines.append(f"  {name:11} {p:8.3f} -> {p_after:8.3f} {direction(p, p_after):4}   "
                         f"{c:7.3f} -> {c_after:7.3f} {direction(c, c_after)}")
    if len(before) > 1:
        means = torch.tensor([[confidence for _, confidence in views] for views in (before, after)]).mean(-1)
        gaps = (means[:, 0] - means[:, 1]).tolist()
        lines.append(f"  gap C - C'    {gaps[0]:.3f} -> {gaps[1]:.3f} {direction(*gaps)}")
    return lines


def direction(before, after):
    return "up" if after > before else "down" if after < before else "same"


def print_step(args, vlm, policy, clip, order, held_out, stages):
    """Print one question's step -> its lines (list of str).

    policy: the Policy around `vlm`, not sharded. One update moves its weights. stages: fit_map_on_base,
    prepare_step, roll_out, add_rewards, add_advantages, cdrl_loss of train_cdrl.py. InputError: unknown
    id, many ranks. All weights move: --freeze_vision and --lora_rank are not applied.
    """
    if order.world > 1:
        raise InputError(f"--explain shows one question, and {order.world} ranks were started; start one")
    fit_map_on_base, prepare_step, roll_out, add_rewards, add_advantages, cdrl_loss = stages
    picture = Path(args.output).parent / "explain.png"
    with policy.unsharded():
        if args.run.explain == FIRST:
            sample = choose_question(args, clip, order, prepare_step, roll_out, vlm)
        else:
            sample = find_question(args.run.explain, order.questions, held_out)
        needs_map = args.calibration != "none" and (args.calibration != "linear" or args.cnorm == "range")
        confidence_map = fit_map_on_base(vlm, clip, order, args) if needs_map else None
        batch = prepare_step(vlm, clip, [sample], 0, args)
        views = roll_out(vlm, *batch, 0, args)
    _, images, noised_images, *_ = batch
    add_rewards(views, confidence_map, args)
    add_advantages(views, args.adv_norm)
    write_pair(picture, images[0], noised_images and noised_images[0])
    original, noised = views[0], views[1] if len(views) > 1 else None
    learners = views if args.noised_learns else views[:1]
    num_loss_tokens = sum(len(rollout.tokens) for view in learners for rollout in view.rollouts[0])
    before = readings(policy, views, args)
    scored = views if args.noised_learns or args.pathwise > 0 and args.alpha > 0 else views[:1]
    loss, sums = cdrl_loss(policy, None, scored, confidence_map, num_loss_tokens, args)
    policy.backward(loss)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    norm = first_update(parameters, args.lr / WARMUP, args.max_grad_norm)
    lines = [*heading(args, sample, original, noised, picture),
             *rollout_lines(original, noised, confidence_map),
             *reward_lines(original, noised, confidence_map, args), *advantage_lines(original, args),
             *loss_lines(original, noised, sums, num_loss_tokens, args),
             *push_lines(before, readings(policy, views, args), original, args, norm)]
    print("\n".join(lines))
    return lines

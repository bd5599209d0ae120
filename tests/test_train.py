"""The GRPO step, the run folder, and the command line of train_cdrl.py."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import programs
import pytest
import torch
import torch.distributed as dist
from conftest import ENVIRONMENT, ROOT, ahead
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import data
import eval
import reward
import train_cdrl
from reward import group_advantages
from train_cdrl import accumulate_gradients, parse, policy_loss
from utils import checkpoint, cli, distributed, held_out, loading, logs, memory
from utils.cli import InputError
from utils.distributed import QuestionOrder
from vlm import VLM

TINY = ["--steps", "3", "--batch_size", "6", "--group_size", "2", "--eval_size", "0", "--max_new_tokens", "24",
        "--scale_questions", "16"]


def run(output, *flags, ranks=0, script="train_cdrl.py"):
    """train_cdrl.py, plain or on several ranks."""
    done = programs.run(script, "--output", output, *flags, ranks=ranks, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-6000:]


def run_as_users_do(output, *flags, ranks=0):
    """In a new interpreter, or by torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks else []
    done = subprocess.run([sys.executable, *launcher, "train_cdrl.py", "--output", str(output), *flags], cwd=ROOT,
                          env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]


def log(output, times=False):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return rows if times else [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


# ---- the pieces of GRPO

def test_two_armed_bandit_the_better_arm_rises():
    """policy_loss and group_advantages alone, on a softmax over two arms that start level."""
    torch.manual_seed(0)
    logits = torch.zeros(2, requires_grad=True)
    optimizer, args = torch.optim.SGD([logits], lr=0.5), replace(parse([]), clip_low=0.2, clip_high=0.2)
    for _ in range(60):
        arms = torch.multinomial(logits.detach().softmax(0), 8, replacement=True)       # (G,)
        advantages, _ = group_advantages((arms == 1).float()[None], "std")
        logprobs = logits.log_softmax(0)[arms][:, None]                                  # (G, 1)
        loss = policy_loss(logprobs, logprobs.detach(), None, advantages.view(-1, 1), args)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.softmax(0)[1] > 0.9


def test_on_policy_gradient_is_reinforce_and_clipping_stops_it():
    logprobs, args = torch.tensor([[-1.0, -2.0]], requires_grad=True), replace(parse([]), clip_low=0.2, clip_high=0.28)
    for old, advantage, expected in (([-1.0, -2.0], 1.5, [-1.5, -1.5]),           # ratio 1: -A dlogp
                                     ([-2.0, -2.0], 1.0, [0.0, -1.0]),            # ratio e above 1 + clip_high: no gradient
                                     ([-2.0, -2.0], -1.0, [2.718282, 1.0]),       # the pessimistic side is never clipped
                                     ([0.0, -2.0], -1.0, [0.0, 1.0])):            # ratio 1/e below 1 - clip_low
        per_token, _, _ = policy_loss(logprobs, torch.tensor([old]), None, torch.tensor([[advantage]]), args)
        gradient, = torch.autograd.grad(per_token.sum(), logprobs)
        torch.testing.assert_close(gradient, torch.tensor([expected]))


def test_advantages_are_centred_and_equal_groups_teach_nothing():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    for norm in ("std", "none", "loo"):
        advantages, divisor = group_advantages(rewards, norm)
        assert advantages.sum(-1).abs().max() < 1e-6 and (advantages[1] == 0).all() and divisor.shape == (2, 1)
    torch.testing.assert_close(group_advantages(rewards, "std")[0][0], (rewards[0] - 0.5) / (rewards[0].std() + 1e-4))
    others = torch.stack([rewards[0][torch.arange(4) != j].mean() for j in range(4)])
    torch.testing.assert_close(group_advantages(rewards, "loo")[0][0], rewards[0] - others)


def test_k3_estimates_the_kl():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 6).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum()
    drawn = torch.multinomial(policy.exp(), 400_000, replacement=True)
    values = policy_loss(policy[drawn], policy[drawn], reference[drawn], torch.zeros(()), parse([]))[2]
    assert (values >= 0).all() and abs(values.mean() - exact) < 0.01


def test_order_visits_every_question_once_an_epoch_from_any_step():
    questions = range(10)
    order = QuestionOrder(questions, 4, 0)
    walked = [i for step in range(5) for i in order.indices(step)]
    assert sorted(walked[:10]) == sorted(walked[10:]) == list(range(10)) and walked[:10] != walked[10:]
    assert QuestionOrder(questions, 4, 0).indices(3) == walked[12:16] != QuestionOrder(questions, 4, 1).indices(3)


def test_a_question_that_comes_twice_in_a_step_has_rollouts_of_its_own(base, clip):
    few = [data.synthetic("train", 5, i) for i in range(2)]
    samples = QuestionOrder(few, 5, 0).samples(0)
    assert len({s.id for s in samples}) == 5 and {s.id for s in samples[:2]} == {s.id for s in few}
    shares = [QuestionOrder(few, 5, 0, rank, 2).samples(0) for rank in range(2)]
    assert [[s.id for s in samples[rank::2]] for rank in range(2)] == [[s.id for s in share] for share in shares]
    views = views_of(base, clip, samples, replace(parse([]), group_size=4, max_new_tokens=24, temperature=2.0))
    first, again = ([group for group, s in zip(views[0].rollouts, samples) if s.question == few[0].question][i] for i in (0, 1))
    assert [r.text for r in first] != [r.text for r in again]


# ---- one step on the real model

def views_of(vlm, clip, samples, args):
    return train_cdrl.roll_out(vlm, *train_cdrl.prepare_step(vlm, clip, samples, 0, args), 0, args)


def step_views(vlm, clip, recipe="ours", **settings):
    """-> args, (original, noised) with rewards and advantages, the map from C to c."""
    small = {"group_size": 3, "max_new_tokens": 24, "batch_size": 4, "mass": 0.7}
    args = replace(parse(["--recipe", recipe]), **small | settings)
    views = views_of(vlm, clip, [data.synthetic("train", 5, i) for i in range(4)], args)
    confidence_map = {"lo": 8.0, "hi": 14.0, "slope": 0.9, "intercept": -10.0}
    train_cdrl.add_rewards(views, confidence_map, args)
    train_cdrl.add_advantages(views, args.adv_norm)
    return args, views, confidence_map


def loss_tokens(views, args):
    return sum(len(r.tokens) for view in (views if args.noised_learns else views[:1]) for group in view.rollouts for r in group)


def gradient(vlm, views, confidence_map, args):
    vlm.model.zero_grad()
    scored = views if args.noised_learns or args.pathwise and args.alpha else views[:1]
    passes = distributed.micro_batches(vlm, scored, args.run)
    accumulate_gradients(distributed.Policy(vlm), None, passes, confidence_map, loss_tokens(views, args), args)
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in vlm.model.parameters()])


@pytest.mark.parametrize("recipe, flows", [("paper", False), ("ours", True)])
def test_gradient_from_the_noised_view(fresh, clip, recipe, flows):
    """Change the noised pictures after the rewards are fixed: only a recipe that learns there may notice."""
    args, views, confidence_map = step_views(fresh, clip, recipe)
    before = gradient(fresh, views, confidence_map, args)
    views[1].images = [[Image.new("RGB", (112, 112), (200, 30, 30))]] * 4
    for view in views:
        view.inputs = None                       # encoded anew
    after = gradient(fresh, views, confidence_map, args)
    assert before.abs().sum() > 0 and ((before - after).abs().max() > 1e-4) == flows


def test_pathwise_agrees_with_finite_differences(fresh, clip):
    """The pathwise part of the gradient along a random direction = the change of the confidence reward itself, on fixed
    words, through C and through C'."""
    args, views, confidence_map = step_views(fresh, clip, pathwise=1.0, adv_norm="std", calibration="brier", controls=0.0)
    for view in views:
        reward_stds = sum(view.rewards.values()).std(-1) + 1e-4
        assert view.advantage_divisor == pytest.approx(reward_stds.mean().item())  # of the batch, no group 0
        view.advantages = torch.zeros_like(view.advantages)         # the policy gradient is silent
    analytic = gradient(fresh, views, confidence_map, args)
    num_loss_tokens = loss_tokens(views, args)

    def objective():
        with torch.no_grad():
            scored = [fresh.score(v.images, v.prompts, [r.tokens for g in v.rollouts for r in g]) for v in views]
            c = [reward.sequence_confidence(s.confidence, s.mask).view(4, 3).double() for s in scored]
            # Eq. 4 with the Brier term, by hand, for both views; they share the perception term
            value = (args.alpha * torch.tanh(args.beta * (c[0] - c[1])) / views[0].advantage_divisor).sum()
            for confidence, view in zip(c, views):
                probability = torch.sigmoid(confidence_map["slope"] * confidence + confidence_map["intercept"])
                value = value + ((1 - (probability - view.correct) ** 2) / view.advantage_divisor).sum()
        return -(value / num_loss_tokens).item()
    torch.manual_seed(0)
    parameters = list(fresh.model.parameters())
    # along the gradient and a random vector: the sum must be seen above float noise
    direction = analytic / analytic.norm() + 0.3 * torch.randn_like(analytic) / analytic.numel() ** 0.5
    pieces, eps, values = direction.split([p.numel() for p in parameters]), 2e-3, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, piece in zip(parameters, pieces):
                p.add_(piece.view_as(p), alpha=sign * eps)
        values.append(objective())
    numeric = (values[0] - values[1]) / (2 * eps)
    assert abs(numeric - float(analytic @ direction)) < 0.03 * abs(numeric), (numeric, float(analytic @ direction))


@pytest.mark.parametrize("settings", [{}, {"noised_policy": 1.0}, {"adv_norm": "none", "learn_noised": False}])
def test_micro_batches_do_not_change_the_gradient(fresh, clip, settings):
    args, views, confidence_map = step_views(fresh, clip, **settings)
    whole, one, few = (gradient(fresh, views, confidence_map, replace(args, run=replace(args.run, micro_batch=size,
                                                                                        micro_tokens=tokens)))
                       for size, tokens in ((4, 0), (1, 0), (4, 300)))
    assert whole.abs().max() > 1e-3
    for pieces in (one, few):
        assert (whole - pieces).abs().max() < 1e-6 and (whole - pieces).norm() < 1e-5 * whole.norm()     # another order


def test_controls_are_noised_elsewhere_and_earn_no_perception_term(fresh, clip):
    """--controls 1: the pictures are those of --region random, and the reward is that of alpha = 0; 0.5: both kinds."""
    _, controls, _ = step_views(fresh, clip, controls=1.0)
    _, random, _ = step_views(fresh, clip, region="random", alpha=0.0)
    _, key, _ = step_views(fresh, clip, controls=0.0)
    assert all(torch.equal(a.advantages, b.advantages) for a, b in zip(controls, random))
    assert controls[1].images == random[1].images != key[1].images
    assert set(logs.statistics(controls)) - set(logs.statistics(key)) == {"gap/controls", "overlap/controls"}
    _, mixed, _ = step_views(fresh, clip, controls=0.5)
    assert mixed[0].is_control.any() and not mixed[0].is_control.all()
    assert torch.equal(mixed[0].rewards["perception"].any(-1), ~mixed[0].is_control)
    noised = [controls if is_control else key for is_control in mixed[1].is_control]
    assert all(mixed[1].images[q] == side[1].images[q] for q, side in enumerate(noised))


def test_reward_is_the_sum_of_its_terms_as_in_eq_4(fresh, clip):
    args, views, _ = step_views(fresh, clip, "paper", alpha=0.5, beta=1.0)
    c, c_other = views[0].confidence, views[1].confidence
    low, high = c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)
    r = views[0].correct
    c_norm = torch.where(high > low, (c - low) / (high - low), 0.5)      # equal words in a group: the middle
    expected = 0.5 * torch.tanh(c - c_other) + (2 * r - 1) * c_norm + r + views[0].rewards["format"]
    torch.testing.assert_close(sum(views[0].rewards.values()), expected)
    for q, group in enumerate(views[0].rollouts):
        for g, rollout in enumerate(group):
            torch.testing.assert_close(c[q, g], rollout.confidences.mean())


# ---- recipes and refusals

def test_a_flag_wins_over_its_recipe():
    assert parse(["--recipe", "paper"]).pathwise == 0 and parse(["--recipe", "paper", "--pathwise", "2"]).pathwise == 2
    assert parse(["--alpha", "0.7", "--recipe", "grpo"]).alpha == 0.7
    assert parse([]).output == "runs/cdrl" and parse(["--recipe", "grpo"]).output == "runs/grpo"


def test_a_stored_run_is_todays_row_where_a_setting_is_new_or_has_gone():
    sys.path.insert(0, str(ROOT / "results"))
    import recipes
    settings = checkpoint.settings_of(parse([]))
    older = {key: value for key, value in settings.items() if key != "resample"} | {"a_flag_that_went": 3}
    assert recipes.same_settings(older, settings)
    assert not recipes.same_settings(older, settings | {"resample": 2})
    assert not recipes.same_settings(older | {"lr": 1.0}, settings)


def question(tmp_path, **row):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    rows = [{"id": f"q{i}", "image": "a.png", "question": "How many?", "answer": "1"} for i in range(4)]
    rows[2] |= row
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--data", str(tmp_path / "train.jsonl")]


def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, base, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    loading.save(base, tmp_path / "blind")
    for settings in (tmp_path / "blind").glob("*processor_config.json"):
        settings.unlink()
    for path, name in ((ROOT / "tiny" / "base", "torn"), (ROOT / "tiny" / "clip", "torn_clip")):
        shutil.copytree(path, tmp_path / name)
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        (tmp_path / name / "model.safetensors").unlink()
        (tmp_path / name / "model.safetensors").write_bytes(weights[:1000])
    cases = [          # flags, or the row of a data file that spoils it; and what the sentence must name
        (["--data", "absent.jsonl"], "absent.jsonl"), (["--group_size", "1"], "group_size"), (["--noise_t", "2000"], "2000"),
        (["--mass", "0"], "mass"), (["--steps", "0"], "steps"), (["--micro_batch", "0"], "micro_batch"),
        (["--clip", str(tmp_path)], "CLIP"), (["--model", str(tmp_path / "nowhere")], "nowhere"),
        (["--model", str(tmp_path / "blind")], "image processor"), ({"image": "bad.png"}, "q2"),
        ({"image": "absent.png"}, "q2"), ({"question": 5}, "q2"),
        (["--model", str(tmp_path / "torn")], "torn"), (["--clip", str(tmp_path / "torn_clip")], "torn_clip"),
        (["--output", str(bad / "x")], "output"), (["--alpha", "inf"], "alpha"), (["--lr", "nan"], "lr"),
        (["--temperature", "inf"], "temperature"), (["--seed", "9" * 30], "seed"), (["--clip_low", "5"], "clip_low"),
        (["--lr", "1e30"], "not finite"),
        ({"question": " "}, "q2"), ({"answer": None}, "q2"), ({"question": "word " * 5000}, "q2")]
    for case, names in cases:
        flags = question(tmp_path, **case) if isinstance(case, dict) else case
        with pytest.raises(SystemExit) as stop:
            train_cdrl.main(["--output", str(tmp_path / "run"), *TINY, *flags])
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and names in message and message.startswith("train_cdrl.py: "), (case, message)
    assert not (tmp_path / "run" / "after.json").exists()
    with pytest.raises(InputError, match="ranks"):
        train_cdrl.check(parse(["--batch_size", "3"]), 2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        checkpoint.prepare(parse(["--output", str(tmp_path / "file")]))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not a run"):
        checkpoint.prepare(parse(["--output", str(tmp_path / "other")]))


# ---- whole runs

UNEVEN = """
import train_cdrl, vlm
from utils import distributed
rank, world, device = distributed.start_ranks()
sample, split, whole = vlm.VLM.sample, train_cdrl.micro_batches, []
vlm.VLM.sample = lambda self, *a, **k: sample(self, *a, **{**k, "max_new_tokens": 24 if rank else 1})
train_cdrl.micro_batches = lambda *a: whole.append(sum(weight for _, weight in split(*a))) or split(*a)
train_cdrl.main()
open(f"{__file__}.{rank}", "w").write(str(int(sum(whole))))
"""


def killed(output, *flags, ranks=0):
    """A run that is killed by -9 after its first checkpoint, while it writes the second."""
    program = programs.Program("train_cdrl.py", "--output", output, *flags, "--save_every", "1", ranks=ranks)
    for _ in range(2400):
        if (output / "checkpoint-1").exists() or program.poll() is not None:
            break
        time.sleep(0.05)
    program.kill()
    assert program.wait().returncode == -signal.SIGKILL and not (output / "model.safetensors").exists()
    for later in checkpoint.checkpoints(output)[1:]:                    # the machine was faster than the kill
        shutil.rmtree(later)
    (output / ".checkpoint-2.tmp").mkdir(exist_ok=True)
    (output / ".checkpoint-2.tmp" / "model.safetensors").write_bytes(b"torn")
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "torn')


def killed_and_resumed(folder, ranks, *flags):
    """kill -9, then the same command; and, from a copy of what was left, the same on another number of ranks."""
    killed(folder / "killed", *TINY, *flags, ranks=ranks)
    shutil.copytree(folder / "killed", folder / "other")
    run(folder / "killed", *TINY, "--save_every", "1", *flags, ranks=ranks)
    run(folder / "other", *TINY, "--save_every", "1", ranks=2 - ranks)
    return folder


@ahead
def first(folder):
    run_as_users_do(folder / "first", *TINY)
    return folder / "first"


@ahead
def sharded(folder):
    run_as_users_do(folder / "sharded", *TINY, "--shard", "fsdp", ranks=2)
    return folder / "sharded"


@ahead
def replicated(folder):
    run(folder / "two", *TINY, "--micro_batch", "1", ranks=2)           # gradients are summed in the last of 3 passes
    return folder / "two"


@ahead
def uneven(folder):
    (folder / "uneven.py").write_text(UNEVEN)
    run(folder / "run", *TINY, "--shard", "fsdp", "--micro_tokens", "430", ranks=2, script=folder / "uneven.py")
    return folder


@ahead
def half_precision(folder):
    run(folder / "bf16", *TINY, "--dtype", "bfloat16", "--offload", "--freeze_vision", "--activation_checkpointing", "on",
        "--keep", "1", "--save_every", "1", "--lr", "1e-3")
    return folder / "bf16"


@ahead
def resumed_alone(folder):
    return killed_and_resumed(folder, 0)


@ahead
def resumed_sharded(folder):
    return killed_and_resumed(folder, 2, "--shard", "fsdp")


@ahead
def resumed_replicated(folder):
    return killed_and_resumed(folder, 2, "--micro_batch", "1")


@ahead
def interrupted(folder):
    """Ctrl-C after the first step -> (run folder, exit code, what it said)."""
    output = folder / "stopped"
    process = subprocess.Popen([sys.executable, "train_cdrl.py", "--output", str(output), *TINY, "--steps", "500"], cwd=ROOT,
                               env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (output / "metrics.jsonl").exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    return output, process.communicate(timeout=60)[1], process.returncode


def test_the_learning_rate_warms_up_and_falls(first):
    lr = parse([]).lr
    assert [row["lr"] for row in log(first)] == pytest.approx([lr / 5, lr * 2 / 5 * 2 / 3, lr * 3 / 5 / 3])


def test_the_log_holds_every_term_per_view(first):
    row = log(first, times=True)[0]
    for view in ("original", "noised"):
        for name in ("reward", "perception", "calibration", "outcome", "format", "confidence", "entropy", "length",
                     "truncated", "zero_variance", "distinct"):
            assert f"{view}/{name}" in row
    assert {"gap", "kl", "grad_norm", "seconds/sample", "seconds/learn"} <= set(row)


def test_a_run_opens_with_plain_transformers(first):
    model = AutoModelForImageTextToText.from_pretrained(first)
    processor = AutoProcessor.from_pretrained(first)
    s = data.synthetic("test", 0, 0)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": data.prompt(s)}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=s.images, return_tensors="pt")
    reply = model.generate(**inputs, max_new_tokens=30, do_sample=False)[:, inputs["input_ids"].shape[1]:]
    assert "\\boxed" in processor.batch_decode(reply, skip_special_tokens=True)[0]


def weights(path):
    return AutoModelForImageTextToText.from_pretrained(path).state_dict()


def furthest(a, b):
    one, other = weights(a), weights(b)
    return max((one[k] - other[k]).abs().max().item() for k in one)


def test_killed_and_resumed_equals_undisturbed_and_on_other_ranks_nearly(first, replicated, sharded, resumed_alone,
                                                                        resumed_replicated, resumed_sharded):
    """kill -9, then the same command: the same log and weights as a run of its own, bit for bit. Then on another number of
    ranks."""
    for folder, undisturbed in ((resumed_alone, first), (resumed_replicated, replicated), (resumed_sharded, sharded)):
        assert log(folder / "killed") == log(undisturbed)
        for name in ("model.safetensors", "samples.jsonl"):
            assert (folder / "killed" / name).read_bytes() == (undisturbed / name).read_bytes()
        assert furthest(folder / "other", first) < 1e-5 and not (folder / "other-1").exists()
        assert len(log(folder / "other")) == 3


def test_what_was_damaged_in_a_run_folder_is_named_and_a_first_torn_write_is_no_run(first, tmp_path, capfd, monkeypatch):
    args = train_cdrl.parse(["--output", str(tmp_path / "run"), *TINY, "--steps", "4"])
    shutil.copytree(first, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes((first / "metrics.jsonl").read_bytes() + b"[1]\n\xff\n")
    newest = checkpoint.checkpoints(tmp_path / "run")[-1]
    state = next((newest / "state").glob("*.safetensors"))
    whole = state.read_bytes()
    flipped = whole[:len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1:]
    for torn in (whole[:1000], b"", flipped):
        state.write_bytes(torn)
        with pytest.raises(InputError, match=f"{newest.name} is damaged .* there is none before it"):
            train_cdrl.train(args)
    assert not (tmp_path / "run" / "model.safetensors").exists()        # that of the shorter run, which this one goes on from
    state.write_bytes(whole)
    (newest / "training.json").write_bytes((newest / "training.json").read_bytes()[:50])
    with pytest.raises(InputError, match=f"{newest.name} is damaged"):
        train_cdrl.train(args)
    capfd.readouterr()
    logs.trim_logs(tmp_path / "run", 2)
    assert log(tmp_path / "run") == log(first)[:2] and not capfd.readouterr().err
    logs.trim_logs(tmp_path / "run", 3)
    assert "has lost 1 of the 3 steps" in capfd.readouterr().err
    (tmp_path / "run" / "args.json").write_text("[1]")
    with pytest.raises(InputError, match="not a run"):
        checkpoint.prepare(args)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "args.json.tmp").write_text("{")
    assert checkpoint.prepare(args) == (tmp_path / "run", None)
    (torn := tmp_path / "run" / ".checkpoint-1.tmp").mkdir()
    monkeypatch.setattr(checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="cannot be written .No space"):
        checkpoint.prepare(args)
    assert not torn.exists()                    # what fills the disk is gone, and the next try has room
    monkeypatch.setattr(checkpoint.Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.raises(InputError, match="holds other settings .lr. and cannot be moved to .*Read-only"):
        checkpoint.prepare(train_cdrl.parse(["--output", str(tmp_path / "run"), *TINY, "--steps", "4", "--lr", "1"]))


def test_a_full_disk_and_weights_that_are_not_finite_are_a_sentence_and_no_checkpoint(fresh, tmp_path, monkeypatch):
    def save(step):
        checkpoint.save_checkpoint(tmp_path, fresh, policy, optimizer, step, {}, 2, torch.float32)
    policy = distributed.Policy(fresh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    (tmp_path / ".checkpoint-1.tmp" / "state").mkdir(parents=True)          # by another rank, whose writer makes it as well
    save(1)
    full = OSError(28, "No space left on device")
    for place, name, error, said in (
            (distributed, "save_state", full, "No space left on device"),
            (distributed, "save_state", RuntimeError("[enforce fail] unexpected pos 704 vs 598"), "unexpected pos"),
            (distributed, "save_state", SafetensorError("I/O error: No space left on device (os error 28)"), "No space"),
            (fresh.model, "save_pretrained", SafetensorError("I/O error: No space left on device (os error 28)"), "No space")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(InputError, match=f"checkpoint-2 cannot be written .*{said}.*is the disk full"):
                save(2)
        assert not (tmp_path / ".checkpoint-2.tmp").exists()                # what was written makes room again
    next(policy.parameters()).data[0] = float("nan")
    with pytest.raises(InputError, match="is not finite after step 2; lower --lr"):
        save(2)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-1"]
    with pytest.raises(SystemExit) as stop:
        cli.command("x.py", lambda: (_ for _ in ()).throw(OSError(28, "No space left on device", "runs/log")))
    assert stop.value.code == 2


def test_a_signal_in_the_last_step_ends_the_run_before_its_tables_and_the_same_command_makes_them(tmp_path, monkeypatch):
    args = parse(["--output", str(tmp_path / "run"), *TINY, "--steps", "1", "--eval_size", "4"])
    save = checkpoint.save_checkpoint
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda *a: (save(*a), os.kill(os.getpid(), signal.SIGINT)))
    with pytest.raises(SystemExit) as stop:
        train_cdrl.train(args)
    assert stop.value.code == 130 and (tmp_path / "run" / "checkpoint-1").is_dir()
    assert not (tmp_path / "run" / "after.json").exists()
    assert train_cdrl.train(args) and len(log(tmp_path / "run")) == 1 and (tmp_path / "run" / "report.png").exists()


def test_ctrl_c_saves_the_step_under_way(interrupted):
    output, error, code = interrupted
    steps = len(log(output))
    assert code == 130 and f"stopped after step {steps}" in error
    assert (output / f"checkpoint-{steps}").is_dir()


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_ranks_equal_one(first, replicated, sharded, shard):
    """The same global batch on two processes, each with all of the state or with a share of it: the same questions and
    words, the same losses, the same weights up to float noise."""
    two = replicated if shard == "none" else sharded
    for a, b in zip(log(first), log(two), strict=True):
        for key in ("original/outcome", "original/confidence", "original/confidence_std", "original/words", "noised/confidence",
                    "noised/entropy", "gap", "loss", "grad_norm"):
            assert abs(a[key] - b[key]) < 1e-5 * max(1, abs(a[key])), (key, a[key], b[key])
    assert furthest(first, two) < 1e-5


def test_ranks_with_uneven_work_wait_for_each_other(uneven):
    """One rank's completions are cut after one word, the other's are long and need more forward passes: `run` has a time
    limit."""
    few, many = (int((uneven / f"uneven.py.{rank}").read_text()) for rank in (0, 1))
    assert len(log(uneven / "run")) == 3 <= few < many


def test_bf16_with_fp32_weights_offloaded_frozen_vision_blocks_run_again(first, half_precision):
    """What a GPU does, in one process: close to fp32; the vision tower stays; the final model is bf16."""
    base, half = (weights(path) for path in (ROOT / "tiny" / "base", half_precision))
    assert {str(value.dtype) for value in half.values()} == {"torch.bfloat16"}
    config = json.loads((half_precision / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and [p.name for p in checkpoint.checkpoints(half_precision)] == ["checkpoint-3"]
    assert all(torch.equal(half[name].float(), base[name]) for name in base if "visual" in name)
    assert any(not torch.equal(half[name].float(), base[name]) for name in base if "visual" not in name)
    a, b = log(half_precision), log(first)
    assert abs(a[0]["loss"] - b[0]["loss"]) < 0.05 and abs(a[0]["original/confidence"] - b[0]["original/confidence"]) < 0.2


@pytest.mark.parametrize("script", sorted({*(ROOT / "runs").glob("*.sh")} - {ROOT / "runs" / "paper_table.sh"}),
                         ids=lambda path: path.stem)
def test_the_recipes_for_gpus_are_what_train_cdrl_takes(script, tmp_path):
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", script, "train.jsonl", "--steps", "7"], capture_output=True, text=True, check=True,
                          env={**ENVIRONMENT, "PATH": f"{tmp_path}:{os.environ['PATH']}", "NODES": "2", "HEAD": "a:1"})
    words = done.stdout.splitlines()
    args = parse(words[words.index("train_cdrl.py") + 1:])
    train_cdrl.check(args, 16 if "node" in script.stem else 8 if "gpus" in script.stem else 1)
    assert (args.data, args.steps) == ("train.jsonl", 7)


def test_the_state_of_a_bf16_run_comes_back_in_fp32(tmp_path):
    flags = ["--output", str(tmp_path / "run"), *TINY, "--steps", "1", "--dtype", "bfloat16"]
    train_cdrl.main(flags)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    vlm = VLM.load(tmp_path / "run" / "checkpoint-1", dtype=torch.bfloat16)
    policy = distributed.shard(vlm, torch.device("cpu"), torch.bfloat16, False)
    optimizer = torch.optim.AdamW(policy.parameters())
    rough = {name: weight.clone() for name, weight in distributed.full_state_dict(policy, torch.float32).items()}
    assert checkpoint.load_checkpoint(tmp_path / "run" / "checkpoint-1", policy, optimizer)[0] == 1
    exact = distributed.full_state_dict(policy, torch.float32)
    dist.destroy_process_group()
    assert all(torch.equal(exact[name].bfloat16(), rough[name].bfloat16()) for name in exact)       # the model beside it
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:                # the tied head is stored once
        assert len(file.keys()) == len(exact) and "lm_head.weight" not in {*file.keys(), *exact}
    assert any(not torch.equal(exact[name], rough[name]) for name in exact)
    assert all(state["exp_avg"].dtype == torch.float32 and state["step"] == 1 for state in optimizer.state.values())


def test_a_dry_run_prints_what_is_needed_and_refuses_what_cannot_fit(tmp_path, capsys, monkeypatch):
    train_cdrl.main(["--output", str(tmp_path / "run"), "--dry_run"])
    printed = capsys.readouterr().out
    assert "1,242,688 parameters" in printed and "16 of them pictures" in printed and not (tmp_path / "run").exists()
    (tmp_path / "open.jsonl").write_text('{"id": "q1", "question": "1 + 1?"}\n')
    for flags, why in ((["--memory", "0.1"], "do not fit into 0.1"), (["--max_new_tokens", "5000"], "context is 4096"),
                       (["--clip", "no/clip"], "CLIP model 'no/clip' cannot be loaded"),
                       (["--data", str(tmp_path / "open.jsonl")], "question 'q1' has no answer")):
        with pytest.raises(SystemExit) as stop:
            train_cdrl.main(["--dry_run", *flags])
        assert stop.value.code == 2 and why in capsys.readouterr().err
    monkeypatch.setattr(memory, "host_memory", lambda: 0.01)
    for flags, why in (([], "--memory N for a device that is not here"), (["--offload"], "do without --offload")):
        with pytest.raises(SystemExit):
            train_cdrl.main(["--dry_run", *flags])
        error = capsys.readouterr().err
        assert "GiB of the CPU's memory are needed" in error and why in error and ("offload" in error) == bool(flags)
    train_cdrl.main(["--dry_run", "--offload", "--memory", "1"])                # a plan for another machine
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SystemExit):
        train_cdrl.main(["--dry_run"])
    assert "WORLD_SIZE 'many'" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        train_cdrl.main(["--output", str(tmp_path / "run")])
    assert stop.value.code == 2 and "RANK, MASTER_ADDR, MASTER_PORT is not there; start with" in capsys.readouterr().err


def test_a_torn_probe_is_named_and_a_batch_of_ties_does_not_explode(tmp_path, fresh, clip):
    (tmp_path / "before.json").write_text("[")
    with pytest.raises(InputError, match="before.json is damaged"):
        held_out.read_probe(tmp_path / "before.json", eval.Answer)
    _, views, _ = step_views(fresh, clip, adv_norm="std", alpha=0.0, calibration="none", noised_policy=1.0, temperature=1e-3)
    assert all(view.advantage_divisor == train_cdrl.MIN_DIVISOR for view in views)


def test_other_settings_move_an_earlier_run_aside_and_finished_runs_stay(tmp_path, capsys):
    output = tmp_path / "run"
    args = ["--output", str(output), "--batch_size", "16", "--group_size", "2", "--max_new_tokens", "16", "--eval_size", "4",
            "--scale_questions", "16"]
    train_cdrl.main([*args, "--steps", "1"])
    printed = capsys.readouterr().out
    assert "all, before" in printed and "next: python eval.py" in printed and (output / "report.png").stat().st_size > 10_000
    weights = (output / "model.safetensors").read_bytes()
    train_cdrl.main([*args, "--steps", "1"])
    assert (output / "model.safetensors").read_bytes() == weights and not (tmp_path / "run-1").exists()
    train_cdrl.main([*args, "--steps", "2"])                     # more steps: goes on
    assert len(log(output)) == 2 and not (tmp_path / "run-1").exists()
    train_cdrl.main([*args, "--steps", "1", "--lr", "1e-3"])
    assert len(log(tmp_path / "run-1")) == 2 and len(log(output)) == 1 and "moved to" in capsys.readouterr().out


def test_a_run_of_a_data_file_that_has_changed_is_moved_aside(tmp_path, capsys):
    file, output = tmp_path / "train.jsonl", tmp_path / "run"
    file.write_text("1\n")
    args = parse(["--data", str(file), "--output", str(output)])
    checkpoint.prepare(args)
    checkpoint.prepare(args)
    assert not (tmp_path / "run-1").exists()
    file.write_text("2\n")
    checkpoint.prepare(args)
    assert (tmp_path / "run-1").exists() and "other settings (data_checksum)" in capsys.readouterr().out


def test_mu_and_kl_run_and_are_logged(tmp_path):
    train_cdrl.main(["--output", str(tmp_path / "mu"), *TINY, "--steps", "2", "--mu", "2", "--kl_beta", "0.1", "--lr", "3e-3"])
    rows = log(tmp_path / "mu")
    # In the first update of step 0 policy and reference are one; the second update has left both it and the old policy.
    assert all(row["kl"] > 0 for row in rows) and rows[0]["clipped"] > 0


def test_real_questions_run_through(real, tmp_path):
    """Sizes from 64 to 1,600 px, choices, five images in one question; MathVision is for testing only and stays out."""
    rows = [json.loads(line) for line in (real / "data.jsonl").read_text().splitlines()]
    path = tmp_path / "real.jsonl"
    with open(path, "w") as file:
        for row in rows:
            if not row["source"].startswith(("MathVision", "MathVista")):
                images = row["image"] if isinstance(row["image"], list) else [row["image"]]
                file.write(json.dumps({**row, "image": [str(real / image) for image in images]}) + "\n")
    train_cdrl.main(["--data", str(path), "--allow_outside", "--output", str(tmp_path / "run"), "--steps",
                     "2", "--batch_size", "4",
                     "--group_size", "2", "--eval_size", "4", "--max_new_tokens", "16", "--scale_questions", "4"])
    assert len(log(tmp_path / "run")) == 2

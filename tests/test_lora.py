"""An adapter in place of training all weights (utils/lora.py). Skipped where the optional package peft is absent."""
import importlib.util
import json
import shutil
import sys

import programs
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, ahead
from safetensors.torch import load_file

import catts
import data
import train_cdrl
from utils import distributed, loading, lora, memory
from utils.cli import InputError
from vlm import VLM

BASE = ROOT / "tiny" / "base"
SHORT = ["--steps", "2", "--batch_size", "4", "--group_size", "2", "--eval_size", "0", "--scale_questions", "4", "--save_every",
         "1", "--max_new_tokens", "24", "--lora_rank", "4", "--lora_alpha", "8", "--lr", "1e-3"]


@pytest.fixture
def adapted():
    """tiny/base with an adapter that is no longer zero."""
    pytest.importorskip("peft", reason="peft, which LoRA needs, is not installed")
    vlm = VLM.load(BASE)
    torch.manual_seed(0)
    lora.add(vlm, 4, 8.0, "language", BASE)
    for name, p in vlm.model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(p, std=0.02)
    return vlm


def scores(vlm, mixed):
    images, prompts = mixed
    with torch.no_grad():
        return vlm.score(images, prompts, [torch.arange(20, 30)] * len(prompts)).logprobs


def test_without_peft_one_sentence(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        lora.add(base, 4, 8.0, "language", BASE)


def test_a_new_adapter_changes_nothing_and_learns_alone(base, mixed):
    pytest.importorskip("peft", reason="peft, which LoRA needs, is not installed")
    vlm, wanted = VLM.load(BASE), scores(base, mixed)
    lora.add(vlm, 4, 8.0, "language", BASE)
    assert torch.equal(scores(vlm, mixed), wanted)
    trained = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    vision = {id(p) for p in loading.vision_parameters(vlm)}
    assert trained and all(".lora_" in name for name in trained)
    assert not any(id(p) in vision for p in vlm.model.parameters() if p.requires_grad)
    assert lora.count(base, 4, "language") == sum(p.numel() for p in vlm.model.parameters() if p.requires_grad)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in vlm.model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):                                      # B is zero at first, so that A has no gradient
        images, prompts = mixed
        vlm.score(images, prompts, [torch.arange(20, 30)] * len(prompts)).logprobs.mean().backward()
        optimiser.step()
    moved = {name for name, p in vlm.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained


def test_vision_and_named_layers(base):
    everything, language = (lora.target_layers(base, target) for target in ("all", "language"))
    assert set(language) < set(everything)
    assert all(name.endswith(("q_proj", "v_proj")) for name in lora.target_layers(base, "q_proj, v_proj"))
    with pytest.raises(InputError, match="no linear layer named 'qq_proj'; it has .*q_proj"):
        lora.target_layers(base, "qq_proj")


def test_the_base_under_the_adapter_is_the_reference(base, adapted, mixed):
    images, prompts = mixed
    words = [torch.arange(20, 30)] * len(prompts)
    policy = distributed.Policy(adapted)
    with torch.no_grad():
        adapter_on, adapter_off = (side.score(images, prompts, words).logprobs for side in (policy, lora.Frozen(policy)))
    assert torch.equal(adapter_off, scores(base, mixed))
    assert (adapter_on - adapter_off).abs().max() > 1e-3 and torch.equal(scores(adapted, mixed), adapter_on)


def test_merged_weights_are_base_plus_scaled_product_and_say_the_same(base, adapted, mixed, tmp_path):
    wanted, state = scores(adapted, mixed), adapted.model.state_dict()
    merged = lora.merged_state(adapted.model, state)
    plain = base.model.state_dict()
    assert merged.keys() == plain.keys()
    names = lora.target_layers(base, "language")
    for name in names:
        a, b = (state[f"{name}.lora_{side}.default.weight"] for side in "AB")
        assert torch.equal(merged[f"{name}.weight"], plain[f"{name}.weight"] + 8 / 4 * b @ a)
    assert all(torch.equal(merged[name], plain[name]) for name in plain if name.removesuffix(".weight") not in names)
    loading.save(adapted, tmp_path / "adapter")
    loading.save(adapted, tmp_path / "merged", {key: value.contiguous() for key, value in merged.items()})
    for folder in ("adapter", "merged"):
        torch.testing.assert_close(scores(VLM.load(tmp_path / folder), mixed), wanted, atol=1e-5, rtol=1e-5)
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert VLM.load(tmp_path / "adapter", meta=True).vocabulary == base.vocabulary


def test_the_adapter_opens_in_peft(adapted, base, mixed, tmp_path):
    from peft import PeftModel
    loading.save(adapted, tmp_path)
    vlm = VLM.load(BASE)
    PeftModel.from_pretrained(vlm.model, tmp_path)
    torch.testing.assert_close(scores(vlm, mixed), scores(adapted, mixed), atol=1e-6, rtol=1e-6)


def test_adapters_that_cannot_be_used_are_refused(adapted, tmp_path):
    loading.save(adapted, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for changes, message in ((dict(use_dora=True), "not plain LoRA .use_dora"), (dict(base_model_name_or_path="/no/such"),
                             "adapter of '/no/such', which is not there"), (dict(peft_type="IA3"), "not plain LoRA .IA3")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=message):
            VLM.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="cannot be read"):
        VLM.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds an adapter .* beside a model"):
        VLM.load(tmp_path)


def test_a_run_resumes_bit_for_bit_and_leaves_the_adapter_alone(tmp_path):
    """With the adapter's base as the reference, and with activation checkpointing."""
    pytest.importorskip("peft", reason="peft, which LoRA needs, is not installed")
    through, halved = tmp_path / "through", tmp_path / "halved"
    flags = [*SHORT, "--kl_beta", "0.1", "--activation_checkpointing", "on", "--output"]
    train_cdrl.main([*flags, str(through)])
    shutil.copytree(through, halved)
    shutil.rmtree(halved / "checkpoint-2")
    (halved / "adapter_model.safetensors").unlink()
    train_cdrl.main([*flags, str(halved)])
    weights = [(folder / "adapter_model.safetensors").read_bytes() for folder in (through, halved)]
    assert weights[0] == weights[1]
    assert not (through / "config.json").exists() and not list(through.rglob("model*.safetensors"))
    stored = sum(path.stat().st_size for path in (through / "checkpoint-2" / "state").iterdir())
    assert stored < 0.5 * (BASE / "model.safetensors").stat().st_size
    VLM.load(through)


@ahead
def one_and_two_ranks(folder):
    """The same run on one process and on two that share the weights -> the adapters that they leave (None without peft)."""
    if importlib.util.find_spec("peft") is None:
        return None
    flags = [*SHORT, "--kl_beta", "0.1", "--activation_checkpointing", "on"]
    for name, ranks, more in (("one", 0, []), ("two", 2, ["--shard", "fsdp"])):
        done = programs.run("train_cdrl.py", *flags, *more, "--output", folder / name, ranks=ranks, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(folder / name / "adapter_model.safetensors") for name in ("one", "two")]


def test_two_ranks_that_share_the_weights_train_the_same_adapter(one_and_two_ranks):
    """With the base under the adapter as the reference, and blocks that run again."""
    pytest.importorskip("peft", reason="peft, which LoRA needs, is not installed")
    one, two = one_and_two_ranks
    assert one.keys() == two.keys() and any("lora_B" in name and weight.abs().max() > 1e-4 for name, weight in one.items())
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5


def test_an_adapter_opens_wherever_a_model_does(adapted, tmp_path, capsys):
    """Also one whose base is an adapter's folder itself. Asked greedily, catts.py says what the adapted model says."""
    loading.save(adapted, tmp_path / "adapter")
    shutil.copytree(tmp_path / "adapter", tmp_path / "second")
    config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
    (tmp_path / "second" / "adapter_config.json").write_text(json.dumps(
        config | {"base_model_name_or_path": str(tmp_path / "adapter")}))
    for folder in ("adapter", "second"):
        train_cdrl.main(["--model", str(tmp_path / folder), "--dry_run"])
    sample = data.synthetic("val", 0, 0)
    sample.images[0].save(tmp_path / "a.png")
    flags = [str(tmp_path / "a.png"), sample.question, "--samples", "2", "--expert", "none", "--region", "all", "--max_new_tokens", "8", "--seed",
             "3", "--json"]
    answers = []
    loading.save(adapted, tmp_path / "merged", {name: weight.contiguous() for name, weight in lora.merged_state(
        adapted.model, adapted.model.state_dict()).items()})
    capsys.readouterr()
    for folder in ("adapter", "merged"):
        catts.main([*flags, "--model", str(tmp_path / folder)])
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["answer"] == answers[1]["answer"]
    assert answers[0]["confidence"] == pytest.approx(answers[1]["confidence"], abs=1e-4)


def test_the_plan_counts_what_a_step_holds(adapted, mixed):
    """Weights, gradients and moments to the byte; what the backward pass needs of the blocks is at most the plan's."""
    images, prompts = mixed
    total, trained = distributed.parameters(adapted)
    planned = distributed.state_bytes(total, trained, 1)
    assert distributed.parameters(VLM.load(BASE, meta=True), lora_rank=4) == (total, trained)
    parameters = [p for p in adapted.model.parameters() if p.requires_grad]
    optimiser, stored = torch.optim.AdamW(parameters), {}

    def keep(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    weights = {p.untyped_storage().data_ptr() for p in adapted.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = adapted.score(images, prompts, [torch.arange(20, 40)] * len(prompts)).logprobs.mean()
    loss.backward()
    optimiser.step()
    held = [sum(p.nbytes for p in adapted.model.parameters()), sum(p.grad.nbytes for p in parameters),
            sum(state[name].nbytes for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq"))]
    assert list(planned.values()) == held
    encoded = adapted.encode(images, prompts)
    length, rows = encoded["input_ids"].shape[1], len(prompts)
    read = rows * (length + 20)
    plan = memory.activations(adapted.text_config, read, 4, False, read) + memory.activations(
        adapted.model.config.vision_config, len(encoded["pixel_values"]), 4, False, 0) + 16 * rows * 20 * adapted.vocabulary
    measured = sum(size for pointer, size in stored.items() if pointer not in weights)
    print(f"saved for the backward pass: {measured / 2**20:.1f} MiB, planned {plan / 2**20:.1f}")
    assert 0.2 * plan < measured < 1.1 * plan


def test_merge_leaves_merged_weights_and_the_adapter_in_a_folder(mixed, tmp_path):
    pytest.importorskip("peft", reason="peft, which LoRA needs, is not installed")
    train_cdrl.main([*SHORT, "--merge", "--output", str(tmp_path / "run")])
    merged, adapter = (VLM.load(tmp_path / folder) for folder in ("run", "run/adapter"))
    torch.testing.assert_close(scores(merged, mixed), scores(adapter, mixed), atol=1e-5, rtol=1e-5)


def test_merge_without_an_adapter_is_refused():
    with pytest.raises(SystemExit):
        train_cdrl.main(["--merge"])

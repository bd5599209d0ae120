"""Nothing lost, nothing let in: second processes, touched files, hostile files, signals, numbers that are not finite."""
import errno
import fcntl
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT, ROOT
from PIL import Image
from safetensors import SafetensorError

import catts
import data
import eval
import noise
import train_cdrl
from utils import (
    checkpoint,
    cli,
    distributed,
    finite,
    held_out,
    inputs,
    judge,
    loading,
    locks,
    logs,
    replies,
    results_file,
    schema,
    state_files,
    stored,
    tables,
)
from utils.cli import InputError
from vlm import VLM

SMALL = ["--steps", "2", "--batch_size", "2", "--group_size", "2", "--eval_size", "0", "--max_new_tokens", "4",
         "--scale_questions", "2", "--save_every", "1", "--patience", "0"]
HOLDER = "import sys, time; from utils import locks; locks.hold(sys.argv[1]); print('held', flush=True); time.sleep(60)"


def train(output, *flags):
    return train_cdrl.train(train_cdrl.parse(["--output", str(output), *SMALL, *map(str, flags)]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two steps, to be copied."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(folder)
    return folder


@pytest.fixture(autouse=True)
def no_lock_stays():
    yield
    locks.release()


# ---- Two processes on one output

def test_a_lock_names_its_holder_is_freed_by_a_kill_and_leaves_nothing(tmp_path, capsys):
    output = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        (tmp_path / "link").symlink_to(output)
        for path in (output, tmp_path / "link"):
            with pytest.raises(InputError, match=f"is being written by process {holder.pid} .* on host .* since 20"):
                locks.hold(path)
    finally:
        holder.kill()
        holder.wait()
    with locks.held(output):
        locks.hold(output)                                  # again in one process: nothing
        assert locks.lock_file(output).exists()
    assert not list(tmp_path.glob(".*")) and not capsys.readouterr().err
    locks.lock_file(output).write_text(json.dumps({"pid": 7, "host": "elsewhere", "command": "\x1b[2J"}))
    locks.hold(output)                                      # a kill on another machine, or a lock that is seen on one alone
    said = capsys.readouterr().err
    assert "process 7" in said and "on host elsewhere" in said and "\x1b" not in said


def test_a_file_system_that_cannot_lock_is_named_and_one_that_cannot_write_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks available")))
    locks.hold(tmp_path / "run")
    assert "cannot lock (No locks available)" in capsys.readouterr().err
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        locks.hold(tmp_path / "file" / "run")


def test_a_second_training_is_refused_before_anything_is_touched_and_the_lock_ends_with_the_run(tmp_path, monkeypatch):
    output = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(output)], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(InputError, match=f"written by process {holder.pid}"):
            train(output)
        assert not output.exists()
    finally:
        holder.kill()
        holder.wait()
    train(output)
    assert not list(tmp_path.glob(".*"))


# ---- What the user has

def test_an_output_is_never_an_input_also_by_links(tmp_path):
    (tmp_path / "q.jsonl").write_text("{}")
    (tmp_path / "soft").symlink_to(tmp_path / "q.jsonl")
    os.link(tmp_path / "q.jsonl", tmp_path / "hard")
    for output in ("q.jsonl", "soft", "hard", "."):
        with pytest.raises(InputError, match="is or holds --data .* would be overwritten"):
            inputs.refuse_as_output(tmp_path / output, model="owner/name", data=str(tmp_path / "q.jsonl"))
    inputs.refuse_as_output(tmp_path / "out.jsonl", data=str(tmp_path / "q.jsonl"), model=None)
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    before = sorted(path.name for path in tmp_path.iterdir())
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoint-2"):
        with pytest.raises(InputError, match="is or holds --model"):
            checkpoint.prepare(train_cdrl.parse(["--output", str(tmp_path / "run"), "--model", str(source)]))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_link_is_followed_and_a_file_keeps_its_permissions(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "real").write_text("old")
    (tmp_path / "disk" / "real").chmod(0o600)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    cli.write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "real").read_text() == "new"
    assert (tmp_path / "disk" / "real").stat().st_mode & 0o777 == 0o600 and len(list((tmp_path / "disk").iterdir())) == 1


def test_a_finished_run_keeps_its_model_and_a_longer_one_puts_it_into_a_folder(trained, tmp_path, capsys):
    output, args = tmp_path / "run", train_cdrl.parse(["--output", str(tmp_path / "run"), *SMALL])
    shutil.copytree(trained, output)
    whole, log = (output / "model.safetensors").read_bytes(), (output / "metrics.jsonl").read_bytes()
    longer = replace(args, steps=3)
    shutil.copytree(output, tmp_path / "other")
    checkpoint.prepare(longer)
    assert (output / "finished-2" / "model.safetensors").read_bytes() == whole
    assert VLM.load(output / "finished-2", "cpu") and not (output / "model.safetensors").exists()
    for newest in checkpoint.checkpoints(tmp_path / "other"):
        shutil.rmtree(newest)
    with pytest.raises(InputError, match="is a finished run whose checkpoints are gone; .*--resume no"):
        checkpoint.prepare(replace(args, output=str(tmp_path / "other")))
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == whole
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() == log
    for newest in checkpoint.checkpoints(output):           # a run that was not finished: two steps of a log, save_every 1
        shutil.rmtree(newest)
    capsys.readouterr()
    checkpoint.prepare(longer)
    assert (tmp_path / "run-1" / "metrics.jsonl").read_bytes() == log
    assert "2 steps whose checkpoints are gone: moved to" in capsys.readouterr().out


def test_a_run_folder_behind_a_link_stays_on_its_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "run").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
    args = train_cdrl.parse(["--output", str(tmp_path / "run"), *SMALL])
    checkpoint.prepare(args)
    checkpoint.prepare(replace(args, lr=1.0))
    assert (tmp_path / "run").is_symlink() and (tmp_path / "disk" / "run-1" / "args.json").exists()


# ---- What changed underneath

def test_a_model_or_clip_that_changed_since_moves_the_run_aside_by_name(tmp_path, capsys, monkeypatch):
    for name in ("base", "clip"):
        shutil.copytree(ROOT / "tiny" / name, tmp_path / name)
    args = train_cdrl.parse(["--output", str(tmp_path / "run"), *SMALL, "--model", str(tmp_path / "base"), "--clip",
                             str(tmp_path / "clip")])
    checkpoint.prepare(args)
    with monkeypatch.context() as patch:                    # what has the same stamp is not read again
        patch.setattr(cli, "checksum_of", lambda files: pytest.fail("read again"))
        checkpoint.prepare(args)
    for i, (name, file) in enumerate((("model", "base/model.safetensors"), ("clip", "clip/config.json")), 1):
        content = bytearray((tmp_path / file).read_bytes())
        content[-20] ^= 1
        (tmp_path / file).write_bytes(content)
        checkpoint.prepare(args)
        assert f"other settings ({name}_checksum): moved to {tmp_path}/run-{i}" in capsys.readouterr().out
    (tmp_path / "base" / "model.safetensors").touch()       # other times, the same content
    checkpoint.prepare(args)
    assert not (tmp_path / "run-3").exists()
    settings = json.loads((tmp_path / "run" / "args.json").read_text())
    older = {name: value for name, value in settings.items() if name not in ("model_checksum", "clip_checksum", "stamps")}
    (tmp_path / "run" / "args.json").write_text(json.dumps(older))
    checkpoint.prepare(args)                                # a run of an earlier version has kept none
    assert not (tmp_path / "run-3").exists()


def test_a_table_that_is_cut_while_it_is_read_is_a_sentence(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = tmp_path / "q.tsv"
    path.write_text("index\timage_path\tquestion\tanswer\n" + "".join(f"{i}\ta.png\tq?\t7\n" for i in range(9)))
    samples = data.load(str(path))
    assert samples[8].id == "8"
    os.truncate(path, 60)
    with pytest.raises(InputError, match="q.tsv was changed while it was read"):
        samples[8]


# ---- Pickles and code

class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_the_state_of_a_training_holds_no_pickle_and_none_is_read(tmp_path, fresh):
    def policy_and_optimizer():
        policy = distributed.Policy(fresh)
        return policy, torch.optim.AdamW(policy.parameters(), lr=1e-3)
    policy, optimizer = policy_and_optimizer()
    checkpoint.save_checkpoint(tmp_path, fresh, policy, optimizer, 1, {"slope": 0.1 + 0.2}, 2, torch.float32)
    newest = tmp_path / "checkpoint-1"
    kinds = {path.suffix for path in newest.rglob("*") if path.is_file()}
    assert kinds <= {".json", ".jinja", ".safetensors"}
    assert checkpoint.load_checkpoint(newest, *policy_and_optimizer()) == (1, {"slope": 0.1 + 0.2})
    mark, bomb = tmp_path / "ran", pickle.dumps(Bomb(tmp_path / "ran"))
    pickle.loads(bomb).close()
    assert mark.exists()                                    # it does go off
    mark.unlink()
    for name in (".metadata", "rank9-0.safetensors", "__0_0.distcp"):
        (newest / "state" / name).write_bytes(bomb)
    stored = json.loads((newest / "training.json").read_text())
    mended = stored | {"checksums": distributed.checksums(newest / "state")}
    (newest / "training.json").write_text(json.dumps(mended))
    assert checkpoint.load_checkpoint(newest, *policy_and_optimizer())[0] == 1       # files that nobody asks for
    index = json.loads((newest / "state" / "index.json").read_text())
    name = next(iter(index))
    for entry in ({"pieces": [["rank9-0.safetensors", 0, 10**6]]}, {"pieces": [["../../x", 0, 10**6]]}, {"pieces": []},
                  {"pieces": "text"}, {"dtype": "int64"}, {"shape": [1]}):
        (newest / "state" / "index.json").write_text(json.dumps(index | {name: index[name] | entry}))
        (newest / "training.json").write_text(json.dumps(stored | {"checksums": distributed.checksums(newest / "state")}))
        with pytest.raises(InputError, match="checkpoint-1 is damaged"):
            checkpoint.load_checkpoint(newest, *policy_and_optimizer())
    (newest / "state" / "index.json").write_text(json.dumps(index))
    sums = distributed.checksums(newest / "state")
    for change in ({"step": 7}, {"scale": {"slope": "x"}}, {"scale": [1]}, {"rng": []}, {"rng": ["AAAA"]}, {"rng": 5}):
        (newest / "training.json").write_text(json.dumps(stored | {"checksums": sums} | change))
        with pytest.raises(InputError, match="checkpoint-1 is damaged"):
            checkpoint.load_checkpoint(newest, *policy_and_optimizer())
    (newest / "training.pt").write_bytes(bomb)
    with pytest.raises(InputError, match="in pickles, which are not read"):
        checkpoint.load_checkpoint(newest, *policy_and_optimizer())
    assert not mark.exists()


def test_rows_that_ranks_have_written_are_read_by_any_number_of_ranks(tmp_path):
    whole = {"a": torch.arange(10.0).view(5, 2), "b": torch.tensor(3.0), "c": torch.zeros(0, 2)}
    pieces = []
    for rank, rows in enumerate((slice(0, 3), slice(3, 5))):
        share = {**whole, "a": whole["a"][rows]}
        places = {"a": (rows.start, False), "b": (0, True), "c": (0, True)}
        pieces += state_files.write(share, tmp_path, places, rank, 2)
    state_files.write_index(whole, pieces, tmp_path)
    empty = {name: torch.full_like(value, -1) for name, value in whole.items()}
    state_files.read(empty, tmp_path, {name: (0, True) for name in whole})
    assert all(torch.equal(empty[name], whole[name]) for name in whole)
    (tmp_path / next(file for name, file, *_ in pieces if name == "a")).unlink()
    with pytest.raises(state_files.ERRORS):
        state_files.read(empty, tmp_path, {name: (0, True) for name in whole})


CODE = "open({!r}, 'w')\nclass Evil: pass\n"
MAP = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")}


@pytest.mark.parametrize("kind, file, change, words", [
    ("base", "config.json", {"auto_map": MAP, "model_type": "evil"}, "needs code of its own, which is not run"),
    ("base", "config.json", {"_attn_implementation": "evil/kernel"}, "asks for the code of 'evil/kernel'"),
    ("base", "processor_config.json", {"auto_map": MAP, "processor_class": "Evil"}, "cannot be opened"),
    ("base", "generation_config.json", {"eos_token_id": "a"}, "its eos_token_id 'a' is no"),
    ("base", "config.json", [1], "is no JSON object"),
    ("clip", "config.json", {"auto_map": MAP, "model_type": "evil"}, "needs code of its own, which is not run"),
    ("clip", "preprocessor_config.json", {"auto_map": MAP, "image_processor_type": "Evil"}, "needs code of its own"),
    ("base", "pytorch_model.bin", None, "as a pickle .pytorch_model.bin., .* is not read"),
    ("clip", "pytorch_model.bin", None, "as a pickle .pytorch_model.bin., .* is not read")])
def test_no_code_of_a_models_folder_runs_and_nobody_is_asked(kind, file, change, words, tmp_path, monkeypatch):
    folder, mark = tmp_path / "m", tmp_path / "ran"
    shutil.copytree(ROOT / "tiny" / kind, folder)
    (folder / "evil.py").write_text(CODE.format(str(mark)))
    if change is None:
        (folder / "model.safetensors").unlink()
        (folder / file).write_bytes(pickle.dumps(Bomb(mark)))
    else:
        before = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(before | change if isinstance(change, dict) else change))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(InputError, match=words):
        VLM.load(folder, "cpu") if kind == "base" else noise.ClipAttention.from_pretrained(str(folder))
    assert not mark.exists()


# ---- Touched files

def test_a_map_of_another_kind_is_made_again(tmp_path, clip):
    kept = noise.ClipAttention.from_pretrained(cache=tmp_path / "maps")
    s = data.synthetic("test", 0, 2)
    picture = s.pictures()[0]
    before = kept.map(picture, s.question)
    file = kept.cache.file(picture, s.question)
    sound = np.load(file)
    bombs = np.array([Bomb(tmp_path / "ran")], dtype=object)
    for wrong in (np.float32(1), np.zeros((2, 2, 2), np.float32), np.full((4, 4), "x"), sound.astype(np.float64), -sound - 1,
                  sound[:1], bombs, sound * np.nan):
        np.save(file, wrong, allow_pickle=True)
        assert kept.cache.read(picture, s.question) is None
        assert np.array_equal(kept.map(picture, s.question), before) and np.array_equal(np.load(file), sound)
    for content in (b"", b"text", b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 9999999)}"):
        file.write_bytes(content)
        assert kept.cache.read(picture, s.question) is None
    with open(file, "wb") as stream:
        np.savez(stream, sound)
    assert kept.cache.read(picture, s.question) is None and not (tmp_path / "ran").exists()
    shutil.rmtree(tmp_path / "maps")                        # under a running program
    kept.map(picture, s.question)
    assert file.exists()


def test_a_cache_that_cannot_be_written_is_said_once(tmp_path, capsys):
    kept = noise.ClipAttention.from_pretrained(cache=tmp_path / "maps")
    (tmp_path / "maps").rmdir()
    (tmp_path / "maps").write_text("a file")
    for i in range(2):
        s = data.synthetic("test", 0, i)
        kept.map(s.pictures()[0], s.question)
    assert capsys.readouterr().err.count("maps are not kept") == 1


def test_stored_json_of_another_shape_is_named_with_its_place(tmp_path):
    answer = asdict(eval.Answer("q", "count", "1", "7", True, 1.0, 0.5, 0.5, 3, True))
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"0": [answer], "999": [answer]}))
    assert held_out.read_probe(path, eval.Answer, [0, 999])[999] == [eval.Answer(**answer)]
    for content, words in (({"0": [answer]}, "999 is missing"), ({"0": [answer], "999": []}, "without answers"), ([], "an object is"),
                          ({"0": [answer], "999": [answer | {"confidence": "x"}]}, r"999\[0\].confidence is 'x' where a number"),
                          ({"0": [answer], "999": [answer | {"correct": 1}]}, "true or false is expected"),
                          ({"0": [answer], "999": [answer | {"confidence": float("nan")}]}, "where a number"),
                          ({"0": [answer], "999": [answer | {"length": 10**400}]}, "a whole number is expected"),
                          ({"0": [answer], "999": [{}]}, r"999\[0\].id is missing"), ({"0": [answer], "999": "text"}, "a list is")):
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"before.json is damaged .*{words}"):
            held_out.read_probe(path, eval.Answer, [0, 999])
    assert schema.fault({"a": None, "b": {"c": [1]}}, {"a": (str, None), "b": schema.Each([int, ...])}) is None
    assert "a is 5 where text or null" in schema.fault({"a": 5}, {"a": (str, None)}).replace("'", "")


def test_damaged_lines_of_a_log_are_left_out_and_a_damaged_map_of_c_is_named(tmp_path, capsys):
    rows = [{"step": i, "loss": 0.5, "original/reward": 1.0} for i in range(4)]
    lines = [json.dumps(row) for row in rows]
    for i, bad in ((0, '{"step": 0}'), (1, '{"step": "x"}'), (2, "[" * 9999)):
        lines[i] = bad
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    assert logs.training_log(tmp_path) == rows[3:] and "4 lines are damaged" in capsys.readouterr().err
    logs.trim_logs(tmp_path, 4)
    assert len(logs.training_log(tmp_path)) == 1
    for text in ("[1]", "nope", '{"slope": "x", "intercept": 1}', '{"slope": 1}', "[" * 9999):
        (tmp_path / "confidence.json").write_text(text)
        with pytest.raises(InputError, match="confidence.json is damaged"):
            tables.stored_scales([tmp_path])


def test_a_sheet_is_not_drawn_over_its_picture(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="is or holds --image"):
        noise.main([str(tmp_path / "a.png"), "What?", "--output", str(tmp_path / "a.png")])


@pytest.mark.parametrize("error, words", [
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "File name too long: x+; give it a shorter name"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "run/metrics.jsonl"), "run/metrics.jsonl; put it back"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: the disk of the output; make room")])
def test_what_happens_to_files_is_one_sentence(error, words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.command("x.py", lambda: (_ for _ in ()).throw(error))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    import re
    assert re.search(words, lines[0])


def test_a_full_disk_while_a_tokenizer_or_weights_are_written_is_an_os_error(fresh, tmp_path, monkeypatch):
    for error in (Exception("No space left on device (os error 28)"), SafetensorError("I/O error: (os error 28)")):
        monkeypatch.setattr(fresh.processor, "save_pretrained", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(OSError) as caught:
            loading.save_processor(fresh, tmp_path)
        assert caught.value.errno == errno.ENOSPC


# ---- Results files

QUESTIONS = [SimpleNamespace(id=f"q{i}", pictures=list) for i in range(6)]
SHAPE = {"id": str, "confidence": float}


def answered(batch):
    return [{"id": s.id, "confidence": 0.5} for s in batch]


def resumed(output, answer_batch=answered, shape=SHAPE):
    return results_file.run_resumable(answer_batch, QUESTIONS, output, {"seed": 0}, 2, shape=shape)


def test_a_scheduler_ends_a_results_file_after_its_batch_and_the_same_command_goes_on(tmp_path, capsys):
    asked = []

    def stopped(batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return answered(batch)

    def counted(batch):
        asked.extend(s.id for s in batch)
        return answered(batch)
    with pytest.raises(SystemExit) as stop:
        resumed(tmp_path / "r.jsonl", stopped)
    assert stop.value.code == 0 and "stopped, saved: 2 of 6 questions" in capsys.readouterr().err
    assert list(resumed(tmp_path / "r.jsonl", counted)) == [s.id for s in QUESTIONS] and asked == ["q2", "q3", "q4", "q5"]
    assert {path.name for path in tmp_path.iterdir()} == {"r.jsonl", "r.jsonl.args.json"}


def test_a_touched_row_is_named_with_file_line_and_cure_and_the_rest_stays(tmp_path):
    resumed(path := tmp_path / "r.jsonl")
    lines = path.read_text().splitlines()
    for bad, words in (('{"id": "q1"}', "line 2: confidence is missing; remove that line"),
                       ('{"id": "q1", "confidence": "high"}', "line 2: confidence is 'high' where a number"),
                       ('{"id": "q1", "confidence": NaN}', "line 2: confidence is 'nan'"), ("[1]", "line 2 is no result"),
                       ("nope", "line 2 is no result"), ("[" * 9999, "line 2 is no result"), ('{"id": ["q1"]}', "line 2 is no")):
        path.write_text("\n".join([lines[0], bad, *lines[2:]]) + "\n")
        with pytest.raises(InputError, match=f"r.jsonl, {words}"):
            resumed(path)
        assert path.read_text().splitlines()[1] == bad
    path.write_text("\n".join([lines[0], *lines[2:]]) + '\n{"id": "q1", "conf')         # torn by a kill
    assert len(resumed(path)) == 6


def test_a_file_of_another_kind_is_not_written_over_and_a_link_is_followed(tmp_path):
    for i, text in enumerate(("hello", '{"question": "?"}', '{"id": "1", "image": "a.png"}')):
        (tmp_path / f"{i}.jsonl").write_text(text)
        with pytest.raises(InputError, match="line 1"):
            resumed(tmp_path / f"{i}.jsonl")
        assert (tmp_path / f"{i}.jsonl").read_text() == text and not (tmp_path / f"{i}.jsonl.args.json").exists()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "disk" / "r.jsonl")
    assert len(resumed(tmp_path / "link.jsonl")) == 6 and (tmp_path / "link.jsonl").is_symlink()
    assert (tmp_path / "disk" / "r.jsonl").read_text().count("\n") == 6


def test_a_second_program_on_a_results_file_is_refused(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "r.jsonl")], cwd=ROOT, env=ENVIRONMENT,
                              stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        with pytest.raises(InputError, match=f"written by process {holder.pid}"):
            resumed(tmp_path / "r.jsonl")
        assert {path.name for path in tmp_path.iterdir()} == {".r.jsonl.lock"}
    finally:
        holder.kill()
        holder.wait()


def test_a_number_that_is_not_finite_is_stored_as_no_result(tmp_path):
    def spoilt(batch):
        return [{"id": s.id, "confidence": float("nan") if s.id == "q3" else 0.5} for s in batch]
    with pytest.raises(InputError, match="question 'q3': confidence is 'nan' .* its batch is not stored"):
        resumed(tmp_path / "r.jsonl", spoilt)
    assert len(resumed(tmp_path / "r.jsonl")) == 6 and "NaN" not in (tmp_path / "r.jsonl").read_text()


def test_what_the_programs_store_has_the_shapes_that_are_checked(base, clip):
    settings = catts.Settings(samples=2, max_new_tokens=8, modules="self_check")
    controller = catts.Controller(base, None, clip, settings)
    samples = [data.synthetic("test", 0, i) for i in range(2)]
    for r, s in zip(controller.answer_all(samples), samples):
        assert schema.fault(json.loads(json.dumps(catts.record(r, s))), stored.RESULT) is None
    sampling = {"max_new_tokens": 8}
    for row in eval.prober(base, clip, ["key"], (0, 500), 0.5, 2, 0, **sampling)(samples):
        args = SimpleNamespace(probe_samples=2, regions=["key"], t=(0, 500))
        shape = stored.probe_row(eval.Answer, args, eval.STATES)
        row = json.loads(json.dumps(row))
        assert schema.fault(row, shape) is None
        del row["found"]["key"]["500"][1]
        assert "found.key.500 has 1 entries where 2 are expected" in schema.fault(row, shape)


# ---- Replies and pictures

def test_a_row_of_roots_is_judged_in_linear_time():
    began = time.process_time()
    for n in (100, 900):
        assert not judge.equivalent("\u221a" * n, "1/2") and not judge.equivalent("\\" * n + "{x", "7")
    assert time.process_time() - began < 1 and judge.equivalent(r"\frac{1}{23}", "1/23")
    assert not judge.equivalent(r"\frac{1}{23}", r"\frac{12}{3}")


def test_a_long_fence_is_read_in_linear_time():
    text = "```" + " " * 9_000 + "[0.5, 0.5]" + "\n" * 9_000 + "x" + " " * 9_000 + "``"
    began = time.process_time()
    for parse in (lambda: replies.parse_list(text), lambda: replies.parse_order(text, data.MODULES)):
        with pytest.raises(ValueError):
            parse()
    assert time.process_time() - began < 1 and replies.parse_list("```json\n[1, 2]\n```") == [1, 2]
    assert replies.parse_list("``` [1] ```") == [1]


def test_a_few_bytes_that_claim_many_pixels_are_not_decoded():
    Image.new("1", (8000, 8000)).save(buffer := io.BytesIO(), "PNG")
    with pytest.raises(InputError, match="8000 x 8000 pixels from .* bytes: it is blank, or made to fill the memory"):
        data.Sample("q", [buffer.getvalue()], "?").pictures()
    Image.new("L", (1000, 1000)).save(buffer := io.BytesIO(), "PNG")           # a small blank one is fine
    assert data.Sample("q", [buffer.getvalue()], "?").pictures()[0].size == (1000, 1000)


# ---- Terminals and signals

def test_a_terminal_shows_text_and_obeys_none(capsys):
    evil = "a\x1b[2J\x1b]0;title\x07b\u202ec\nforged line"

    def main():
        print(evil)
        sys.stderr.write("\rbar \x1b[31m\n")
        print(cli.table({evil: {evil: evil}}))
        raise InputError(f"file {evil} is missing")
    with pytest.raises(SystemExit):
        cli.command("x.py", main)
    out, err = capsys.readouterr()
    assert not {*"\x1b\x07\u202e"} & {*out + err} and err.startswith("\rbar ")
    assert err.splitlines()[-1].startswith("x.py: file a") and "forged line is missing" in err.splitlines()[-1]
    assert sys.stdout is not None and not isinstance(sys.stdout, cli.Terminal)


@pytest.fixture(autouse=True)
def hears_hangups():
    """Also where the tests run under nohup, which ignores them."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_and_a_closed_terminal_end_a_program_with_code_0(number, capsys):
    def main():
        os.kill(os.getpid(), number)
        time.sleep(5)
    with pytest.raises(SystemExit) as stop:
        cli.command("x.py", main)
    assert stop.value.code == 0 and f"stopped by {number.name}; what was written is saved" in capsys.readouterr().err
    with distributed.stop_on_signals() as request:
        os.kill(os.getpid(), number)
        assert request.came and request.exit_code == 0
        os.kill(os.getpid(), signal.SIGINT)
        assert request.exit_code == 130
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)          # nohup
    try:
        with distributed.stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.came
    finally:
        signal.signal(signal.SIGHUP, ignored)
    thread = threading.Thread(target=lambda: cli.command("x.py", lambda: None))     # no handler can be set there
    thread.start()
    thread.join()


def test_a_signal_while_python_is_loaded_ends_a_program_with_code_0_and_an_import_changes_no_handler(tmp_path):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    (tmp_path / "catts.py").write_text("import utils.early, time\nprint('begins', flush=True)\ntime.sleep(30)\n")
    process = subprocess.Popen([sys.executable, str(tmp_path / "catts.py")], env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert "catts.py: stopped by SIGTERM before it began" in process.communicate(timeout=20)[1] and process.returncode == 0


def test_a_closed_terminal_saves_the_step_under_way(tmp_path, monkeypatch):
    write = logs.write_step
    monkeypatch.setattr(logs, "write_step", lambda *a: (write(*a), os.kill(os.getpid(), signal.SIGHUP)))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path / "run")
    assert stop.value.code == 0 and (tmp_path / "run" / "checkpoint-1").is_dir()


# ---- Numbers

def update(step, spoil=lambda original, noised, sums: None):
    """A step's numbers, of two questions with two rollouts each -> as `finite.first_fault` takes them."""
    samples = [SimpleNamespace(id=f"q{i}") for i in range(2)]
    def view(name, rows):
        rollout = SimpleNamespace(logprobs=torch.zeros(3))
        return SimpleNamespace(view=name, confidence=torch.ones(2, 2), rewards={"calibration": torch.zeros(2, 2)}, rows=rows,
                               advantages=torch.zeros(2, 2), rollouts=[[rollout] * 2 for _ in range(2)],
                               old_logprobs=torch.zeros(4, 3))
    original, noised = view("original", [0, 1]), view("noised", [2, 3])
    sums = {"kl": 0.0, "pathwise": 0.0, "loss": 0.0, "grad_norm": 1.0}
    spoil(original, noised, sums)
    return step, samples, [original, noised], [([original, noised], 1.0)], sums


def at(tensor, place):
    tensor[place] = float("nan")


@pytest.mark.parametrize("spoil, words", [
    (lambda o, n, s: at(n.confidence, (1, 0)), "confidence of question 'q1' on the noised view"),
    (lambda o, n, s: at(o.rewards["calibration"], (0, 1)), "the term calibration of question 'q0' on the original view"),
    (lambda o, n, s: at(o.advantages, (1, 1)), "advantage of question 'q1'"),
    (lambda o, n, s: at(n.old_logprobs, (2, 0)), "the log-probs in the loss of question 'q1' on the noised view"),
    (lambda o, n, s: s.update(pathwise=float("inf"), loss=float("inf")), "the pathwise term"),
    (lambda o, n, s: s.update(grad_norm=float("nan")), "the gradient")])
def test_a_number_that_is_not_finite_is_named_and_its_step_skipped(spoil, words, capsys):
    steps = finite.FiniteSteps(train_cdrl.parse(["--steps", "9"]))
    assert steps(*update(0)) and not steps(*update(1, spoil)) and steps.skipped == 1
    assert f"step 1 is skipped: {words}" in capsys.readouterr().err
    assert steps(*update(2)) and steps.in_a_row == steps.skipped == 0
    assert not steps(*update(3, spoil)) and not steps(*update(4, spoil))
    with pytest.raises(InputError, match=f"{words}.* is not finite in step 5, number 3 in a row; .*newest checkpoint"):
        steps(*update(5, spoil))
    steps = finite.FiniteSteps(train_cdrl.parse(["--steps", "9"]))
    assert not steps(*update(8, spoil)) and steps.in_a_row == 0         # alone at the end: the run is saved
    assert not steps(*update(7, spoil))
    with pytest.raises(InputError, match="in step 8, number 2"):        # a run that ends with two
        steps(*update(8, spoil))


def test_a_skipped_step_changes_no_weight_and_is_counted_in_the_log(tmp_path, monkeypatch):
    draw = train_cdrl.roll_out

    def spoilt(policy, samples, images, noised, control, inputs, step, *rest):
        views = draw(policy, samples, images, noised, control, inputs, step, *rest)
        if step == 1:
            at(views[0].confidence, (0, 0))
        return views
    monkeypatch.setattr(train_cdrl, "roll_out", spoilt)
    train(tmp_path / "run", "--steps", 3, "--keep", 9)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows] == [0, 1, 0]
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize("flags", [["--max_new_tokens", 1], ["--noise_t", 0], ["--controls", 1], ["--data", "one.jsonl"]],
                         ids=["one token", "t = 0", "all controls", "one row"])
def test_the_smallest_runs_are_defined(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (56, 56), "red").save("a.png")
    (tmp_path / "one.jsonl").write_text(json.dumps({"id": "1", "image": "a.png", "question": "Which colour?", "answer": "red"}))
    train(tmp_path / "run", *flags)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(np.isfinite(value) for row in rows for value in row.values())
    if "--noise_t" in flags:
        assert all(row["gap"] == pytest.approx(0, abs=1e-4) for row in rows if "gap" in row) or rows[0]["noised/confidence"]
    if "--controls" in flags:
        assert all(row["original/perception"] == 0 for row in rows)


def test_an_empty_completion_is_refused_by_the_score_and_never_sampled(base):
    s = data.synthetic("val", 0, 0)
    with pytest.raises(ValueError, match="perhaps empty"):
        base.score([s.pictures()], [data.prompt(s)], [[]])
    (group,) = base.sample([s.pictures()], [data.prompt(s)], n=2, max_new_tokens=1)
    assert all(len(r.tokens) == 1 and r.confidences.isfinite().all() for r in group)


def test_settings_nested_too_deep_are_a_sentence(tmp_path):
    deep = "[" * 100_000
    with pytest.raises(ValueError, match="too deep"):
        cli.parse_json(deep)
    with pytest.raises(InputError, match="no JSON object"):
        cli.json_object("--expert_options", deep)
    (tmp_path / "results.jsonl.args.json").write_text(deep)
    with pytest.raises(InputError, match="is not what this program wrote"):
        list(results_file.run_resumable(None, [], str(tmp_path / "results.jsonl"), {}, 1, "q"))

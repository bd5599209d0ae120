"""Experts and bases behind servers: replies that are read or refused, and servers as they really are."""
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import servers
import torch
from conftest import ROOT

import data
from catts import Controller, Settings, tally
from data import MODULES
from utils import cli, results_file
from utils.cli import InputError
from utils.experts import LocalExpert, Server, ServerExpert, ServerVLM, parse_order, parse_probabilities
from vlm import VLM, Rollout

TAUS = {"samples": 1.0, "voter": 0.5, "self_reflection": 0.5, "self_check": 0.5}
KEY = "sk-very-secret-0123"


@pytest.fixture(scope="module")
def expert():
    return LocalExpert(VLM.load(ROOT / "tiny" / "expert"), 192)


@pytest.fixture(scope="module")
def questions():
    return list(data.load("synthetic", "test", 12))


# ---- Replies

def test_replies_are_parsed_strictly():
    assert parse_probabilities("[2, 6]", 2) == [0.25, 0.75]
    assert parse_probabilities("```json\n[0.5, 0.5, 0]\n```", 3) == [0.5, 0.5, 0]
    for bad in ("[1]", "[1, 1, 1]", "[0, 0]", "[1, -1]", "[1, NaN]", "[1, Infinity]", '[1, "1"]', "1, 1", "[1, true]",
                "[1, 1] because", "[1, 1e999]"):
        with pytest.raises(ValueError):
            parse_probabilities(bad, 2)
    assert parse_order(json.dumps(MODULES), MODULES) == list(MODULES)
    for bad in ('["self_check"]', json.dumps([*MODULES, "self_check"]), "[1, 2, 3]", "[[], [], []]"):
        with pytest.raises(ValueError):
            parse_order(bad, MODULES)


# ---- Servers that misbehave

class Misbehaving(BaseHTTPRequestHandler):
    """Speaks the OpenAI protocol; `server.mood` is a list of what to do with the next requests, then all is well."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((body, self.headers.get("Authorization")))
        mood = self.server.mood.pop(0) if self.server.mood else "good"
        if isinstance(mood, int):
            self.send_response(mood)
            if mood == 429:
                self.send_header("Retry-After", "0")
            if mood == 302:
                self.send_header("Location", self.server.elsewhere)
            self.end_headers()
            self.wfile.write(f"your key {self.headers.get('Authorization')} is bad".encode())
            return
        if mood == "closed":
            self.connection.close()
            return
        if mood == "slow":
            time.sleep(1.5)
        if mood == "header drip":
            try:
                for _ in range(40):
                    self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    time.sleep(0.05)
            except OSError:
                return
        content = self.server.reply(body)
        text = {"html": "<html>busy</html>", "truncated": json.dumps(content)[:-20], "big": "x" * 10_000_000,
                "list": "[]", "deep": "[" * 100_000, "empty": "{}", "error": '{"error": {"message": "overloaded"}}',
                "silent": '{"choices": [{"message": {"content": null}}]}'}.get(mood, self.server.edit(json.dumps(content)))
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        try:
            if mood == "drip":
                for letter in text:
                    self.wfile.write(letter.encode())
                    self.wfile.flush()
                    time.sleep(0.05)
            else:
                self.wfile.write(text.encode())
        except OSError:
            pass                    # the client has had enough

    def log_message(self, *_):
        pass


def play_expert(body):
    """A well-behaved Expert: the reply that the prompt's role asks for, echoing the key as a nasty server might."""
    prompt = body["messages"][0]["content"][-1]["text"]
    if "JSON list of names" in prompt:
        text = json.dumps(MODULES)
    elif "JSON list of probabilities" in prompt:
        text = json.dumps([1] + [0] * (sum(line[:1].isdigit() for line in prompt.split("\n")) - 1))
    else:
        text = f"look again {KEY}"
    return {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"completion_tokens": 5}}


@pytest.fixture
def http():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.mood, server.seen, server.reply, server.edit = [], [], play_expert, lambda text: text
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.elsewhere = server.url + "/other"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()


def endpoint(http, **kwargs):
    return Server(http.url, "big", KEY, **{"timeout": 0.6, "retries": 1, "backoff": 0.01, "workers": 1, **kwargs})


MOODS = ["slow", "drip", "header drip", "error", "silent", 500, 503, 429, 400, 401, 302, "truncated", "html", "big", "closed",
         "list", "deep", "empty"]
SPELT = {"plain": json.dumps,
         "as \\u": lambda text: "".join(f"\\u{ord(c):04x}" for c in text).join('""'),
         "as \\/": lambda text: json.dumps(text).replace("/", "\\/")}


@pytest.mark.parametrize("mood", MOODS)
def test_a_server_that_misbehaves_once_or_always(base, clip, questions, http, mood, tmp_path, caplog):
    sample, settings = questions[0], Settings(modules="self_consistency,self_reflection")
    good = Controller(base, ServerExpert(endpoint(http)), clip, settings).answer(sample)
    assert good.ledger.expert_calls == 3 and not good.ledger.notes and good.ledger.expert_tokens == 15
    http.mood = [mood]
    once = Controller(base, ServerExpert(endpoint(http, cache=tmp_path / "cache")), clip, settings).answer(sample)
    assert once.answer == good.answer
    transient = mood not in (400, 401, 302)
    assert (not any("abstained" in note for note in once.ledger.notes)) == transient
    http.mood = [mood] * 60
    always = Controller(base, ServerExpert(endpoint(http)), clip, settings).answer(sample)
    assert always.answer is not None and all(v.source == "samples" for v in always.votes)
    assert sum("abstained" in note for note in always.ledger.notes) == 3
    written = "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))
    for r in (good, once, always):
        written += json.dumps(r.record(sample, 32)) + results_file.describe(r, tally(r.votes, TAUS), None, TAUS)
    assert KEY not in written + caplog.text and "look again [key]" in written
    assert all(auth == f"Bearer {KEY}" for _, auth in http.seen)
    assert all(part["image_url"]["url"].startswith("data:image/png;base64,") for body, _ in http.seen
               for part in body["messages"][0]["content"][:-1])


@pytest.mark.parametrize("spelling", SPELT)
def test_a_key_is_cut_out_however_json_spells_it(http, tmp_path, spelling):
    key = 'sk-"a/b\\c/0123'
    http.reply = lambda body: {"choices": [{"message": {"content": "HERE"}}], "id": "HERE"}
    http.edit = lambda text: text.replace('"HERE"', SPELT[spelling](f"the key {key}!"))
    (reply,) = ServerExpert(Server(http.url, "big", key, timeout=2, retries=0, cache=tmp_path)).ask([([], "Say it.")])
    assert reply.text == "the key [key]!" and not reply.error
    assert key not in str(json.loads(next(tmp_path.rglob("*.json")).read_text()))


def test_a_short_key_is_no_secret_and_cuts_no_words(http):
    http.reply = lambda body: {"choices": [{"message": {"content": "\\boxed{EMPTY}"}}]}
    (reply,) = ServerExpert(Server(http.url, "big", "EMPTY", timeout=2)).ask([([], "?")])
    assert reply.text == "\\boxed{EMPTY}"


def test_what_cannot_be_used_is_not_cached(http, tmp_path):
    http.mood = ["error", "silent", "html"]
    expert = ServerExpert(endpoint(http, cache=tmp_path, retries=0))
    assert [bool(expert.ask([([], "?")])[0].error) for _ in range(5)] == [True, True, True, False, False]
    assert len(http.seen) == 4              # the fifth came from the disk


def test_the_cache_answers_a_second_run(base, clip, questions, http, tmp_path):
    settings = Settings(modules="self_consistency,self_reflection")
    runs = []
    for _ in range(2):
        before = len(http.seen)
        result = Controller(base, ServerExpert(endpoint(http, cache=tmp_path)), clip, settings).answer(questions[1])
        runs.append((result, len(http.seen) - before))
    assert runs[0][1] == 3 and runs[1][1] == 0 and runs[0][0].votes == runs[1][0].votes
    assert runs[1][0].ledger.cached_calls == 3 and runs[1][0].ledger.expert_calls == 0
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text()[:30])              # torn: asked again
    again = Controller(base, ServerExpert(endpoint(http, cache=tmp_path)), clip, settings).answer(questions[1])
    assert again.votes == runs[0][0].votes and again.ledger.expert_calls == 3


def test_a_server_nobody_runs_is_an_abstention(base, clip, questions):
    server = Server("http://127.0.0.1:9/v1", "big", None, retries=1, backoff=0.01)
    result = Controller(base, ServerExpert(server), clip, Settings(modules="self_consistency")).answer(questions[0])
    assert result.answer is not None and "refused" in " ".join(result.ledger.notes)


def test_keys_that_no_header_carries_and_urls_that_are_none():
    with pytest.raises(InputError) as error:
        Server("http://host/v1", "m", KEY + "\nX: y")
    assert KEY not in str(error.value)
    for url, model in (("ftp://host", "m"), ("http://", "m"), ("http://host/v1", "")):
        with pytest.raises(InputError):
            Server(url, model)


# ---- Servers as they really are: tests/servers.py

@pytest.mark.parametrize("name", [name for name, mood in servers.MOODS.items() if mood.expert])
def test_an_expert_is_heard_or_says_what_to_do(name, capsys):
    mood = servers.MOODS[name]
    replies, requests = servers.as_expert(mood)
    for reply in replies:
        if mood.expert == "right":
            assert reply.value == pytest.approx([0.9, 0.1]), reply.reason
        else:
            assert reply.value is None and reply.failed == mood.open
            assert re.search(mood.expert, reply.reason), reply.reason
            assert reply.failed == bool(re.search(servers.REMEDY, reply.reason)) or not reply.failed
    assert mood.most is None or requests <= mood.most
    assert KEY not in str(replies) + "".join(capsys.readouterr())


@pytest.mark.parametrize("name", [name for name, mood in servers.MOODS.items() if mood.base])
def test_a_base_answers_or_says_what_to_do(name, capsys):
    mood = servers.MOODS[name]
    outcome, requests = servers.as_base(mood)
    if mood.base == "right":
        assert len(outcome) == 4, outcome
        for rollout in outcome:
            assert "3" in rollout.text and "9" not in rollout.text and rollout.failure is None
            # the mean over k alternatives, -0.1 - i each, whatever was unknown
            assert rollout.confidences.mean().item() == pytest.approx(2.1 if name == "five alternatives" else 9.6)
            assert rollout.logprobs.mean().item() == pytest.approx(-0.1)
    else:
        sentences = [str(outcome)] if isinstance(outcome, InputError) else [str(r.failure) for r in outcome]
        assert all(re.search(mood.base, sentence) for sentence in sentences), sentences
        assert isinstance(outcome, InputError) or all(not r.text for r in outcome)
    assert mood.most is None or requests <= mood.most
    assert KEY not in str(outcome) + "".join(capsys.readouterr())


# ---- The base model behind a server

def play_base(body):
    def token(p, n=20):
        return {"token": "x", "logprob": -p, "top_logprobs": [{"token": "y", "logprob": -p - i} for i in range(n)]}
    answers = ["It is \\boxed{3}"] * body["n"] if body["temperature"] == 0 else [
        f"It is \\boxed{{{3 + i % 2}}}" for i in range(body["n"])]
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop",
                         "logprobs": {"content": [token(0.1), token(0.3 + i)]}} for i, text in enumerate(answers)]}


def test_the_base_can_be_a_server(base, expert, clip, questions, http):
    http.reply = play_base
    vlm = ServerVLM(endpoint(http), Rollout)
    rollout = vlm.sample([questions[0].pictures()], ["?"], 4, top_k=40)[0][1]
    body = http.seen[-1][0]
    assert body["logprobs"] is True and body["top_logprobs"] == 20 and body["n"] == 4 and body["top_k"] == 40
    torch.testing.assert_close(rollout.confidences, torch.tensor([0.1 + 9.5, 1.3 + 9.5]))
    torch.testing.assert_close(rollout.logprobs, torch.tensor([-0.1, -1.3]))
    assert rollout.finished and len(rollout.tokens) == 2
    result = Controller(vlm, expert, clip, Settings()).answer(questions[0])
    assert result.answer == "3" and "check_model" in result.skipped["self_check"]
    assert {v.source for v in result.votes} == {"samples", "voter", "self_reflection"}
    checked = Controller(vlm, expert, clip, Settings(), checker=base).answer(questions[0])
    assert any(v.source == "self_check" for v in checked.votes)


def test_a_base_server_without_logprobs_is_refused(http, questions):
    for spoil in (lambda c: c.pop("logprobs"), lambda c: c["logprobs"]["content"][0].update(top_logprobs=[]),
                  lambda c: c["logprobs"]["content"][0].update(logprob=None)):
        def reply(body, spoil=spoil):
            answer = play_base(body)
            spoil(answer["choices"][0])
            return answer
        http.reply = reply
        with pytest.raises(InputError, match="logprobs"):
            ServerVLM(endpoint(http), Rollout).sample([questions[0].pictures()], ["?"], 2)
    http.reply = lambda body: {"choices": play_base(body)["choices"][:1]}
    with pytest.raises(InputError, match="1 answers where 2"):
        ServerVLM(endpoint(http), Rollout).sample([questions[0].pictures()], ["?"], 2)
    http.mood = [500] * 9
    with pytest.raises(InputError, match="500"):
        ServerVLM(endpoint(http), Rollout).sample([questions[0].pictures()], ["?"], 2)


@pytest.mark.parametrize("spoil", [
    lambda c: c["logprobs"]["content"].clear(), lambda c: c["message"].update(content=None),
    lambda c: c["message"].update(content=""), lambda c: c["logprobs"]["content"][0].update(logprob=float("nan")),
    lambda c: c["logprobs"]["content"][0].update(logprob=10**400), lambda c: c["logprobs"]["content"][0].update(logprob=300),
    lambda c: c["logprobs"]["content"][1]["top_logprobs"][3].update(logprob=-3e38)])
def test_one_bad_completion_of_a_base_server_is_an_unanswered_sample(base, expert, clip, http, questions, spoil):
    def reply(body):
        answer = play_base(body)
        spoil(answer["choices"][-1])
        return answer
    http.reply = reply
    controller = Controller(ServerVLM(endpoint(http), Rollout), expert, clip, Settings(modules="", samples=5))
    result = controller.answer(questions[0])
    assert [v.answer for v in result.votes] == ["3", "4", "3", "4"] and result.answer == "4"     # C rises with i
    assert result.ledger.notes == ["1 of 5 samples gave no answer"]
    json.loads(cli.strict_json(result.record(questions[0], 32)), parse_constant=pytest.fail)


def test_few_alternatives_are_read_alike_and_said(http, capsys):
    def reply(body):
        answer = play_base(body)
        answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [{"logprob": -0.1 - i} for i in range(3)]
        return answer
    http.reply = reply
    (rollout,), = ServerVLM(endpoint(http), Rollout).sample([[]], ["?"], 1)
    torch.testing.assert_close(rollout.confidences, torch.tensor([0.1 + 1, 0.3 + 1]))       # three alternatives each
    assert "3 top_logprobs" in capsys.readouterr().err


def test_a_server_draws_all_its_samples_at_once(http, expert, clip, questions):
    """What it says under one seed depends on how many are asked for: in rounds, `exact` would answer something else."""
    http.reply = play_base
    for early_exit in ("off", "exact"):
        settings = Settings(modules="", weight="equal", early_exit=early_exit)
        assert len(Controller(ServerVLM(endpoint(http), Rollout), expert, clip, settings).answer(questions[0]).rollouts) == 8
    assert [body["n"] for body, _ in http.seen] == [8, 8] and http.seen[0][0]["seed"] == http.seen[1][0]["seed"]

"""Experts and bases behind servers: replies that are read or refused, and servers as they really are."""
import base64
import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import servers
import torch
from conftest import KEY, TAUS
from PIL import Image

import catts
import data
import eval as eval_py
from catts import Controller, Settings, record, tally
from data import MODULES
from utils import cli, results_file, tables
from utils.cli import InputError
from utils.experts import ServerExpert, ServerVLM, ask_role
from utils.overlap import answer_batches
from utils.replies import parse_order, parse_probabilities, read_body
from utils.results_file import STILL_OPEN
from utils.server import Server, data_url, is_url, told_wait
from vlm import Rollout


@pytest.fixture(scope="module")
def questions():
    return list(data.load("synthetic", "test", 12))


# ---- Replies

def test_replies_are_parsed_strictly():
    assert parse_probabilities("[2, 6]", 2) == [0.25, 0.75]
    assert parse_probabilities("```json\n[0.5, 0.5, 0]\n```", 3) == [0.5, 0.5, 0]
    for bad in ("[1]", "[1, 1, 1]", "[0, 0]", "[1, -1]", "[1, NaN]", "[1, Infinity]", '[1, "1"]', "1, 1",
                "[1, true]",
                "[1, 1] because", "[1, 1e999]"):
        with pytest.raises(ValueError):
            parse_probabilities(bad, 2)
    assert parse_order(json.dumps(MODULES), MODULES) == list(MODULES)
    for bad in ('["self_check"]', json.dumps([*MODULES, "self_check"]), "[1, 2, 3]", "[[], [], []]"):
        with pytest.raises(ValueError):
            parse_order(bad, MODULES)


def test_a_number_that_may_be_a_candidate_or_its_place_is_refused():
    candidates = ["2", "1"]
    for vague in ('{"1": 0.9, "2": 0.1}', '[{"candidate": "2", "probability": 0.9}, {"candidate": "1", "probability": 0.1}]',
                  '[{"candidate": 1, "probability": 0.9}, {"candidate": 2, "probability": 0.1}]'):
        with pytest.raises(ValueError, match="candidates or their places"):
            parse_probabilities(vague, 2, candidates)
        assert parse_probabilities("[0.9, 0.1]", 2, candidates) == [0.9, 0.1]
    assert parse_probabilities('{"1": 0.9, "2": 0.1}', 2, ["1", "2"]) == [0.9, 0.1]
    assert parse_probabilities('{"2": 0.9, "7": 0.1}', 2, ["2", "7"]) == [0.9, 0.1]


def test_a_list_in_braces_and_one_beside_another_are_read():
    assert parse_probabilities(r"So \boxed{[0.9, 0.1]}.", 2) == [0.9, 0.1]
    assert parse_probabilities('I say {"candidates": ["a", "b"], "probabilities": [0.9, 0.1]} here', 2) == [0.9, 0.1]


def test_a_torn_stream_is_no_reply():
    events = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": reason}]}
              for piece, reason in (("[0.9,", None), (" 0.1]", "stop"))]
    lines = [f"data: {json.dumps(event)}\n\n".encode() for event in events]
    assert read_body(b"".join(lines))["choices"][0]["message"]["content"] == "[0.9, 0.1]"
    with pytest.raises(ValueError):
        read_body(lines[0])


def test_what_a_url_may_show():
    for secret, public in (
            ("https://me:pw@h/v1", "https://h/v1"), ("https://h/v1?key=abc&api-version=2", "https://h/v1?key=...&api-version=2"),
            ("https://h/v1/4f9a8b7c6d5e4f3a2b1c/openai", "https://h/v1/.../openai"), ("h.ai/token/abc/v1", "h.ai/token/.../v1"),
            ("https://h/sk-live-8f7e6d/v1", "https://h/.../v1")):
        assert cli.public_url(secret) == public
    for plain in ("https://x.openai.azure.com/openai/deployments/gpt-4o-2024-08-06", "http://localhost:8000/v1", "self",
                  "https://h/models/Qwen/Qwen2.5-VL-7B-Instruct/v1", "runs/cdrl", "Qwen/Qwen2.5-VL-7B-Instruct"):
        assert cli.public_url(plain) == plain


# ---- Servers that misbehave

class Misbehaving(BaseHTTPRequestHandler):
    """Speaks the OpenAI protocol; `server.mood` is a list of what to do with the next requests, then all is
    well."""

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
                "list": "[]", "deep": "[" * 100_000, "empty": "{}",
                "error": '{"error": {"message": "overloaded"}}',
                "silent": '{"choices": [{"message": {"content": null}}]}'}.get(mood,
                                                                               self.server.edit(json.dumps(content)))
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
    """A well-behaved Expert: the reply that the prompt's role asks for, echoing the key as a nasty server
    might."""
    prompt = body["messages"][0]["content"][-1]["text"]
    if "JSON list of names" in prompt:
        text = json.dumps(MODULES)
    elif "JSON list of probabilities" in prompt:
        text = json.dumps([1] + [0] * (sum(line[:1].isdigit() for line in prompt.split("\n")) - 1))
    else:
        text = f"look again {KEY}"
    return {"choices": [{"message": {"role": "assistant", "content": text}}],
            "usage": {"completion_tokens": 5}}


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
    return Server(http.url, "big", KEY,
                  **{"timeout": 0.6, "retries": 1, "backoff": 0.01, "workers": 1, **kwargs})


MOODS = ["slow", "drip", "header drip", "error", "silent", 500, 503, 429, 400, 401, 302, "truncated", "html",
         "big", "closed",
         "list", "deep", "empty"]
SPELT = {"plain": json.dumps,
         "as \\u": lambda text: "".join(f"\\u{ord(c):04x}" for c in text).join('""'),
         "as \\/": lambda text: json.dumps(text).replace("/", "\\/")}


@pytest.mark.parametrize("mood", MOODS)
def test_a_server_that_misbehaves_once_or_always(base, clip, questions, http, mood, tmp_path, caplog):
    sample, settings = questions[0], Settings(modules="self_consistency,self_reflection", order="planner")
    good = Controller(base, ServerExpert(endpoint(http)), clip, settings).answer(sample)
    assert good.ledger.expert_calls == 3 and not good.ledger.notes and good.ledger.expert_tokens == 15
    http.mood = [mood]
    once = Controller(base, ServerExpert(endpoint(http, cache=tmp_path / "cache")), clip,
                      settings).answer(sample)
    assert once.answer == good.answer
    transient = mood not in (400, 401, 302)
    assert (not any("abstained" in note for note in once.ledger.notes)) == transient
    http.mood = [mood] * 60
    always = Controller(base, ServerExpert(endpoint(http)), clip, settings).answer(sample)
    assert always.answer is not None and all(v.source == "samples" for v in always.votes)
    assert sum("abstained" in note for note in always.ledger.notes) == 3
    written = "".join(path.read_text() for path in (tmp_path / "cache").rglob("*.json"))
    for r in (good, once, always):
        written += json.dumps(record(r, sample)) + results_file.describe(r, tally(r.votes, TAUS), None, TAUS)
    assert KEY not in written + caplog.text and "look again [key]" in written
    assert all(auth == f"Bearer {KEY}" for _, auth in http.seen)
    assert all(part["image_url"]["url"].startswith("data:image/png;base64,") for body, _ in http.seen
               for part in body["messages"][0]["content"][:-1])


@pytest.mark.parametrize("spelling", SPELT)
def test_a_key_is_cut_out_however_json_spells_it(http, tmp_path, spelling):
    key = 'sk-"a/b\\c/0123'
    http.reply = lambda body: {"choices": [{"message": {"content": "HERE"}}], "id": "HERE"}
    http.edit = lambda text: text.replace('"HERE"', SPELT[spelling](f"the key {key}!"))
    (reply,) = ServerExpert(Server(http.url, "big", key, timeout=2, retries=0,
                                   cache=tmp_path)).ask([([], "Say it.")])
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
    settings = Settings(modules="self_consistency,self_reflection", order="planner")
    runs = []
    for _ in range(2):
        before = len(http.seen)
        result = Controller(base, ServerExpert(endpoint(http, cache=tmp_path)), clip,
                            settings).answer(questions[1])
        runs.append((result, len(http.seen) - before))
    assert runs[0][1] == 3 and runs[1][1] == 0 and runs[0][0].votes == runs[1][0].votes
    assert runs[1][0].ledger.cached_calls == 3 and runs[1][0].ledger.expert_calls == 0
    for path in tmp_path.rglob("*.json"):
        path.write_text(path.read_text()[:30])              # torn: asked again
    again = Controller(base, ServerExpert(endpoint(http, cache=tmp_path)), clip,
                       settings).answer(questions[1])
    assert again.votes == runs[0][0].votes and again.ledger.expert_calls == 3


def test_a_server_nobody_runs_is_an_abstention(base, clip, questions):
    server = Server("http://127.0.0.1:9/v1", "big", None, retries=1, backoff=0.01)
    result = Controller(base, ServerExpert(server), clip,
                        Settings(modules="self_consistency")).answer(questions[0])
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
            c = {"five alternatives": 2.1, "exclusive range": 9.1}.get(name, 9.6)
            assert rollout.confidences.mean().item() == pytest.approx(c)
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
        return {"token": "x", "logprob": -p,
                "top_logprobs": [{"token": "y", "logprob": -p - i} for i in range(n)]}
    answers = ["It is \\boxed{3}"] * body["n"] if body["temperature"] == 0 else [
        f"It is \\boxed{{{3 + i % 2}}}" for i in range(body["n"])]
    return {"choices": [{"message": {"content": text}, "finish_reason": "stop",
                         "logprobs": {"content": [token(0.1), token(0.3 + i)]}} for i,
                         text in enumerate(answers)]}


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
    lambda c: c["message"].update(content=""),
    lambda c: c["logprobs"]["content"][0].update(logprob=float("nan")),
    lambda c: c["logprobs"]["content"][0].update(logprob=10**400),
    lambda c: c["logprobs"]["content"][0].update(logprob=300),
    lambda c: c["logprobs"]["content"][1]["top_logprobs"][3].update(logprob=-3e38)])
def test_one_bad_completion_of_a_base_server_is_an_unanswered_sample(base, expert, clip, http, questions,
                                                                     spoil):
    def reply(body):
        answer = play_base(body)
        spoil(answer["choices"][-1])
        return answer
    http.reply = reply
    controller = Controller(ServerVLM(endpoint(http), Rollout), expert, clip, Settings(modules="", samples=5))
    result = controller.answer(questions[0])
    assert [v.answer for v in result.votes] == ["3", "4", "3",
                                                "4"] and result.answer == "4"     # C rises with i
    assert result.ledger.notes == ["1 of 5 samples gave no answer"]
    json.loads(cli.strict_json(record(result, questions[0])), parse_constant=pytest.fail)


def test_few_alternatives_are_read_alike_and_said(http, capsys):
    def reply(body):
        answer = play_base(body)
        answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [{"logprob": -0.1 - i}
                                                                          for i in range(3)]
        return answer
    http.reply = reply
    (rollout,), = ServerVLM(endpoint(http), Rollout).sample([[]], ["?"], 1)
    torch.testing.assert_close(rollout.confidences,
                               torch.tensor([0.1 + 1, 0.3 + 1]))       # three alternatives each
    assert "3 top_logprobs" in capsys.readouterr().err


def test_a_server_draws_all_its_samples_at_once(http, expert, clip, questions):
    """What it says under one seed depends on how many are asked for: in rounds, `exact` would answer
    something else."""
    http.reply = play_base
    for early_exit in ("off", "exact"):
        settings = Settings(modules="", weight="equal", early_exit=early_exit)
        assert len(Controller(ServerVLM(endpoint(http), Rollout), expert, clip,
                              settings).answer(questions[0]).rollouts) == 8
    assert [body["n"] for body, _ in http.seen] == [8,
                                                    8] and http.seen[0][0]["seed"] == http.seen[1][0]["seed"]


# ---- Whole runs

FLAGS = ["--data", "synthetic", "--limit", "6", "--batch_size", "2", "--samples", "2", "--modules",
         "self_consistency,self_reflection", "--order", "planner", "--expert_model", "big", "--retries", "0", "--max_new_tokens",
         "24"]


def run_catts(server, output, *flags, cache="cache"):
    """catts.py on six questions -> (exit code, rows without their seconds)."""
    code = 0
    try:
        catts.run([*FLAGS, "--expert", f"http://{server.host}/v1", "--output", str(output), "--cache",
                   str(output.parent / cache) if cache else "", *flags])
    except SystemExit as end:
        code = end.code
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    for row in rows:
        row["ledger"].pop("seconds")
    return code, rows


def act_as_expert(request):
    return play_expert(request.body) | {"usage": {"prompt_tokens": 100, "completion_tokens": 5}}


@pytest.mark.parametrize("cache", ["cache", ""])
def test_an_outage_leaves_questions_open_and_the_same_command_closes_them(tmp_path, capsys, cache):
    def ill(request):
        prompt = request.body["messages"][0]["content"][-1]["text"]
        return servers.refuse(500,
                              "the voter is ill") if "JSON list of probabilities" in prompt else act_as_expert(request)
    server = servers.start(act_as_expert)
    try:
        code, undisturbed = run_catts(server, tmp_path / "fine.jsonl", cache=cache and "other")
        assert code == 0 and all(not row["open"] and row["ledger"]["expert_prompt_tokens"] == 300
                                 for row in undisturbed)
        capsys.readouterr()
        for act in (ill, lambda request: servers.refuse(401, "no such key")):
            server.act = act
            code, rows = run_catts(server, tmp_path / "ill.jsonl", cache=cache)
            told = capsys.readouterr()
            assert code == STILL_OPEN and len(rows) == 6 and all("voter" in row["open"] for row in rows)
            assert "Expert failed on 6 of 6 questions" in told.err and "same command" in told.err
            assert "accuracy" not in told.out               # a failure is no result
        server.act = act_as_expert
        code, rows = run_catts(server, tmp_path / "ill.jsonl", cache=cache)
        assert code == 0 and rows == undisturbed
        before = len(server.requests)
        assert run_catts(server, tmp_path / "ill.jsonl", cache=cache) == (0,
                                                                          undisturbed) and len(server.requests) == before
    finally:
        server.shutdown()


def test_one_question_that_a_base_server_refuses_ends_no_run(tmp_path, capsys):
    """Its filter declines the second question, the third breaks it: two are unanswered, one of them for
    good."""
    questions = [data.ask(sample) for sample in data.load("synthetic", "test", 6)]

    def act(request):
        prompt = request.body["messages"][0]["content"][-1]["text"]
        if questions[1] in prompt:
            return servers.refuse(400, "flagged by the content filter")
        return servers.refuse(500, "I broke") if questions[2] in prompt and ill else request.good()

    server, ill = servers.start(act), True
    flags = ["--model", f"http://{server.host}/v1", "--model_name", "m", "--modules", "", "--batch_size", "1",
             "--workers", "2"]
    try:
        code, rows = run_catts(server, tmp_path / "base.jsonl", *flags)
        assert code == STILL_OPEN and [bool(row["open"]) for row in rows] == [False, False, True, False,
                                                                                    False, False]
        assert [row["answer"] for row in rows] == ["3", None, None, "3", "3", "3"]
        assert "flagged by the content filter" in " ".join(rows[1]["ledger"]["notes"]) and "I broke" in rows[2]["open"]["base"]
        assert "base's server failed on 1 of 6" in capsys.readouterr().err
        ill = False
        code, rows = run_catts(server, tmp_path / "base.jsonl", *flags)
        assert code == 0 and [row["answer"] for row in rows] == ["3", None, "3", "3", "3", "3"]
    finally:
        server.shutdown()


def test_secrets_of_urls_and_headers_are_neither_printed_nor_stored(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EXPERT_API_KEY", KEY)
    secrets = ["password-0123", "query-secret-0123", "header-secret-0123", KEY]

    def act(request):
        assert request.headers["x-token"] == secrets[2] and secrets[1] in request.path
        text = f"you sent {request.headers} to {request.path}"
        return play_expert(request.body) if request.count < 10 else servers.refuse(403, text)

    server = servers.start(act)
    url = f"http://me:{secrets[0]}@{server.host}/v1?api_key={secrets[1]}&api-version=2"
    try:
        code, _ = run_catts(server, tmp_path / "out.jsonl", "--expert", url, "--expert_header",
                            f"x-token={secrets[2]}")
        assert code == STILL_OPEN
        server.act = lambda request: play_expert(request.body)
        code, rows = run_catts(server, tmp_path / "out.jsonl", "--expert", url,
                               f"--expert_header=x-token={secrets[2]}")
        assert code == 0 and len(rows) == 6
    finally:
        server.shutdown()
    written = "".join(capsys.readouterr()) + "".join(p.read_text() for p in tmp_path.rglob("*")
                                                     if p.is_file())
    assert not [secret for secret in secrets if secret in written] and "api-version=2" in written


def test_long_runs_need_consent_and_say_what_they_cost(tmp_path, capsys):
    server = servers.start(act_as_expert)
    try:
        with pytest.raises(InputError, match="18 calls.*--yes"):
            run_catts(server, tmp_path / "out.jsonl", "--ask_above", "17")
        assert not server.requests and "Expert: up to 18 calls" in capsys.readouterr().err
        code, rows = run_catts(server, tmp_path / "out.jsonl", "--ask_above", "17", "--yes", "--expert_price",
                               "10", "1000")
        assert code == 0 and len(server.requests) == 18
        assert "money" in (told := capsys.readouterr().out) and f"{(1800 * 10 + 90 * 1000) / 1e6:.3f}" in told
        run_catts(server, tmp_path / "out.jsonl", "--ask_above", "0")           # nothing is left to be asked
    finally:
        server.shutdown()


def test_usage_that_nobody_counts_is_unknown(tmp_path):
    server = servers.start(lambda request: {"choices": play_expert(request.body)["choices"]})
    try:
        _, rows = run_catts(server, tmp_path / "out.jsonl")
        assert all(row["ledger"]["expert_tokens"] is None and row["ledger"]["expert_calls"] == 3
                   for row in rows)
    finally:
        server.shutdown()


def test_batches_travel_together_and_votes_do_not_depend_on_it(base, clip, questions):
    """The server holds replies back until more requests than those of one batch are there."""
    def act(request):
        deadline = time.monotonic() + 20 * hold
        while max(server.active) <= 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        return act_as_expert(request)

    server, hold = servers.start(act), False
    try:
        expert = ServerExpert(Server(f"http://{server.host}/v1", "big", workers=12))
        control = Controller(base, expert, clip, Settings(modules="self_consistency,self_reflection", samples=2,
                                                          max_new_tokens=24))
        batches = [questions[i:i + 2] for i in range(0, 8, 2)]
        apart = [control.answer_all(batch) for batch in batches]
        assert max(server.active) <= 4
        hold, start = True, time.perf_counter()
        together = {id(batch): results for batch, results in answer_batches(control.steps, iter(batches), 4)}
        assert 4 < max(server.active) <= 12 and time.perf_counter() - start < 20
        for batch, results in zip(batches, apart):
            for a, b in zip(results, together[id(batch)]):
                assert (a.answer, a.votes, a.order, a.texts) == (b.answer, b.votes, b.order, b.texts)
    finally:
        server.shutdown()


def test_a_table_says_on_how_many_questions_the_expert_failed(tmp_path, capsys, monkeypatch):
    """Over --max_failed no row is called CA-TTS; the same command then makes the table of an undisturbed
    run."""
    monkeypatch.setattr(tables, "ROUNDS", 10)               # intervals are not what is tested

    def ill(request):
        return act_as_expert(request) if request.count % 5 else servers.refuse(500, "now and then I break")

    def run(output):
        try:
            eval_py.main(["--expert", f"http://{server.host}/v1", "--expert_model", "big", "--data",
                          "synthetic", "--limit",
                          "6", "--samples", "2", "--sizes", "2", "--t", "999", "--regions", "key",
                          "--probe_samples", "1",
                          "--retries", "0", "--max_new_tokens", "24", "--output", str(tmp_path / output),
                          "--cache", str(tmp_path / f"cache of {output}")])
        except SystemExit as end:
            return end.code, capsys.readouterr()
        return 0, capsys.readouterr()

    server = servers.start(act_as_expert)
    try:
        assert run("fine")[0] == 0
        server.act = ill
        code, told = run("ill")
        assert code == STILL_OPEN and "Expert failed on" in told.out and "now and then I break" in told.out
        assert "CA-TTS@2" not in told.out and "+VRC, Expert failed@2" in told.out
        server.act = act_as_expert
        code, told = run("ill")
        assert code == 0 and "CA-TTS@2" in told.out
    finally:
        server.shutdown()
    fine, mended = (json.loads((tmp_path / name / "tables.json").read_text()) for name in ("fine", "ill"))
    assert fine == mended


# ---- What else a server is sent, and when

def test_a_dead_server_is_left_alone():
    server = servers.start(lambda request: servers.refuse(503, "down for maintenance"))
    try:
        expert = ServerExpert(Server(f"http://{server.host}/v1", "big", retries=2, backoff=0.01, workers=4))
        replies = expert.ask([([], str(i)) for i in range(40)])
        assert all(reply.failed and "down for maintenance" in reply.error for reply in replies)
        assert len(server.requests) <= 4 * 3                # one request with its retries for each worker
        server.act = act_as_expert
        assert expert.ask([([], "again")])[0].failed        # not before the pause is over
        expert.server.pace.down_until = 0.0
        assert not expert.ask([([], "again")])[0].failed and not expert.ask([([], "once more")])[0].failed
    finally:
        server.shutdown()


def test_a_429_leaves_fewer_requests_at_once_and_successes_more():
    server = servers.start(lambda request: time.sleep(0.02) or (
        servers.refuse(429, "slow down", {"Retry-After": "0"}) if request.count == 1 else act_as_expert(request)))
    try:
        expert = ServerExpert(Server(f"http://{server.host}/v1", "big", backoff=0.01, workers=8))
        assert not any(reply.failed for reply in expert.ask([([], str(i)) for i in range(8)]))
        assert expert.server.pace.limit == 4
        assert not any(reply.failed for reply in expert.ask([([], str(i)) for i in range(60)]))
        assert 4 < expert.server.pace.limit <= 8
    finally:
        server.shutdown()


def test_only_replies_that_a_role_could_read_stay_in_the_cache(tmp_path):
    server = servers.start(lambda request: request.good("I see a cat." if request.count <= 2 else "[0.9, 0.1]"))
    try:
        expert = ServerExpert(Server(f"http://{server.host}/v1", "big", cache=tmp_path))
        for requests in (3, 5, 5):      # two useless replies, then a good one; the first attempt again, and the cache
            (reply,) = ask_role(expert, [SimpleNamespace(pictures=[])], lambda _: "?",
                                lambda _, text: parse_probabilities(text, 2))
            assert reply.value == pytest.approx([0.9, 0.1]) and len(list(tmp_path.rglob("*.json"))) >= 1
            assert len(server.requests) <= requests
        assert not any("cat" in path.read_text() for path in tmp_path.rglob("*.json"))
    finally:
        server.shutdown()


def test_large_pictures_travel_as_jpegs_of_a_bounded_side():
    def sent(picture, max_side):
        kind, _, code = data_url(picture, max_side).partition(",")
        return kind, Image.open(io.BytesIO(base64.b64decode(code)))
    noise = Image.fromarray(torch.randint(0, 256, (700, 3000, 3), dtype=torch.uint8).numpy())
    kind, picture = sent(noise, 2048)
    assert kind == "data:image/jpeg;base64" and picture.size == (2048, 478)
    kind, picture = sent(noise, 0)
    assert kind == "data:image/jpeg;base64" and picture.size == (3000, 700)
    kind, picture = sent(noise.crop((0, 0, 64, 64)), 2048)
    assert kind == "data:image/png;base64" and picture.tobytes() == noise.crop((0, 0, 64, 64)).tobytes()


@pytest.mark.parametrize("words, seconds", [
    ("Please try again in 20s.", 20), ("Please try again in 7m12.5s", 432.5), ("retry in 32.5 seconds", 32.5),
    ('"retryDelay": "32s"', 32), ("Try again in 350ms", 0.35), ('{"retry_after": 12}', 12), ("wait 1 hour", 3600),
    ("You sent 20s of audio", None), ("overloaded", None)])
def test_waits_are_read_from_words(words, seconds):
    assert told_wait({}, words) == (seconds if seconds is None else pytest.approx(seconds))


def test_words_that_mean_a_server_and_those_that_mean_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.model").mkdir()
    for url in ("http://x/v1", "HTTPS://x", "localhost:8000/v1", "api.openai.com/v1", "10.0.0.7:8000", "[::1]:8000/v1"):
        assert is_url(url), url
    for name in ("tiny/base", "Qwen/Qwen2.5-VL-7B", "./a.b/c", "/a.b/c", "my.model", "runs/cdrl", "self"):
        assert not is_url(name), name


def test_proxies_are_passed_by_on_this_machine_and_named_elsewhere(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://me:secret-0123@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    server = servers.start(act_as_expert)
    try:
        assert not ServerExpert(Server(f"http://{server.host}/v1", "big")).ask([([], "?")])[0].failed
    finally:
        server.shutdown()
    (reply,) = ServerExpert(Server("http://host.invalid/v1", "big", retries=0)).ask([([], "?")])
    assert "proxy http://127.0.0.1:9" in reply.error and "NO_PROXY=host.invalid" in reply.error
    assert "secret-0123" not in reply.error
    monkeypatch.setenv("SSL_CERT_FILE", "/absent.pem")
    with pytest.raises(InputError, match="absent.pem"):
        Server("https://host.invalid/v1", "big")

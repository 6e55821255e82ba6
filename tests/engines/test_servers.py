"""An OpenAI-compatible server and vLLM, both stood in for: the real model answers, behind the real shape of a reply."""

from __future__ import annotations

import json
import sys
import threading
import weakref
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
from counting import PROMPTS, STOP, NumberTokenizer, counting_llama

from tunesmith import engines
from tunesmith.engines import Asked, Source, openai
from tunesmith.engines import vllm as vllm_engine
from tunesmith.engines.check import read_alone
from tunesmith.errors import MissingExtra, ModelError, RecipeError, RunError, TunesmithError
from tunesmith.generation import generate
from tunesmith.recipe import Server

LIMIT = 20


class WordTokenizer(NumberTokenizer):
    def encode(self, text, add_special_tokens):
        return [int(word[1:]) for word in text.split()]


TOKENIZER = WordTokenizer()


@pytest.fixture(scope="module")
def llama():
    return counting_llama()


@pytest.fixture(scope="module")
def alone(llama):
    return [generate(llama, TOKENIZER, [p], max_new_tokens=LIMIT, stop_ids=[STOP])[0] for p in PROMPTS]


@pytest.fixture
def served(llama):
    """A server whose mischief a test sets: it answers with the model, and keeps what it was asked."""
    state = SimpleNamespace(
        bodies=[], headers=[], trouble={}, strict=False, extra_token=False, lock=threading.Lock()
    )

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.bodies.append(body)
                state.headers.append(dict(self.headers))
                trouble = state.trouble.get(tuple(body["prompt"]), [])
                kind = trouble.pop(0) if trouble else None
                if state.strict and "stop_token_ids" in body:
                    kind = 400
            if isinstance(kind, int):
                return self.reply(kind, b'{"error": "no"}')
            if kind == "broken":
                return self.reply(200, b'{"choices": [')
            if kind == "empty":
                return self.reply(200, b"")
            with state.lock:
                prompt = ([7] if state.extra_token else []) + body["prompt"]
                [one] = generate(
                    llama, TOKENIZER, [prompt], max_new_tokens=body["max_tokens"], stop_ids=[STOP],
                    temperature=body["temperature"], seed=body["seed"],
                )  # fmt: skip
            choice = {"index": 0, "text": one.text, "finish_reason": one.finish_reason}
            if body.get("return_token_ids"):
                choice["token_ids"] = [*one.ids, *([STOP] if one.stop_id is not None else [])]
            return self.reply(
                200, json.dumps({"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}).encode()
            )

        def reply(self, code, content):
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    state.section = Server(
        base_url=f"http://127.0.0.1:{server.server_port}/v1",
        models={"tuned": "my-lora"},
        concurrency=4,
        retries=3,
    )
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(openai, "BACKOFF", 0.01)


def asked(prompts=PROMPTS, **fields):
    return Asked(prompts, **{"max_new_tokens": LIMIT, "stop_ids": [STOP]} | fields)


def source(model, section, name="tuned", **fields):
    found = Source(name, TOKENIZER, lambda: model, server=section, **fields)
    assert found.model is model
    return found


def test_a_server_s_answers_are_those_of_the_model(llama, alone, served):
    found, settings = engines.answers(source(llama, served.section), asked(), engine="openai")
    assert found == alone
    assert settings["served_as"] == "my-lora"
    assert "ids" not in settings
    assert all(isinstance(body["prompt"], list) and body["model"] == "my-lora" for body in served.bodies)
    first = next(body for body in served.bodies if body["prompt"] == PROMPTS[0])
    assert (first["stop_token_ids"], first["max_tokens"], first["repetition_penalty"]) == ([STOP], LIMIT, 1.0)
    assert len({body["seed"] for body in served.bodies}) == len(PROMPTS), "copies of a prompt are drawn apart"


def test_drawn_answers_do_not_depend_on_who_is_asked_beside(llama, served):
    draw = asked(temperature=2.0)
    found, _ = engines.answers(source(llama, served.section), draw, engine="openai")
    fewer, _ = engines.answers(
        source(llama, served.section), asked(PROMPTS[3:5], temperature=2.0), engine="openai"
    )
    assert fewer == found[3:5]


def test_a_server_s_troubles_lose_no_answer_and_ask_none_twice(
    llama, alone, served, tmp_path, tiny_model_folder
):
    served.trouble = {
        tuple(PROMPTS[0]): [503], tuple(PROMPTS[3]): [429, "broken"], tuple(PROMPTS[4]): ["empty", 500],
        tuple(PROMPTS[7]): [500] * 9,
    }  # fmt: skip
    known = {"base": str(tiny_model_folder)}
    with pytest.raises(RunError, match="HTTP 500"):
        engines.answers(source(llama, served.section, **known), asked(), engine="openai", folder=tmp_path)
    [file] = tmp_path.iterdir()
    kept = len(file.read_text().splitlines())
    served.trouble, served.bodies[:] = {}, []
    found, _ = engines.answers(
        source(llama, served.section, **known), asked(), engine="openai", folder=tmp_path
    )
    assert found == alone
    assert len(served.bodies) == len(PROMPTS) - kept


def test_a_plain_server_is_asked_without_extensions_and_that_is_said(llama, alone, served):
    served.strict = True
    said = []
    found, settings = engines.answers(
        source(llama, served.section), asked(), engine="openai", say=said.append
    )
    assert "without" in said[0]
    assert [(a.text, a.finish_reason) for a in found] == [(a.text, a.finish_reason) for a in alone]
    assert "encoded again" in settings["ids"]
    reads = read_alone(llama, TOKENIZER, PROMPTS, found, stop_ids=[STOP], max_new_tokens=LIMIT)
    assert {read.verdict for read in reads} == {"equal"}
    other = [found[2], *found[1:]]
    [read, *_] = read_alone(llama, TOKENIZER, PROMPTS, other, stop_ids=[STOP], max_new_tokens=LIMIT)
    assert read.verdict == "different"


def test_a_second_beginning_of_text_is_an_error(llama, served):
    served.extra_token = True
    with pytest.raises(ModelError, match="other tokens than it was sent"):
        engines.answers(source(llama, served.section), asked(), engine="openai")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"base_url": "http://example.com/v1"}, "readable"),
        ({"base_url": "ftp://127.0.0.1/v1"}, "is none"),
        ({"base_url": "https://me:secret@example.com/v1"}, "is none"),
        ({"api_key_env": "TUNESMITH_NO_SUCH_KEY"}, "TUNESMITH_NO_SUCH_KEY"),
    ],
)
def test_what_is_not_safe_is_refused(llama, section, said):
    with pytest.raises(RecipeError, match=said):
        engines.answers(source(llama, Server(**section)), asked(), engine="openai")


def test_the_key_is_sent_and_never_said(llama, served, monkeypatch):
    monkeypatch.setenv("MY_KEY", "hush-hush")
    section = served.section.model_copy(update={"api_key_env": "MY_KEY", "retries": 0})
    served.trouble = {tuple(PROMPTS[0]): [401]}
    with pytest.raises(RunError) as error:
        engines.answers(source(llama, section), asked(), engine="openai")
    assert "hush-hush" not in str(error.value)
    assert served.headers[0]["Authorization"] == "Bearer hush-hush"


# vLLM


def test_without_vllm_one_sentence_says_so(llama):
    with pytest.raises(MissingExtra, match="vllm"):
        engines.answers(source(llama, Server()), asked(), engine="vllm")


@pytest.fixture
def vllm(llama, monkeypatch):
    """A stand-in with the classes that are used, strict about what they are given; the real model answers."""
    made = []

    class SamplingParams:
        def __init__(self, *, max_tokens, temperature, seed, stop_token_ids, ignore_eos, detokenize):
            self.max_tokens, self.temperature, self.seed = max_tokens, temperature, seed
            self.stop_token_ids = stop_token_ids
            assert ignore_eos
            assert detokenize is False

    class LLM:
        def __init__(self, **options):
            assert options["trust_remote_code"] is False
            assert options["generation_config"] == "vllm"
            self.options, self.asked = options, []
            made.append(self)

        def generate(self, prompts, settings, *, lora_request, use_tqdm):
            assert use_tqdm is False
            self.asked.append((prompts, lora_request))
            found = []
            for prompt, setting in zip(prompts, settings, strict=True):
                [one] = generate(
                    llama, TOKENIZER, [prompt["prompt_token_ids"]], max_new_tokens=setting.max_tokens,
                    stop_ids=setting.stop_token_ids,
                )  # fmt: skip
                ids = [*one.ids, *([STOP] if one.stop_id is not None else [])]
                output = SimpleNamespace(token_ids=ids, finish_reason=one.finish_reason, text="")
                found.append(SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[output]))
            return found

    module, lora, request = ModuleType("vllm"), ModuleType("vllm.lora"), ModuleType("vllm.lora.request")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    module.__spec__ = SimpleNamespace(name="vllm")
    request.LoRARequest = lambda name, number, path: (name, number, path)
    for name, one in (("vllm", module), ("vllm.lora", lora), ("vllm.lora.request", request)):
        monkeypatch.setitem(sys.modules, name, one)
    return made


def test_vllm_is_given_ids_and_gives_ids(llama, alone, vllm, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(vllm_engine, "PART", 4)
    unloaded = Source("base", TOKENIZER, lambda: llama, str(tiny_model_folder), dtype="bfloat16")
    found, settings = engines.answers(unloaded, asked(), engine="vllm")
    assert found == alone
    assert settings["engine"] == "vllm"
    [llm] = vllm
    assert [len(prompts) for prompts, _ in llm.asked] == [4, 4, 1]
    assert llm.options["model"] == str(tiny_model_folder.resolve())
    assert llm.options["dtype"] == "bfloat16"
    assert "enable_lora" not in llm.options
    assert not unloaded.is_loaded, "the model is not in the memory twice"


def test_one_engine_serves_a_source_until_it_is_let_go(llama, alone, vllm, tiny_model_folder):
    def unloaded(name):
        return Source(name, TOKENIZER, lambda: llama, str(tiny_model_folder))

    one = unloaded("base")
    for _ in range(3):
        assert engines.answers(one, asked(), engine="vllm")[0] == alone
    [llm] = vllm
    assert len(llm.asked) == 3
    freed = weakref.ref(llm)
    del llm, vllm[0]
    assert freed()
    other = unloaded("tuned")
    engines.answers(other, asked(), engine="vllm")
    assert not freed(), "two engines have no room beside each other"
    freed = weakref.ref(vllm.pop())
    assert freed()
    assert other.model is llama
    assert not freed(), "the model in this process takes the engine's room"
    engines.answers(one, asked(), engine="vllm")
    freed = weakref.ref(vllm.pop())
    assert freed()
    one.let_go()
    assert not freed()
    engines.answers(one, asked(), engine="vllm")
    freed = weakref.ref(vllm.pop())
    assert freed()
    del one
    assert not freed(), "it goes with its source"


def test_a_longer_question_gets_an_engine_that_holds_it_and_a_failed_one_is_not_kept(
    llama, vllm, tiny_model_folder, monkeypatch
):
    one = Source("base", TOKENIZER, lambda: llama, str(tiny_model_folder))
    engines.answers(one, replace(asked(), prompts=[[5]], max_new_tokens=2), engine="vllm")
    assert vllm[0].options["max_model_len"] == 8
    engines.answers(one, replace(asked(), prompts=[[5] * 6], max_new_tokens=2), engine="vllm")
    assert len(vllm) == 1
    engines.answers(one, replace(asked(), prompts=[[5] * 7], max_new_tokens=2), engine="vllm")
    assert vllm[1].options["max_model_len"] == 32
    monkeypatch.setattr(type(vllm[1]), "generate", lambda *_, **__: [])
    with pytest.raises(ModelError, match="gave 0 answers"):
        engines.answers(one, replace(asked(), prompts=[[5]], max_new_tokens=2), engine="vllm")
    assert vllm_engine.HELD not in vars(one)


def test_an_adapter_is_a_request_on_its_base(llama, alone, vllm, tiny_model_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    from tunesmith import models

    folder = tmp_path / "adapter"
    settings = LoraConfig(target_modules=["q_proj"], r=12, task_type="CAUSAL_LM")
    get_peft_model(models.load_model(str(tiny_model_folder)), settings).save_pretrained(folder)
    found, _ = engines.answers(Source("tuned", TOKENIZER, lambda: llama, str(folder)), asked(), engine="vllm")
    assert found == alone
    [llm] = vllm
    assert llm.options["model"] == str(tiny_model_folder.resolve())
    assert llm.options["max_lora_rank"] == 16
    assert llm.asked[0][1] == ("tuned", 1, str(folder.resolve()))
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**said, "use_dora": True}))
    with pytest.raises(RecipeError, match="DoRA"):
        engines.answers(Source("tuned", TOKENIZER, lambda: llama, str(folder)), asked(), engine="vllm")


def test_a_server_that_repeats_the_key_is_not_quoted(llama, monkeypatch):
    class Echo(BaseHTTPRequestHandler):
        def do_POST(self):
            said = f"bad key {self.headers['Authorization']} \x1b[2J".encode()
            self.send_response(401)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *given):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("OWN_KEY", "sk-secret-123\n")
        section = Server(
            base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key_env="OWN_KEY", retries=0
        )
        with pytest.raises(TunesmithError) as error:
            engines.answers(source(llama, section), asked(), engine="openai")
        server.shutdown()
    assert "sk-secret" not in str(error.value)
    assert "\x1b" not in str(error.value)
    assert "bad key Bearer ***" in str(error.value)
    with pytest.raises(TunesmithError) as error:
        engines.answers(
            source(llama, Server(base_url="https://me:hunter2@host/v1")), asked(), engine="openai"
        )
    assert "hunter2" not in str(error.value)

"""Push and pull against a server on this machine that speaks the Hub's routes, with its failures."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.compose import compose
from tunesmith.errors import TunesmithError
from tunesmith.export import publish
from tunesmith.training.run import create

TOKEN = "hf_" + "a1B2c3D4" * 4


class Hub:
    """Repositories, blobs and the requests that were made; `faults` are (route, status) answered once each."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.faults: list[tuple[str, int]] = []
        self.tokens: set[str] = set()
        self.commits = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for the client to say that it has the headers
    hub: Hub

    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, content=None, **headers) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.asked.append((self.command, path))
        hub.tokens.add(self.headers.get("Authorization", ""))
        for fault in hub.faults:
            if re.search(fault[0], f"{self.command} {path}"):
                hub.faults.remove(fault)
                if fault[1] == 0:  # the line goes dead
                    self.close_connection = True
                    self.connection.close()
                    return
                return self.answer(fault[1], {"error": "not now"})
        if path.startswith("/store/"):
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/store/")
            hub.blobs[path.removeprefix("/store/")] = body
            return self.answer(200)
        if path.startswith("/api/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "who is it?"})
        if path == "/api/repos/create":
            said = json.loads(body)
            name = "/".join(filter(None, (said.get("organization"), said["name"])))
            if name in hub.repositories:
                return self.answer(409, {"url": f"{self.server.url}/{name}"})
            hub.repositories[name], hub.private[name] = {}, said.get("visibility") == "private"
            return self.answer(200, {"url": f"{self.server.url}/{name}"})
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            if match[1] not in hub.repositories:
                return self.answer(404, {"error": "no such repository"}, **{"X-Error-Code": "RepoNotFound"})
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer(200, {"files": files})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = []
            for one in json.loads(body)["objects"]:
                there = one["oid"] in hub.blobs
                to = {"upload": {"href": f"{self.server.url}/store/{one['oid']}"}}
                objects.append({**one, "authenticated": True, **({} if there else {"actions": to})})
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            for line in body.decode().splitlines():
                kind, value = (entry := json.loads(line))["key"], entry["value"]
                if kind == "file":
                    hub.repositories[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif kind == "lfsFile":
                    hub.repositories[match[1]][value["path"]] = hub.blobs[value["oid"]]
            hub.commits += 1
            oid = f"{hub.commits:040x}"
            return self.answer(
                200, {"commitUrl": f"{self.server.url}/{match[1]}/commit/{oid}", "commitOid": oid}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            if match[1] not in hub.repositories:
                return self.answer(404, {"error": "no such repository"}, **{"X-Error-Code": "RepoNotFound"})
            held = hub.repositories[match[1]]
            siblings = [{"rfilename": name, "size": len(content)} for name, content in held.items()]
            return self.answer(
                200, {"id": match[1], "sha": f"{hub.commits:040x}", "siblings": siblings, "private": True}
            )
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+.*", path):
            held = hub.repositories[match[1]]
            return self.answer(200, [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in held.items()
            ])  # fmt: skip
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = hub.repositories[match[1]].get(match[2])
            if content is None:
                return self.answer(404, {"error": "no such file"}, **{"X-Error-Code": "EntryNotFound"})
            mark = {
                "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Repo-Commit": f"{hub.commits:040x}",
            }
            return self.answer(200, content, **mark)
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/whoami-v2":
            return self.answer(200, {"name": "me", "auth": {"accessToken": {"role": "write"}}})
        return self.answer(404, {"error": path})

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@contextmanager
def served():
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Own", (Handler,), {"hub": hub}))
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub, server.url
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with served() as (made, url):
        for name, value in {
            "ENDPOINT": url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(publish.time, "sleep", lambda seconds: None)
        _http.close_session()
        yield made
        _http.close_session()


@pytest.fixture
def model(tiny_model_folder, tmp_path) -> Path:
    import shutil

    folder = tmp_path / "mine"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "README.md").write_text('---\ntags: [x]\n---\n# mine\nfrom_pretrained("PATH")\n')
    (folder / "learned.json").write_text("{}")
    return folder


def test_a_model_is_pushed_and_pulled(hub, model, tmp_path):
    assert api.push(model, repository="me/mine", token=TOKEN).endswith("/me/mine")
    held = hub.repositories["me/mine"]
    assert hub.private == {"me/mine": True}
    assert held["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert 'from_pretrained("me/mine")' in held["README.md"].decode()
    assert "learned.json" not in held
    assert list(held)[-1] == "README.md", "a repository with a card is whole"
    held["modeling_own.py"], held["pytorch_model.bin"] = b"raise SystemExit", b"pickle"
    folder = api.pull("me/mine", output=tmp_path / "pulled", token=TOKEN)
    assert folder == tmp_path / "pulled"
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (folder / name).read_bytes() == (model / name).read_bytes()
    assert not (folder / "modeling_own.py").exists()
    assert not (folder / "pytorch_model.bin").exists()
    with pytest.raises(TunesmithError, match="is there already"):
        api.pull("me/mine", output=tmp_path / "pulled", token=TOKEN)
    with pytest.raises(TunesmithError, match="was not fetched"):
        api.pull("me/other", output=tmp_path / "x", token=TOKEN)


@pytest.mark.parametrize("status", [500, 503, 0], ids=["error", "busy", "dead line"])
def test_what_fails_on_the_way_is_sent_again(hub, model, status):
    hub.faults = [("PUT /store/", status), ("POST .*/commit/main", 503), ("POST .*/preupload/", 502)]
    api.push(model, repository="me/mine", token=TOKEN)
    assert hub.faults == []
    assert hub.repositories["me/mine"]["model.safetensors"] == (model / "model.safetensors").read_bytes()


def test_an_upload_that_was_cut_off_goes_on_where_it_was(hub, model):
    hub.faults = [("POST .*/commit/main", 403)]
    with pytest.raises(TunesmithError, match=r"(?s)not uploaded to me/mine; it is whole in.*not sent again"):
        api.push(model, repository="me/mine", token=TOKEN)
    assert hub.repositories == {"me/mine": {}}
    stored = [path for command, path in hub.asked if command == "PUT"]
    api.push(model, repository="me/mine", token=TOKEN)
    assert [path for command, path in hub.asked if command == "PUT"] == stored, "weights are sent once"
    assert "model.safetensors" in hub.repositories["me/mine"]


def test_who_may_not_is_told_and_the_token_is_not(hub, model):
    wrong = "hf_" + "x9Y8z7W6" * 4
    with pytest.raises(TunesmithError, match="hf auth login") as caught:
        api.push(model, repository="me/mine", token=wrong)
    assert wrong not in str(caught.value)
    assert hub.repositories == {}
    with pytest.raises(TunesmithError, match="Create the repository first"):
        api.push(model, repository="me/none", token=TOKEN, create=False)
    assert hub.repositories == {}


def test_a_dry_run_lists_the_files_and_asks_nobody(hub, model):
    result = CliRunner().invoke(app, ["push", str(model), "me/mine", "--dry-run", "--public", "--json"])
    shown = json.loads(result.stdout.strip().splitlines()[-1])
    assert (result.exit_code, shown["private"], shown["findings"]) == (0, False, [])
    assert dict(shown["files"])["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert shown["left"] == ["learned.json"]
    assert "what was trained on is not here" in shown["notes"][0]
    assert hub.asked == []
    with pytest.raises(TunesmithError, match="no name of a repository"):
        api.push_plan(model, repository="me/mine/too")


SECRETS = {
    "token": (f'{{"token": "{TOKEN}"}}', "a Hugging Face token"),
    "key": ("-----BEGIN RSA PRIVATE KEY-----\nabc", "a private key"),
    "aws": ("id AKIAABCDEFGHIJKLMNOP", "an AWS key"),
    "named": ('api_key = "0123456789abcdef"', "a named secret"),
    "address": ("postgres://me:hunter2@db.example.org/x", "a password in an address"),
}


@pytest.mark.parametrize("kind", SECRETS)
def test_secrets_are_found_and_not_sent(hub, model, kind):
    text, said = SECRETS[kind]
    (model / "notes.txt").write_text(f"fine\n{text}\n")
    with pytest.raises(TunesmithError, match=f"notes.txt, line 2: {said}") as caught:
        api.push(model, repository="me/mine", token=TOKEN)
    assert text not in str(caught.value)
    assert hub.asked == []
    result = CliRunner().invoke(app, ["push", str(model), "me/mine", "--dry-run"])
    assert result.exit_code == 1
    assert f"FOUND     notes.txt, line 2: {said}" in result.stdout
    api.push(model, repository="me/mine", token=TOKEN, despite=True)
    assert "notes.txt" in hub.repositories["me/mine"]


def test_what_was_trained_on_is_found(model):
    row = 'The patient of room 12 said "no" to the\nsecond operation on Monday.'
    (model / "samples.json").write_text(json.dumps({"rows": [row]}))
    plan = publish.planned(
        model, "me/mine", private=True, trained=[row, "what", "A text that is in no file of it."]
    )
    [found] = plan.findings
    assert found == "samples.json: 1 text that the model was trained on"
    clean = publish.planned(
        model, "me/mine", private=True, trained=["what is the capital of france and its rows"]
    )
    assert clean.findings == ()


def test_secrets_in_the_header_of_weights_are_found(model):
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "note": TOKEN})
    [found] = publish.planned(model, "me/mine", private=True).findings
    assert "model.safetensors" in found


def test_a_run_that_was_pushed_is_pulled_by_its_own_name(hub, model, question_file, tmp_path):
    run = create(
        compose({"output_dir": str(tmp_path / "runs"), "name": "mine", "model": {"base": str(model)},
                 "data": {"dataset": str(question_file)}}).recipe
    )  # fmt: skip
    with pytest.raises(TunesmithError, match="was not pushed"):
        api.pull(str(run.path))
    model.rename(run.final_model)
    api.push(run.path, repository="me/mine", token=TOKEN)
    result = CliRunner().invoke(app, ["pull", str(run.path), "--output", str(tmp_path / "back"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.strip().splitlines()[-1])
    assert found["folder"] == str(tmp_path / "back")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (run.final_model / name).read_bytes()

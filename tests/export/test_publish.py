"""Push and pull against a server on this machine that speaks the Hub's routes, with its failures."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tunesmith import api
from tunesmith.cli import app
from tunesmith.compose import compose
from tunesmith.errors import TunesmithError
from tunesmith.export import publish, scan
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
        self.part_size: int | None = None
        """Files of weights are taken in parts of so many bytes, and otherwise whole."""
        self.parts: dict[tuple[str, int], bytes] = {}


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
        if match := re.fullmatch(r"/part/(\w+)/(\d+)", path):
            hub.parts[match[1], int(match[2])] = body
            return self.answer(200, ETag=hashlib.md5(body).hexdigest())
        if match := re.fullmatch(r"/complete/(\w+)", path):
            named = json.loads(body)["parts"]
            parts = [hub.parts[match[1], part["partNumber"]] for part in named]
            assert [hashlib.md5(part).hexdigest() for part in parts] == [part["etag"] for part in named]
            assert hashlib.sha256(b"".join(parts)).hexdigest() == match[1]
            hub.blobs[match[1]] = b"".join(parts)
            return self.answer(200)
        if path == "/verify":
            said = json.loads(body)
            is_whole = len(hub.blobs.get(said["oid"], b"")) == said["size"]
            return self.answer(200 if is_whole else 422)
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
                if hub.part_size:
                    count = -(-one["size"] // hub.part_size)
                    header = {
                        f"{n:05}": f"{self.server.url}/part/{one['oid']}/{n}" for n in range(1, count + 1)
                    }
                    header["chunk_size"] = str(hub.part_size)
                    to = {"upload": {"href": f"{self.server.url}/complete/{one['oid']}", "header": header}}
                to["verify"] = {"href": f"{self.server.url}/verify"}
                objects.append({**one, "authenticated": True, **({} if there else {"actions": to})})
            return self.answer(
                200, {"transfer": "multipart" if hub.part_size else "basic", "objects": objects}
            )
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
                200,
                {
                    "id": match[1],
                    "sha": f"{hub.commits:040x}",
                    "siblings": siblings,
                    "private": hub.private[match[1]],
                },
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
    other = (model / "model.safetensors").read_bytes()[:-8] + bytes(8)
    (model / "model-2.safetensors").write_bytes(other)
    hub.faults = [(f"PUT /store/{hashlib.sha256(other).hexdigest()}", 403)] * publish.ATTEMPTS
    with pytest.raises(TunesmithError, match="not uploaded"):
        api.push(model, repository="me/mine", token=TOKEN)
    [arrived] = hub.blobs
    hub.faults = [("POST .*/commit/main", 403)]
    with pytest.raises(TunesmithError, match=r"(?s)not uploaded to me/mine; it is whole in.*not sent again"):
        api.push(model, repository="me/mine", token=TOKEN)
    assert hub.repositories == {"me/mine": {}}
    stored = [path for command, path in hub.asked if command == "PUT"]
    assert len(hub.blobs) == 2
    assert stored.count(f"/store/{arrived}") == 1, (
        "the one that had arrived was not sent again with the other"
    )
    api.push(model, repository="me/mine", token=TOKEN)
    assert [path for command, path in hub.asked if command == "PUT"] == stored, "weights are sent once"
    assert "model.safetensors" in hub.repositories["me/mine"]


@pytest.mark.parametrize("status", [500, 0], ids=["error", "dead line"])
def test_a_part_that_fails_is_sent_again_alone(hub, model, status):
    content = (model / "model.safetensors").read_bytes()
    hub.part_size = len(content) // 4 + 1
    hub.faults = [("PUT /part/.*/2$", status), ("POST /complete/", 503)]
    api.push(model, repository="me/mine", token=TOKEN)
    assert hub.repositories["me/mine"]["model.safetensors"] == content
    sent = [path.rpartition("/")[2] for command, path in hub.asked if path.startswith("/part/")]
    assert sent == ["1", "2", "2", "3", "4"]


def test_a_file_whose_parts_were_cut_off_is_sent_again_and_the_others_are_not(hub, model):
    content = (model / "model.safetensors").read_bytes()
    (model / "model-2.safetensors").write_bytes(other := content[:-8] + bytes(8))
    hub.part_size = len(content) // 4 + 1
    hub.faults = [(f"PUT /part/{hashlib.sha256(other).hexdigest()}/3$", 403)] * publish.ATTEMPTS
    with pytest.raises(TunesmithError, match="not sent again"):
        api.push(model, repository="me/mine", token=TOKEN)
    assert hub.repositories == {"me/mine": {}}
    assert list(hub.blobs) == [hashlib.sha256(content).hexdigest()]
    before = len(hub.asked)
    api.push(model, repository="me/mine", token=TOKEN)
    assert hub.repositories["me/mine"]["model-2.safetensors"] == other
    assert {path.split("/")[2] for _, path in hub.asked[before:] if path.startswith("/part/")} == {
        hashlib.sha256(other).hexdigest()
    }


def test_a_hub_out_of_reach_is_one_clear_error(hub, model, monkeypatch, tmp_path):
    from huggingface_hub import constants

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    heard = []
    with pytest.raises(TunesmithError, match=r"Hub could not be reached(?s:.*)HTTPS_PROXY.*not sent again"):
        api.push(model, repository="me/mine", token=TOKEN, watch=heard.append)
    assert len([e for e in heard if e["name"] == "upload"]) == publish.ATTEMPTS - 1, "and it was tried again"
    result = CliRunner().invoke(app, ["push", str(model), "me/mine"])
    assert result.exit_code == 1, result.output
    with pytest.raises(TunesmithError, match="Hub could not be reached"):
        api.pull("me/mine", output=tmp_path / "x", token=TOKEN)


def test_a_public_repository_gets_nothing_that_is_to_be_private(hub, model):
    hub.repositories["me/mine"], hub.private["me/mine"] = {}, False
    result = CliRunner().invoke(app, ["push", str(model), "me/mine", "--private"])
    assert result.exit_code == 1
    assert "everybody can read it" in result.output
    assert hub.repositories == {"me/mine": {}}
    assert not [path for command, path in hub.asked if command == "PUT"]
    api.push(model, repository="me/mine", token=TOKEN, private=False)
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


UNQUOTED = "export WANDB_API_KEY=0a1b2c3d4e5f60718293"
NAMED = '{"OPENAI_API_KEY": "abcdefgh12345678"}'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("notes.log", f"fine\n{TOKEN}\n".encode(), "notes.log, line 2: a Hugging Face token"),
        ("env.json", NAMED.encode(), "env.json, line 1: a named secret"),
        ("inner.json", json.dumps({"said": NAMED}).encode(), "inner.json, line 1: a named secret"),
        ("setup.sh", UNQUOTED.encode(), "setup.sh, line 1: a named secret"),
        ("far.txt", b"word \n" * 40 + TOKEN.encode(), "far.txt, line 41: a Hugging Face token"),
        ("blob.npy", bytes(200) + TOKEN.encode() + bytes(9), "blob.npy, byte 200: a Hugging Face token"),
        ("named.npy", bytes(203) + b'"apikey": "$#!%+(*)&$#!"' + bytes(9), "named.npy, byte 204: a named secret"),
        ("near.npy", bytes(203) + b"db://a:b@h" + bytes(9), "near.npy, byte 205: a password in an address"),
        ("wide.txt", f"é\n{TOKEN}".encode("utf-16"), "wide.txt, line 2: a Hugging Face token"),
        ("prose.txt", b"password: what a member types in. api_key = os.environ[...] task-" + b"a" * 30, None),
    ],
    ids=lambda value: value if isinstance(value, str) and value.count(".") == 1 else "",
)  # fmt: skip
def test_every_file_is_looked_through_in_pieces(model, monkeypatch, name, content, said):
    monkeypatch.setattr(scan, "PIECE", 64)
    monkeypatch.setattr(scan, "LONGEST_SECRET", 60)
    (model / name).write_bytes(content)
    assert list(publish.planned(model, "me/mine", private=True).findings) == ([said] if said else [])


@pytest.mark.parametrize("piece", [50, 61, 2**20])
def test_rows_are_found_in_any_file_however_it_is_written(model, monkeypatch, piece):
    """In pieces that break escapes, JSON's letters and LaTeX; tokenizer.json is a file as others are."""
    monkeypatch.setattr(scan, "PIECE", piece)
    rows = [
        "Er 😀 sagte: \u201eÄ\u201c and \\frac{1}{2} is not\na half of anything here.",
        "A second text, which is long enough to mean something, and it is in no file.",
        '你好"世界' * 12,
    ]
    folder = model / "more"
    folder.mkdir()
    (folder / "page.html").write_text(f"<p>x {rows[0]}</p>")
    (folder / "rows.ndjson").write_text(f"{json.dumps(rows[0])}\n{json.dumps(rows[2])}\n")
    found = publish.planned(model, "me/mine", private=True, trained=rows)
    assert found.findings == (
        "more/page.html: 1 text that the model was trained on",
        "more/rows.ndjson: 2 texts that the model was trained on",
    )
    held = json.loads((model / "tokenizer.json").read_text())
    held["note"] = rows[1]
    (model / "tokenizer.json").write_text(json.dumps(held))
    assert len(publish.planned(model, "me/mine", private=True, trained=rows).findings) == 3


def test_what_cannot_be_looked_through_is_named(hub, model):
    import gzip

    (model / "rows.txt.gz").write_bytes(gzip.compress(TOKEN.encode()))
    (model / "rows.arrow").write_bytes(b"\xff\xff\xff\xff a stream")
    (model / "plot.png").write_bytes(b"\x89PNG ...")
    result = CliRunner().invoke(app, ["push", str(model), "me/mine", "--dry-run"])
    assert result.exit_code == 1
    assert "FOUND     rows.txt.gz: compressed by gzip, and cannot be looked through" in result.stdout
    assert "FOUND     rows.arrow: a table" in result.stdout
    assert "unread    plot.png: a picture" in result.stdout
    assert "FOUND     plot.png" not in result.stdout
    with pytest.raises(TunesmithError, match=r"rows\.arrow: a table"):
        api.push(model, repository="me/mine", token=TOKEN)
    assert hub.asked == []
    heard = []
    api.push(model, repository="me/mine", token=TOKEN, despite=True, watch=heard.append)
    assert [e["value"].partition(":")[0] for e in heard if e["name"] == "not looked through"] == [
        "plot.png", "rows.arrow", "rows.txt.gz",
    ]  # fmt: skip


def test_what_is_no_model_is_named_with_what_can_be_pushed(model, tmp_path):
    inner = tmp_path / "dep" / "model"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").touch()
    for given, said in (
        (tmp_path / "dep", f"a folder without a model, and not a run.*{inner}"),
        (tmp_path / "rows.jsonl", f"is a file; runs and folders are pushed.*{model}"),
        (Path("tiny"), "ships with tunesmith"),
        (tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(TunesmithError, match=f"(?s){said}"):
            api.push_plan(given, repository="me/mine")
    with pytest.raises(TunesmithError, match=r"(?s)'mine' is no name.*owner/name"):
        api.push_plan(model, repository="mine")
    done = CliRunner().invoke(app, ["push", str(model), "me/mine", "--dry-run", "--private", "--public"])
    assert done.exit_code == 1
    assert "--private or --public" in done.stderr


def test_what_did_not_pass_its_check_is_not_pushed(model, tmp_path):
    """Nor a folder in one that did not, however it is called by now."""
    inner = tmp_path / "out.failed" / "merged"
    inner.mkdir(parents=True)
    (inner / "config.json").write_text("{}")
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    (renamed / "config.json").write_text("{}")
    (renamed / "parity.json").write_text('{"passed": false}')
    for folder in (inner, renamed):
        with pytest.raises(TunesmithError, match="did not pass its check"):
            api.push_plan(folder, repository="me/mine")
    for said in ('{"passed": null}', "{"):
        (renamed / "parity.json").write_text(said)
        assert "is no proof" in api.push_plan(renamed, repository="me/mine").notes[0]
    (renamed / "parity.json").write_text('{"passed": true}')
    assert not any("proof" in note for note in api.push_plan(renamed, repository="me/mine").notes)


def test_what_a_dry_run_leaves_is_not_sent_from_a_folder_in_the_folder_either(hub, model):
    (model / "sub").mkdir()
    for name in ("learned.json", ".env", "README.md", "a[1].json"):
        (model / "sub" / name).write_text("{}")
    api.push(model, repository="me/mine", token=TOKEN)
    plan = api.push_plan(model, repository="me/mine")
    assert set(hub.repositories["me/mine"]) == {name for name, _ in plan.files}
    assert {"sub/learned.json", "sub/.env"} <= set(plan.left)
    assert {"sub/README.md", "sub/a[1].json"} <= set(hub.repositories["me/mine"])


def test_secrets_in_weights_are_found_and_rows_in_what_gguf_says_of_itself(model):
    gguf = pytest.importorskip("gguf")
    row = "A text of forty letters or more, which was trained on."
    writer = gguf.GGUFWriter(model / "m.gguf", "llama")
    writer.add_description(row)
    writer.add_tensor("x", np.frombuffer((TOKEN + " " * 20).encode()[:48], dtype=np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    [secret, known] = publish.planned(model, "me/mine", private=True, trained=[row]).findings
    assert re.fullmatch(r"m.gguf, byte [\d,]+: a Hugging Face token", secret)
    assert known == "m.gguf: 1 text that the model was trained on"


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
    assert found["repository"] == "me/mine", "the one that was taken"
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (run.final_model / name).read_bytes()
    words = ["pull", "mine", "--output-dir", str(tmp_path / "runs"), "--output", str(tmp_path / "by-name")]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "by-name/model.safetensors").is_file()
    words[1] = "mime"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert "Did you mean 'mine'?" in result.output


@pytest.mark.parametrize("file", ["adapter_config.json", "mine-q8_0.gguf"])
def test_a_folder_that_is_no_run_is_pushed_for_what_lies_in_it(hub, tmp_path, file):
    (tmp_path / file).write_text("{}")
    assert file in dict(api.push_plan(tmp_path, repository="me/mine").files)

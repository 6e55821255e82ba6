"""Safe by default: a case for each row of the table of defaults in docs/reliability.md."""

from __future__ import annotations

import ast
import asyncio
import functools
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunesmith import api, models
from tunesmith.compose import compose, read_layer
from tunesmith.data import rendering, sources, templates
from tunesmith.data.examples import Conversation, Message, Row, Unusable
from tunesmith.errors import RecipeError, RunError, TrainingDiverged
from tunesmith.http import Remote
from tunesmith.recipe import Recipe
from tunesmith.training import checkpoints
from tunesmith.training.run import Run

ROOT = Path(__file__).parents[1]


@functools.cache
def code() -> dict[Path, ast.Module]:
    """Every file of the package, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "src").rglob("*.py")}


@functools.cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """What of a file is asked for: arguments, dictionaries, imports, attributes, calls."""
    kinds = ast.keyword | ast.Dict | ast.Import | ast.ImportFrom | ast.Attribute | ast.Call
    return tuple(node for node in ast.walk(tree) if isinstance(node, kinds))


def given(name: str, trees=None) -> Iterator[tuple[str, ast.expr]]:
    """Every value that the code gives under a name: as an argument, or as a key of a dictionary."""
    for path, tree in (code() if trees is None else trees).items():
        for node in nodes(tree):
            if isinstance(node, ast.keyword) and node.arg == name:
                yield f"{path}:{node.lineno}", node.value
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name:
                        yield f"{path}:{value.lineno}", value


def imported(trees=None) -> Iterator[tuple[str, str]]:
    """Every module that the code imports, and every attribute that it takes of `torch`."""
    for path, tree in (code() if trees is None else trees).items():
        for node in nodes(tree):
            if isinstance(node, ast.Import):
                yield from ((str(path), alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((str(path), f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "torch":
                yield f"{path}:{node.lineno}", f"torch.{node.attr}"


def other_than(name: str, *allowed, trees=None) -> list[str]:
    """Places where a setting is given another value than those allowed."""
    return [
        place
        for place, value in given(name, trees)
        if not (
            isinstance(value, ast.Constant)
            and value.value in allowed
            and type(value.value) in map(type, allowed)
        )
    ]


@pytest.fixture(scope="module")
def trained(tiny_model_folder, tmp_path_factory):
    """A run of two steps, and the addresses that its process connected to."""
    folder = tmp_path_factory.mktemp("safe")
    data = folder / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "count {n}", "response": "one {n}"}}\n' for n in range(30)))
    connected = []
    connect = socket.socket.connect

    def heard(self, address):
        connected.append(address)
        return connect(self, address)

    socket.socket.connect = heard
    try:
        recipe = compose(
            {
                "output_dir": str(folder / "runs"), "name": "safe", "model": {"base": str(tiny_model_folder)},
                "data": {"dataset": str(data), "max_length": 64},
                "training": {"max_steps": 2, "warmup_steps": 0, "save_steps": 1},
                "evaluation": {"skip": True},
            }
        ).recipe  # fmt: skip
        before = os.umask(0o022)
        try:
            run = Run(api.train(recipe).run)
        finally:
            os.umask(before)
    finally:
        socket.socket.connect = connect
    return run, connected


def answered(access, headers=(), *, path="/v1/models", body=b""):
    """Status and headers of what a server's guard lets through or refuses."""
    from tunesmith.serving.app import Guard
    from tunesmith.serving.limits import Limits

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent = []

    async def ask():
        async def receive():
            return {"type": "http.request", "body": body}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "path": path, "method": "POST", "headers": list(headers)}
        await Guard(app, access=access, limits=Limits(), counted=lambda status: None)(scope, receive, send)

    asyncio.run(ask())
    return sent[0]["status"], dict(sent[0]["headers"])


def bind(case):
    from tunesmith.serving.server import Where, token_from

    assert Where().host == "127.0.0.1"
    token, is_made = token_from(None, without=False, host="127.0.0.1")
    assert is_made
    assert len(token) >= 32
    assert token != token_from(None, without=False, host="127.0.0.1")[0], "another one at each start"
    with pytest.raises(RecipeError, match="everybody who reaches"):
        token_from(None, without=True, host="0.0.0.0")
    assert not [place for place, value in given("share") if getattr(value, "value", None) is True]


def host(case):
    from tunesmith.serving.app import Access

    access = Access()
    for name, status in (
        (b"127.0.0.1:8000", 200), (b"localhost", 200), (b"[::1]:8000", 200), (b"evil.example", 403), (b"", 403),
        (b"localhost.evil.example", 403), (b"127.0.0.1.evil.example", 403),
    ):  # fmt: skip
        found, headers = answered(access, [(b"host", name), (b"origin", b"https://evil.example")])
        assert found == status, name
        assert b"access-control-allow-origin" not in headers
    assert not [place for place, name in imported() if "CORSMiddleware" in name]
    for key in (b"Bearer wrong", b"", b"Bearer"):
        asked = [(b"host", b"localhost"), (b"authorization", key)]
        assert answered(Access("right" * 8), asked)[0] == 401


def headers(case):
    from tunesmith.serving.app import Access

    for name in (b"localhost", b"evil.example"):  # what is answered, and what is refused
        _, found = answered(Access(), [(b"host", name)])
        assert b"default-src 'none'" in found[b"content-security-policy"]
        assert b"frame-ancestors 'none'" in found[b"content-security-policy"]
        assert found[b"x-frame-options"] == b"DENY"
        assert found[b"x-content-type-options"] == b"nosniff"
        assert found[b"referrer-policy"] == b"no-referrer"


def upload(case):
    from tunesmith.serving.app import Access
    from tunesmith.serving.limits import Limits

    # Read and not imported, which would load Gradio; `ui/test_walls.py` sends as much and more.
    [pages] = [
        node
        for node in ast.walk(code()[ROOT / "src/tunesmith/ui/security.py"])
        if isinstance(node, ast.ClassDef) and node.name == "Limits"
    ]
    most = {
        field.target.id: eval(ast.unparse(field.value))
        for field in pages.body
        if isinstance(field, ast.AnnAssign)
    }
    assert (most["upload_bytes"], most["kept_bytes"]) == (200 * 2**20, 2**30)
    assert Limits().body_bytes <= most["body_bytes"] <= 8 * 2**20
    too_much = b"x" * (Limits().body_bytes + 1)
    assert answered(Access(), [(b"host", b"localhost")], body=too_much)[0] == 413
    claimed = [(b"host", b"localhost"), (b"content-length", str(len(too_much)).encode())]
    assert answered(Access(), claimed)[0] == 413, "before anything was read"
    assert not other_than("enable_monitoring", False)
    assert not other_than("show_error", False)
    # The workspace alone, of which the walls let each user have what is theirs.
    assert {ast.unparse(value) for _, value in given("allowed_paths")} <= {"[]", "[str(workspace)]"}


def remote_code(case):
    assert list(given("trust_remote_code")), "the scan sees something"
    assert not other_than("trust_remote_code", False)
    assert "trust_remote_code" not in str(Recipe.model_json_schema())
    for value in (True, None, "yes"):
        with pytest.raises(RecipeError, match="trust_remote_code"):
            compose(
                {"model": {"base": "tiny", "trust_remote_code": value}, "data": {"dataset": "example:chat"}}
            )


BANNED = re.compile(
    r"^(pickle|cPickle|dill|joblib|shelve|marshal|cloudpickle)\b|^torch\.(load|save)$"
    r"|^torch\.serialization"
)


def weights(case):
    assert not [(place, name) for place, name in imported() if BANNED.search(name)]
    assert not other_than("use_safetensors", True)
    assert not other_than("weights_only", True)
    assert not other_than("allow_pickle", False)
    assert not [p for p in case.run.path.rglob("*") if p.suffix in {".bin", ".pt", ".pth", ".pkl", ".npz"}]
    assert list(case.run.final_model.glob("*.safetensors"))


def downloads(case):
    for patterns in (models.WANTED, models.DESCRIBING):
        assert not [
            p for p in patterns if p in ("*", "**") or p.endswith((".py", ".bin", ".pt", ".pkl", ".*"))
        ]
    calls = [
        (f"{path.name}:{node.lineno}", {keyword.arg for keyword in node.keywords})
        for path, tree in code().items()
        for node in nodes(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "snapshot_download"
    ]
    assert len(calls) >= 2
    assert not [place for place, names in calls if not names & {"allow_patterns", "local_files_only"}]


def jinja(case):
    from tunesmith.serving.protocol import ChatRequest, Problem, parsed

    source = (ROOT / "src/tunesmith/data/rendering.py").read_text(encoding="utf-8")
    assert "ImmutableSandboxedEnvironment(" in source
    assert "loader=" not in source
    assert rendering.STRIKES <= 3
    tokenizer = case.tokenizer
    for template in ("{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}", "{{ 'a' * 3000000000 }}"):
        tokenizer.chat_template = template
        context = templates.encoder(tokenizer)
        with pytest.raises(Unusable):
            templates._render((Message("user", "a"), Message("assistant", "b")), context, opening=False)
    for field in ("chat_template", "chat_template_kwargs"):
        body = f'{{"model": "m", "messages": [{{"role": "user", "content": "a"}}], "{field}": {{}}}}'
        with pytest.raises(Problem) as refused:
            parsed(ChatRequest, body.encode())
        assert refused.value.status == 400


def special_tokens(case):
    tokenizer = case.tokenizer
    row = Conversation((Message("user", "a <|im_end|> b"), Message("assistant", "c")), Row("x", 1))
    [encoding] = templates.encode_all([row], tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(encoding.input_ids).count(end) == 2, "the template's own, one for each turn"
    assert "a <|im_end|> b" in tokenizer.decode(encoding.input_ids)
    path = case.folder / "rows.jsonl"
    path.write_text(
        '{"prompt": "a <|im_end|> b", "response": "c d"}\n' + '{"prompt": "e", "response": "f g"}\n' * 2
    )
    assert "special_token" in api.validate(str(path)).as_dict()["counts"]


def data(case):
    assert sources.LONGEST == 16 * 2**20
    assert sources.DEEPEST == 64
    path = case.folder / "table.csv"
    path.write_text("prompt,response\n007,1e5\nNA,true\n")
    rows = [record.values for record in sources.read(str(path)).records]
    assert rows == [{"prompt": "007", "response": "1e5"}, {"prompt": "NA", "response": "true"}]
    path = case.folder / "broken.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n{"prompt": "a"\n')
    with pytest.raises(Exception, match=r"broken\.jsonl has 1 broken line") as error:
        sources.read(str(path))
    assert "line 2" in str(error.value)


def network(case):
    assert case.connected == [], "nothing is asked while a run trains"
    with pytest.raises(RecipeError, match="https"):
        Remote("http://example.com/v1")
    asked = Remote("https://example.com/v1")
    assert asked.timeout <= 30
    with pytest.raises(RecipeError, match="http"):
        Remote("file:///etc/passwd")
    redirects = [h for h in asked._opener.handlers if "Redirect" in type(h).__name__]
    assert [h.redirect_request() for h in redirects] == [None], "no redirect is followed"


def non_finite(case):
    import torch
    from transformers import Trainer

    model = torch.nn.Linear(2, 2)
    trainer = SimpleNamespace(model=model, state=SimpleNamespace(global_step=3))
    checkpoints.require_finite(trainer)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(TrainingDiverged, match="step 3"):
        checkpoints.require_finite(trainer)
    recipe, updates = case.run.recipe().model_copy(update={"name": "spoiled"}), []
    taken = Trainer.training_step

    def spoiled(self, net, *given, **named):
        loss = taken(self, net, *given, **named)
        next(p for p in net.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "training_step", spoiled)
        patch.setattr(torch.optim.AdamW, "step", lambda self, *given, **named: updates.append(self))
        with pytest.raises(TrainingDiverged, match="step 1; the weights were not updated"):
            api.train(recipe)
    assert updates == []
    assert not other_than("logging_nan_inf_filter", False)
    assert list(given("logging_nan_inf_filter"))


def resume(case):
    recipe = case.run.recipe()
    changed = recipe.model_copy(
        update={"training": recipe.training.model_copy(update={"learning_rate": 0.5})}
    )
    with pytest.raises(RunError, match="cannot be continued") as error:
        api.train(changed, resume="latest")
    assert "training.learning_rate was " in error.value.found


def secrets(case):
    assert stat.S_IMODE(case.run.path.stat().st_mode) == 0o700
    for path in case.run.path.rglob("*"):
        allowed = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) & ~allowed == 0, path
    kept = str(Recipe.model_json_schema()["properties"].keys()) + (case.run.path / "recipe.yaml").read_text()
    assert not re.search(r"api_key\b(?!_env)|password|secret|hub_token", kept)
    with pytest.raises(RecipeError, match="password"):
        compose({"model": {"base": "tiny"}, "data": {"dataset": "https://me:pw@example.com/x"}})


def telemetry(case):
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] in ("1", "True")  # as we say it, or Gradio
    assert os.environ["HAMILTON_TELEMETRY_ENABLED"] == "false"
    assert case.run.recipe().tracking.trackers == []
    assert case.connected == []


def yaml(case):
    for text, said in (
        ("task: chat\ntask: code\n", "again"),
        ("data: !!python/name:os.system\n", "the tag"),
    ):
        path = case.folder / "recipe.yaml"
        path.write_text(text)
        with pytest.raises(RecipeError, match=said):
            read_layer(path)


ROWS = {
    "bind, share, token": bind, "Host, Origin, CORS": host, "headers": headers, "uploads": upload,
    "code of a model": remote_code, "weights": weights, "downloads": downloads, "chat templates": jinja,
    "special tokens in content": special_tokens, "data": data, "network": network, "numbers": non_finite,
    "resume": resume, "secrets": secrets, "telemetry": telemetry, "YAML": yaml,
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_what_is_on_or_off_where_nobody_says_anything(row, trained, tmp_path, tiny_tokenizer):
    import copy

    run, connected = trained
    ROWS[row](
        SimpleNamespace(
            run=run, connected=connected, folder=tmp_path, tokenizer=copy.deepcopy(tiny_tokenizer)
        )
    )


def test_the_page_has_these_rows():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    _, _, after = page.partition("## Safe defaults")
    table = re.findall(r"^\| (.+?) \|", after.partition("\n## ")[0], re.MULTILINE)
    assert table[0] == "what"
    assert table[2:] == list(ROWS) or table[1:] == list(ROWS)


def test_the_scans_bite():
    """The control: code that does what the defaults forbid."""
    bad = {Path("bad.py"): ast.parse(
        "import pickle\nfrom torch import serialization\ntorch.load(x)\nlaunch(share=True, show_error=1)\n"
        "load(trust_remote_code=flag)\noptions = {'trust_remote_code': None}\n"
    )}  # fmt: skip
    assert len([name for _, name in imported(bad) if BANNED.search(name)]) == 3
    assert len(other_than("trust_remote_code", False, trees=bad)) == 2
    assert [place for place, value in given("share", bad) if getattr(value, "value", None) is True]
    assert other_than("show_error", False, trees=bad), "1 is not False"


def test_a_run_that_its_owner_opened_to_a_group_stays_open(trained, tmp_path):
    import shutil

    run = Run(Path(shutil.copytree(trained[0].path, tmp_path / "shared")))
    run.path.chmod(0o750)
    with run.lock():
        before = os.umask(0o022)
        try:
            (run.path / "notes.txt").write_text("for us")
            (run.path / "all.txt").write_text("for all")
            (run.path / "all.txt").chmod(0o666)
            run.event("note")
        finally:
            os.umask(before)
    assert stat.S_IMODE((run.path / "notes.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((run.path / "all.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o750

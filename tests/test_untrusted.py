"""What a stranger may put into a model folder: each case loads, or runs, or opens something, without its defence."""

import json
import resource
import shutil
import struct
import sys
from pathlib import Path

import pytest

from tunesmith import models, untrusted
from tunesmith.errors import ModelError


@pytest.fixture
def folder(tmp_path, tiny_model_folder) -> Path:
    """A sound model that a test spoils."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def change(folder: Path, name: str, **fields) -> None:
    path = folder / name
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**said, **fields}))


def sharded(folder: Path, name: str) -> None:
    """Weights that an index says to lie in a file of another name."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def above(folder):
    sharded(folder, "../outside.safetensors")


def absolute(folder):
    sharded(folder, str(folder.parent / "outside.safetensors"))


def through_a_folder(folder):
    (folder / "deep").mkdir()
    sharded(folder, "deep/../../outside.safetensors")


def through_a_link(folder):
    sharded(folder, "link/outside.safetensors")
    (folder / "link").symlink_to(folder.parent)


def sibling_of_the_same_beginning(folder):
    """`startswith` would take it for a place inside."""
    sharded(folder, "../model-2/w.safetensors")
    (folder.parent / "model-2").mkdir()
    (folder.parent / "outside.safetensors").rename(folder.parent / "model-2" / "w.safetensors")


def linked_weights(folder):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors").symlink_to("../outside.safetensors")


def linked_secret(folder):
    (folder.parent / ".env").write_text("KEY=1")
    (folder / "README.md").symlink_to(folder.parent / ".env")


def vocabulary_outside(folder):
    (folder.parent / "vocab.txt").write_text("a\nb\n")
    change(folder, "tokenizer_config.json", vocab_file="../vocab.txt")


def tokenizer_outside(folder):
    shutil.copy(folder / "tokenizer.json", folder.parent / "tokenizer.json")
    change(folder, "tokenizer_config.json", tokenizer_file=str(folder.parent / "tokenizer.json"))


def null_in_a_name(folder):
    change(folder, "tokenizer_config.json", vocab_file="vocab\0.txt")


def pickled(folder):
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_shard(folder):
    sharded(folder, "w.bin")
    (folder.parent / "outside.safetensors").rename(folder / "w.bin")


def as_adapter(folder, **fields):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "config.json").rename(folder.parent / "config.json")
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps({**said, **fields}))


def pickled_adapter(folder):
    as_adapter(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def imports_by_adapter(folder):
    as_adapter(folder, auto_mapping={"base_model_class": "X", "parent_library": "antigravity"})


def imports_by_megatron(folder):
    as_adapter(folder, megatron_config={"a": 1}, megatron_core="antigravity")


def rests_on_itself(folder):
    as_adapter(folder, base_model_name_or_path=str(folder))


def rests_on_nothing(folder):
    as_adapter(folder, base_model_name_or_path="x\0y")


def kernel_of_the_hub(folder):
    change(folder, "config.json", _attn_implementation_internal="evil/kernel")


def kernel_inside(folder):
    change(folder, "config.json", text_config={"attn_implementation": "evil/kernel:run"})


def many_words(folder):
    change(folder, "config.json", vocab_size=10**12)


def somewhat_many_words(folder):
    change(folder, "config.json", vocab_size=2 * 10**9)


def wide(folder):
    change(folder, "config.json", hidden_size=2**30, intermediate_size=2**30)


def many_layers(folder):
    change(folder, "config.json", num_hidden_layers=10**7)


def a_number_without_end(folder):
    change(folder, "config.json", hidden_size=10**400)


def deep_configuration(folder):
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "x": ' + "[" * 100_000 + "]" * 100_000 + "}")


def large_configuration(folder):
    with (folder / "config.json").open("a") as file:
        file.write(" " * (17 * 2**20))


def header_of_any_length(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:])


def header_longer_than_the_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 99 * 2**20) + path.read_bytes()[8:])


def made_header(folder, content) -> None:
    said = json.dumps(content).encode() if not isinstance(content, bytes) else content
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(said)) + said + bytes(8))


def tensor_of_any_size(folder):
    made_header(folder, {"w": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 8]}})


def tensor_behind_the_end(folder):
    made_header(folder, {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**50]}})


def deep_header(folder):
    made_header(folder, b"[" * 100_000)


SPOILED = {
    above: "outside", absolute: "outside", through_a_folder: "outside", through_a_link: "outside",
    sibling_of_the_same_beginning: "outside", linked_weights: "outside", linked_secret: "outside",
    vocabulary_outside: "outside", tokenizer_outside: "outside", null_in_a_name: "outside",
    pickled: "safetensors", pickled_shard: "safetensors", pickled_adapter: "safetensors",
    imports_by_adapter: "imported", imports_by_megatron: "imported", rests_on_itself: "rests on itself",
    rests_on_nothing: "no base", kernel_of_the_hub: "program from the Hub", kernel_inside: "program from the Hub",
    many_words: "describes", somewhat_many_words: "describes", wide: "describes", many_layers: "describes",
    a_number_without_end: "describes|JSON", deep_configuration: "deeply", large_configuration: "too large",
    header_of_any_length: "not safetensors", header_longer_than_the_file: "not safetensors",
    tensor_of_any_size: "not safetensors", tensor_behind_the_end: "not safetensors", deep_header: "not safetensors",
}  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_hostile_folder_is_refused_before_a_library_sees_it(folder, spoil, monkeypatch):
    import transformers

    models.locate(str(folder))  # sound until now
    spoil(folder)
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(
            getattr(transformers, name), "from_pretrained", lambda *a, **k: pytest.fail("read")
        )
    for load in (models.load_model, models.load_tokenizer, models.configuration):
        with pytest.raises(ModelError, match=SPOILED[spoil]) as error:
            load(str(folder))
        assert error.value.fix or error.value.found


def test_folders_as_they_are_found_are_read(folder, tmp_path):
    """Links of the Hub's cache, names of an author's own machine, a run's adapter, quantized weights' sizes."""
    change(
        folder,
        "tokenizer_config.json",
        tokenizer_file="/root/.cache/none/tokenizer.json",
        name_or_path="/x/y",
    )
    change(
        folder, "config.json", max_position_embeddings=10**7, auto_map={"AutoModelForCausalLM": "modeling.X"}
    )
    shards = tmp_path / "models--a--b"
    snapshot = shards / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (shards / "blobs").mkdir()
    for file in folder.iterdir():
        file.rename(shards / "blobs" / file.name)
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (tmp_path / "link").symlink_to(snapshot)
    assert models.load_model(str(tmp_path / "link")).config.vocab_size == 320


EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model
"""


@pytest.mark.parametrize("family", ["llama", "unknown"])
def test_no_code_of_a_folder_is_run(folder, tmp_path, family, monkeypatch):
    """A known family is loaded by transformers' own class, an unknown one not at all; nothing is asked either."""
    mark = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(EVIL.format(mark=str(mark)))
    own = {
        name: f"modeling_evil.{kind}"
        for name, kind in (("AutoConfig", "Config"), ("AutoModelForCausalLM", "Model"))
    }
    change(folder, "config.json", auto_map=own, model_type=family, trust_remote_code=True)
    change(
        folder,
        "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["modeling_evil.Model", None]},
        trust_remote_code=True,
    )
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.setattr("builtins.input", lambda *said: pytest.fail("asked"))
    seen = []
    sys.addaudithook(
        lambda event, args: seen.append(args[0]) if event == "import" and "evil" in str(args[0]) else None
    )
    if family == "llama":
        assert type(models.load_model(str(folder))).__module__.startswith("transformers.")
        models.load_tokenizer(str(folder))
    else:
        with pytest.raises(ModelError):
            models.load_model(str(folder))
    assert not seen
    assert not mark.exists()


def test_the_recipe_has_no_field_for_remote_code():
    from tunesmith.compose import compose
    from tunesmith.errors import RecipeError

    with pytest.raises(RecipeError, match="trust_remote_code"):
        compose({"model": {"base": "tiny", "trust_remote_code": True}, "data": {"dataset": "example:chat"}})


def test_headers_are_checked_in_little_memory(folder):
    """Ten thousand tensors in a header, then one that lies: still no gigabyte, and no second."""
    content = {f"w{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10_000)}
    made_header(folder, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(untrusted.header(folder / "model.safetensors")) == 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_weights_are_never_unpickled():
    """`torch.load`, `pickle` and their kin stand nowhere in what we ship."""
    words = ("torch.load(", "pickle.load", "import pickle", "import dill", "joblib", "allow_pickle=True",
             "shell=True", "os.system(", "yaml.unsafe_load", "yaml.full_load", "trust_remote_code=True")  # fmt: skip
    sources = Path(untrusted.__file__).parent.rglob("*.py")
    found = [
        (str(path), word) for path in sources for word in words if word in path.read_text(encoding="utf-8")
    ]
    assert not found

"""What a command loads before it says what is wrong."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import mmap
import os
import subprocess
import sys
import time
import types
from importlib import metadata

import pytest

from tunesmith import api, devices, libraries, preflight
from tunesmith.compose import compose
from tunesmith.errors import TunesmithError

HEAVY = ("torch", "trl", "peft", "datasets", "scipy", "gradio", "pandas")


def loaded_after(code: str) -> dict:
    told = f"import json, sys\nprint(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{told}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *said, loaded = done.stdout.strip().splitlines()
    return {"said": "\n".join(said), "loaded": json.loads(loaded)}


def test_the_dataflow_alone_loads_nothing_heavy():
    assert loaded_after("import tunesmith.dataflow, tunesmith.estimate, tunesmith.devices")["loaded"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--dataset", "missing.jsonl"], "missing.jsonl"),
        (["plan", "--set", "training.learning_rat=1"], "learning_rate"),
        (["plan", "--device", "h1000"], "h100-80gb"),
        (["show", "presetz"], "presets"),
        (["validate", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_bad_command_is_answered_without_torch(arguments, said):
    code = f"from tunesmith.cli import app\ntry:\n    app({arguments!r})\nexcept SystemExit:\n    pass\n"
    found = loaded_after("import sys; sys.stderr = sys.stdout\n" + code)
    assert said in found["said"]
    assert found["loaded"] == []


def test_while_libraries_load_the_collector_rests_and_nothing_quantizes():
    def state():
        return gc.isenabled(), sys.modules.get("bitsandbytes", "as it was")

    def broken():
        with libraries.loading():
            seen.append(gc.isenabled())
            with libraries.loading():
                pass
            hidden = sys.modules["bitsandbytes"] is None
            seen.extend((gc.isenabled(), hidden or before[1] != "as it was"))
            raise OSError("broken")

    seen, before = [], state()
    with pytest.raises(OSError, match="broken"):
        broken()
    assert seen == [False, False, True]
    assert state() == before


def test_what_a_hidden_package_would_have_given_is_there_when_it_is_called(tmp_path, monkeypatch):
    """torchao stands for itself: of 94 modules transformers wants one function, for models that it has packed."""
    source = tmp_path / "torchao/prototype/safetensors/safetensors_support.py"
    source.parent.mkdir(parents=True)
    for folder in source.relative_to(tmp_path).parents[:-1]:
        (tmp_path / folder / "__init__.py").touch()
    source.write_text("def flatten_tensor_state_dict(given):\n    return {**given, 'flat': True}\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    asks = types.ModuleType("transformers.quantizers.quantizer_torchao")
    asks.is_torchao_available = bool
    monkeypatch.setitem(sys.modules, asks.__name__, asks)
    with libraries.loading():
        assert importlib.util.find_spec("torchao") is None
    assert "torchao" not in sys.modules
    assert asks.flatten_tensor_state_dict({"a": 1}) == {"a": 1, "flat": True}
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)


def test_versions_of_packages_are_looked_up_for_those_that_are_asked_about():
    before = metadata.packages_distributions
    true, asked = before(), []
    with libraries.loading():
        assert metadata.packages_distributions is not before
    assert metadata.packages_distributions is before
    found = libraries.Installed(lambda: asked.append(1) or true)
    for name in ("transformers", "huggingface_hub", "torch"):
        assert metadata.version(found[name][0]) == metadata.version(name)
    assert not asked
    assert found.get("PIL") == true["PIL"]
    assert found.get("no_such_package") is None
    with pytest.raises(KeyError):
        found["no_such_package"]
    assert asked == [1]


def in_memory(path) -> int:
    """Pages of a file that the system holds, by its own account."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        marks = (ctypes.c_ubyte * -(-len(pages) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(pages)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(pages)), marks
        )
        del start
    assert not failed
    return sum(mark & 1 for mark in marks)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="another system")
def test_weights_are_read_from_the_disk_while_nobody_waits_for_them(pytestconfig, monkeypatch):
    run, size = pytestconfig.cache.mkdir("cold"), 8 * 2**20  # on a disk, where tmp_path may be in memory
    weights = run / "final_model/model.safetensors"
    weights.parent.mkdir(exist_ok=True)
    with weights.open("wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(weights) > 10:
        pytest.skip("these files are never out of memory")
    monkeypatch.setattr(devices, "available", lambda: 2 * size - 1)
    assert libraries.read_ahead(str(run)) is None
    assert in_memory(weights) <= 10
    monkeypatch.undo()
    libraries.read_ahead(str(run)).join()
    until = time.monotonic() + 20
    while in_memory(weights) < size // mmap.PAGESIZE and time.monotonic() < until:
        time.sleep(0.01)
    assert in_memory(weights) == size // mmap.PAGESIZE
    weights.unlink()
    assert libraries.read_ahead("no such model") is libraries.read_ahead("tiny") is None


def test_a_training_has_its_weights_read_ahead_before_anything_else(tmp_path, monkeypatch):
    asked = []

    def refuse(recipe):
        raise TunesmithError(f"after {asked}")

    monkeypatch.setattr(libraries, "read_ahead", lambda *given: asked.append(given))
    monkeypatch.setattr(preflight, "check", refuse)
    settings = {"output_dir": str(tmp_path), "model": {"base": "x/y", "revision": "z"}}
    with pytest.raises(TunesmithError, match=r"after \[\('x/y', 'z'\)\]"):
        api.train(compose(settings).recipe)


LOADED = """
import gc, sys
from tunesmith.training.fit import quiet_libraries
quiet_libraries()
from tunesmith import libraries
from transformers.utils import is_scipy_available
is_scipy_available()  # as the workbench has asked before, which reads data first
libraries.load_libraries()
print("scipy" in sys.modules, gc.get_freeze_count())
libraries.own_process()
libraries.load_libraries()
print(gc.get_freeze_count() > 100_000, gc.isenabled())
from transformers.loss import loss_for_object_detection, loss_rt_detr
print(is_scipy_available())
for module in (loss_for_object_detection, loss_rt_detr):
    print([list(map(int, found)) for found in module.linear_sum_assignment([[5.0, 1.0], [2.0, 9.0]])])
"""


@pytest.mark.slow
def test_scipy_waits_until_it_is_used_and_what_the_command_loaded_is_not_searched_for_cycles():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().splitlines()
    assert said == ["False 0", "True True", "True", *["[[0, 1], [1, 0]]"] * 2]


ADAPTERS = """
import sys
from tunesmith.training.fit import quiet_libraries
quiet_libraries()
from tunesmith import libraries, models
from tunesmith.recipe import LoRA, QLoRA
libraries.load_libraries()
plain = models.load_model("tiny", dtype="float32", device="cpu")
models.attach(plain, LoRA(kind="lora"))
print([name for name in ("bitsandbytes", "torchao", "torch._inductor.compile_fx") if name in sys.modules])
section = QLoRA(kind="qlora")
packed = models.load_model("tiny", dtype="float32", device="cpu", quantize=section)
packed = models.attach(packed, section)
print(sum(type(m).__name__ == "Linear4bit" and type(m).__module__.startswith("peft") for m in packed.modules()))
"""


@pytest.mark.slow
def test_an_adapter_on_plain_weights_loads_no_quantizer_and_one_on_four_bits_still_finds_it():
    pytest.importorskip("bitsandbytes")
    done = subprocess.run([sys.executable, "-c", ADAPTERS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plain, packed = done.stdout.strip().splitlines()[-2:]
    assert plain == "[]"
    assert int(packed) > 0

"""What the tests share: a 14k-parameter Llama with its own tokenizer, built here, and small data files."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib.metadata
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes of several threads each wait for one another, and take ten times as long.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts us with `&` has us ignore Ctrl-C, and what tests start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from tunesmith.training.fit import quiet_libraries

quiet_libraries()


def _free_memory() -> int:
    """Bytes that files in memory may take; 0 where there are none, or where nothing can be started from there."""
    try:
        facts = os.statvfs("/dev/shm")
        known = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    except (AttributeError, OSError):
        return 0
    if facts.f_flag & (os.ST_NOEXEC | os.ST_RDONLY) or not os.access("/dev/shm", os.W_OK):
        return 0
    return min(facts.f_bavail * facts.f_frsize, 1024 * int(known[1]) if known else 0)


def _is_over(folder: Path) -> bool:
    """Whether the tests that made a folder have ended."""
    try:
        os.kill(int(folder.name.rpartition("-")[2]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, PermissionError):
        pass
    return False


_in_memory = None
if "TMPDIR" not in os.environ and _free_memory() >= 4 * 2**30:
    # A run flushes eighty files to the disk; tests would wait for it, and none of them cuts the power.
    for left in Path("/dev/shm").glob("tunesmith-pytest-*"):  # by tests that failed, or were killed
        if _is_over(left):
            shutil.rmtree(left, ignore_errors=True)
    _in_memory = Path(f"/dev/shm/tunesmith-pytest-{os.getpid()}")
    _in_memory.mkdir(mode=0o700, exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(_in_memory), None
# Prepared data of tests is not the user's; one folder per process.
_cache = os.environ["TUNESMITH_CACHE"] = tempfile.mkdtemp(prefix="tunesmith-tests-")


def pytest_sessionfinish(exitstatus) -> None:
    shutil.rmtree(_cache, ignore_errors=True)
    if _in_memory and exitstatus == 0:
        # What tests and their processes left there takes memory.
        atexit.register(shutil.rmtree, _in_memory, ignore_errors=True)


# Each training asks for the versions of a dozen packages two dozen times, which opens and parses their files.
importlib.metadata.version = functools.cache(importlib.metadata.version)
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)

_collected = pytest.StashKey[list[str]]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items) -> None:
    config.stash[_collected] = [item.nodeid for item in items]
    # Where proofs and tests run together, no process is left alone with a long one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def every_case(pytestconfig) -> list[str]:
    """Every case that was found, before marks and names chose among them."""
    return pytestconfig.stash[_collected]


_modules_set_aside = 0


def pytest_runtest_logfinish() -> None:
    """Take what libraries made on import out of the garbage collector's rounds.

    Each training asks for a collection, which walks all objects: a third of a second of a second and a half.
    """
    global _modules_set_aside
    if len(sys.modules) > _modules_set_aside + 50:
        gc.collect()
        gc.freeze()
        _modules_set_aside = len(sys.modules)


CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = (
    "what is the capital of france paris red blue green one two three count rows question answer hello yes no"
)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 320 tokens with a ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_tokenizer, tmp_path_factory) -> Path:
    """The model with its tokenizer as a folder that plain transformers load."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-model")
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_kind(tiny_tokenizer, tmp_path_factory) -> Path:
    """A model of a kind that the fast forward does not cover, with the tiny one's tokenizer."""
    import torch
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("other-kind")
    config = OlmoConfig(
        vocab_size=len(tiny_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )  # fmt: skip
    OlmoForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def question_file(tmp_path) -> Path:
    """Forty short questions with answers, as JSON lines."""
    path = tmp_path / "questions.jsonl"
    colors = ("red", "blue", "green", "one", "two")
    rows = [{"prompt": f"what is the count of {i}", "response": f"{colors[i % 5]} {i}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def unlaunched(monkeypatch) -> None:
    """An environment as in a process that no launcher has started."""
    from tunesmith import launch, ranks

    for name in (*ranks.HIDDEN, ranks.RENDEZVOUS, "MASTER_PORT", launch.JOB):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory) -> Path:
    """A T5 of a few thousand parameters with its own tokenizer, as a folder that plain transformers load."""
    import encoder_decoders

    return encoder_decoders.save("t5", tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture
def few_steps(tiny_model_folder, question_file, tmp_path):
    """A recipe of a few steps, the last of each pass not full, in 1 process, with changes over it."""
    from tunesmith.compose import compose, overlaid

    def made(name: str, *changes, **training):
        base = {
            "name": name, "output_dir": str(tmp_path / "runs"), "model": {"base": str(tiny_model_folder)},
            "data": {"dataset": str(question_file), "max_length": 64, "num_samples": 27},
            "evaluation": {"skip": True, "samples": 0},
            "training": {
                "num_epochs": 2, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4,
                "learning_rate": 1e-3, "warmup_steps": 0, "logging_steps": 1, "eval_steps": 2, "save_steps": 2,
                "save_total_limit": 20, **training,
            },
        }  # fmt: skip
        return compose(overlaid(base, *changes)).recipe

    return made

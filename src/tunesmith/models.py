"""Models: find and load weights and tokenizer, attach an adapter, freeze layers, describe.

Only safetensors are read and no code from a model's folder or the Hub is ever run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from tunesmith import libraries, ranks
from tunesmith.errors import MissingExtra, ModelError, closest, nearest
from tunesmith.recipe import PRINCIPAL, Adapter, Freeze, LoRA, Method, Model, QLoRA

FILES = {
    ".json",
    ".jsonl",
    ".csv",
    ".parquet",
    ".txt",
    ".yaml",
    ".yml",
    ".safetensors",
    ".gguf",
    ".bin",
    ".pt",
}
"""Suffixes that make a name a file's, never a Hub id's (`Qwen2.5` has a suffix too)."""

HUB_SECONDS = 5.0
"""How long the Hub may take to answer whether it has a model."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

Kind = Literal["causal", "seq2seq", "reward"]
"""What a model is made for: continuing a text, reading one (encoder) and writing another (decoder), or giving a
text one score."""

Head = Literal["score"]
"""What a method puts in the place of the output layer: one number for the whole text."""

QUERY_VALUE = {
    "q_proj", "v_proj",  # Llama, Mistral, Qwen, Gemma, OPT
    "query", "value",  # BERT-likes
    "q_lin", "v_lin",  # DistilBERT
    "q", "v",  # T5
    "query_key_value",  # GPT-NeoX, Falcon, BLOOM
    "c_attn",  # GPT-2, a Conv1D
    "qkv_proj", "Wqkv", "qkv",  # Phi-3, MPT
    "wq", "wv",
}  # fmt: skip
"""Names of the projections that make queries and values, family by family; `finetuner.TARGET_PATTERNS` is the
notebook class's own, ordered table."""


@dataclass(frozen=True)
class Description:
    """A model in numbers, for the plan, the model card and the terminal."""

    architecture: str
    parameters: int
    trainable: int
    layers: int
    context_length: int | None

    def sentence(self) -> str:
        """One line for people."""
        share = self.trainable / self.parameters
        return (
            f"{self.architecture}, {self.parameters:,} parameters in {self.layers} layers, "
            f"{self.trainable:,} trained ({share:.2%})"
        )


def locate(base: str, *, revision: str | None = None) -> str:
    """What `--base-model` stands for: the shipped model, a folder (of a run: its final model), or a Hub id.

    Raises ModelError for a folder that holds no model, for a path that does not exist, and for a Hub id
    that the Hub does not have or that cannot be asked for and is not in its cache.
    """
    from tunesmith.assets import TINY_MODEL

    if base == "tiny":
        return str(TINY_MODEL)
    path = Path(base).expanduser()
    if path.is_dir():
        if (path / "final_model").is_dir():
            path = path / "final_model"
        if not _holds_model(path):
            from tunesmith.training.run import is_run, open_run

            if is_run(path):
                raise open_run(path).unfinished()
            raise ModelError(
                f"The folder {base} holds no model.",
                found=", ".join(sorted(p.name for p in path.iterdir())[:8]) or "an empty folder",
                fix=_in_the_place_of(path),
            )
        path = path.resolve()
        _vet(path)
        return str(path)
    near = {p.name: str(p) for p in path.parent.iterdir() if _holds_model(p)} if path.parent.is_dir() else {}
    if path.exists():
        raise ModelError(f"{base} is a file, not a model's folder or a run.", fix=_proposed(path.name, near))
    if is_path(base):
        raise ModelError(f"There is no model folder or run {base}.", fix=_proposed(path.name, near))
    location, problem = _on_hub(base, revision)
    if problem:
        unreached = problem.startswith(UNASKED[1])
        raise ModelError(
            f"The model '{base}' is not on this machine, and the Hub could not be asked for it."
            if unreached or ("/" in base and problem.startswith(UNASKED[0]))
            else f"There is no model folder or run {base}."
            if "/" in base and near
            else f"There is no model '{base}'.",
            found=f"no such folder or run here; {problem}",
            fix=_proposed(path.name, {**near, "tiny": "tiny"})
            + (" Or mend the way to the Hub (HF_ENDPOINT, HTTPS_PROXY) and try again." if unreached else ""),
        )
    if Path(location).is_dir():  # the Hub's cache, which may hold a part of the model
        _vet(Path(location), is_whole=False)
    return location


def _vet(folder: Path, *, is_whole: bool = True) -> None:
    _check(folder, _state(folder), is_whole)


State = tuple[tuple[str | int, ...], ...]


def _state(folder: Path) -> State:
    """What tells whether a file of a folder has changed since it was looked at."""
    entries = [(p.name, p.lstat()) for p in sorted(folder.iterdir())]
    return tuple((name, facts.st_ino, facts.st_size, facts.st_mtime_ns) for name, facts in entries)


@lru_cache(maxsize=64)
def _check(folder: Path, state: State, is_whole: bool) -> None:
    """`untrusted.check_folder`, once for each state of a folder."""
    from tunesmith.untrusted import check_folder

    check_folder(folder, is_whole=is_whole)


def check_as_written(folder: Path) -> None:
    """Raises ModelError where a model that a run wrote (its best one, its final one, a checkpoint) has changed since,
    by the sha256 of every file. Each state of a folder is read once; of others' models nobody says how they were."""
    _check_as_written(folder, _state(folder))


@lru_cache(maxsize=64)
def _check_as_written(folder: Path, state: State) -> None:
    from tunesmith.training import checkpoints

    if wrong := checkpoints.changed(folder):
        whole = " and ".join(str(path) for path in checkpoints.whole_beside(folder) if _holds_model(path))
        raise ModelError(
            f"The model {folder} is not as its run wrote it.",
            found=wrong,
            fix=(
                f"Whole beside it: {whole}; give that in its place. "
                if whole
                else "Copy it again from where it is whole, or train it again. "
            )
            + f"Where you changed it yourself, delete {checkpoints.list_of(folder)} in it: then it is taken as it is.",
        )


WANTED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "README.md",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
)
"""Files of a Hub model that are read: weights in safetensors, what describes them, and under what terms."""


DESCRIBING = ("*.json", "*.jinja", "*.model", "*.txt")
"""Those of them that describe it, without weights."""


def folder_of(base: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """The folder with a model's files, downloaded where it is the Hub's, and looked at (`untrusted`) before any library
    reads them. A Hub model's are those of one commit; only its descriptions without `weights`. With them, what a run
    wrote has to be as it was written.

    Raises ModelError where there is none, or it may not be read.
    """
    location = locate(base, revision=revision)
    if Path(location).is_dir():
        if weights and Path(base).expanduser().is_dir():  # the Hub's cache, of links, has hashes of its own
            check_as_written(Path(location))
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        wanted = list(WANTED if weights else DESCRIBING)
        folder = Path(snapshot_download(location, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the network's many ways to fail come as many types
        raise _not_loaded("model", base, error) from error
    _vet(folder, is_whole=weights)
    return folder


def files_of(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of each file of a folder: what tells one state of a model from another."""
    return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())


ENDS = 2**20
"""Bytes at the beginning and at the end of a file of weights that tell it from another of its size."""


def fingerprint(base: str, *, revision: str | None = None) -> str | None:
    """Hash of a model's configuration and of the sizes, beginnings and ends of its weights: training changes every
    weight, and reading all of a large model takes minutes. None where the files are not on this machine."""
    folder = Path(locate(base, revision=revision))
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in {".safetensors", ".json"}):
        if path.suffix == ".json" and path.name not in ("config.json", "adapter_config.json"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(size - ENDS, 0))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


def _holds_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", "adapter_config.json", "final_model"))


def _in_the_place_of(folder: Path) -> str:
    """What to try where a folder without a model was named."""
    if inner := sorted(str(p) for p in folder.iterdir() if p.is_dir() and _holds_model(p)):
        return f"In it there is {', '.join(inner[:8])}: give that."
    said = "Give a folder with config.json or adapter_config.json, a run, a Hub id, or `tiny`."
    if any(folder.glob("*.gguf")):
        said = f"A GGUF file is for llama.cpp or Ollama, which serve it; here, the model that it was made of. {said}"
    return said


def is_path(base: str) -> bool:
    """Whether a name that is not there can only be a path: no Hub id looks like it."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if base.startswith((".", "/", "~")) or Path(base).suffix.lower() in FILES:
        return True
    try:
        validate_repo_id(base)
    except HFValidationError:
        return True
    return False


def _proposed(name: str, near: Mapping[str, str]) -> str:
    """The model that was probably meant, of those nearby, by name."""
    close = closest(name, near)
    if close:
        return f"Did you mean '{near[close]}'?"
    known = f" Known here: {', '.join(sorted(near.values())[:8])}." if near else ""
    return f"Check the path, or give a Hub id such as owner/name.{known}"


UNASKED = ("the Hub is switched off (HF_HUB_OFFLINE)", "the Hub cannot be reached")
"""Why it is not known whether the Hub has a model."""


@lru_cache
def _on_hub(base: str, revision: str | None) -> tuple[str, str | None]:
    """Where a Hub model is to be loaded from, by one short request, and what is wrong with it.

    The libraries would ask again and again before they give up. Where the Hub does not answer, its cache
    on this machine does.
    """
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    problem = UNASKED[0]
    if not constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(base, revision=revision, timeout=HUB_SECONDS)
            return base, None
        except GatedRepoError:
            return base, "the Hub gives access only to those who accepted its terms and ran `hf auth login`"
        except RepositoryNotFoundError:
            return base, "the Hub has no such model, or it is private: then `hf auth login`"
        except RevisionNotFoundError:
            return base, f"the Hub's model has no revision '{revision}'"
        except Exception as error:  # the network's many ways to fail come as many types
            first_line = next(iter(str(error).strip().splitlines()), "")[:200]
            problem = f"{UNASKED[1]} ({type(error).__name__}: {first_line})"
    try:
        return snapshot_download(base, revision=revision, local_files_only=True), None
    except Exception:  # whatever is wrong with the cache, the model is not there
        return base, problem


def load_tokenizer(base: str, *, revision: str | None = None) -> Any:
    """The tokenizer of a model, with a padding token. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    from tunesmith.data import rendering

    rendering.install()

    folder = folder_of(base, revision=revision, weights=False)
    is_here = Path(base).expanduser().is_dir()
    if not has_tokenizer(folder):
        if is_here:
            check_as_written(folder)  # which names the file that is gone
        raise ModelError(
            f"The model folder {folder} has no tokenizer.",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:8]),
            fix="Copy tokenizer.json and tokenizer_config.json of the model into it.",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # the loaders raise many unrelated types for one user-visible fact
        if is_here:
            check_as_written(folder)
        if wrong := _no_json(folder):
            raise ModelError(
                f"The tokenizer of '{base}' is damaged.",
                found=wrong,
                fix="Copy that file again from the model.",
            ) from None
        raise _not_loaded("tokenizer", base, error) from error
    if tokenizer.pad_token_id is None:
        # Labels carry -100 under padding, so eos may pad without losing its own label.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _no_json(folder: Path) -> str | None:
    """Which file of a tokenizer cannot be read as JSON; None where each can. The libraries then speak of a tokenizer
    that is not there."""
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"):
        try:
            if (folder / name).is_file():
                json.loads((folder / name).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"{name} is no JSON ({error})"
    return None


def kind(base: str, *, revision: str | None = None) -> Kind:
    """Whether a model continues texts (causal), answers what its encoder has read (seq2seq) or gives scores
    (reward), from its configuration alone. Raises ModelError for a model that does nothing of it, such as BERT."""
    if _is_scoring_adapter(folder_of(base, revision=revision, weights=False)):
        return "reward"
    return _kind(configuration(base, revision), base)


def check_kind(
    base: str, wanted: Kind, *, method: str, head: Head | None = None, revision: str | None = None
) -> None:
    """Raises ModelError, naming the right method, where a method is given a model of another kind.

    A method that puts a head on a causal model also takes one that has it.
    """
    found = kind(base, revision=revision)
    if found == wanted or (head and found == "reward"):
        return
    names = {
        "causal": ("a causal language model", "sft"),
        "seq2seq": ("an encoder-decoder model", "seq2seq"),
        "reward": ("a reward model", "reward"),
    }
    what, right = names[found]
    makes = (
        f"makes a reward model of a {wanted} one" if head else f"trains {names[wanted][0].split(' ', 1)[1]}s"
    )
    fix = f"Use --method {right}, or name {names[wanted][0]}" + (
        " such as T5 or BART." if wanted == "seq2seq" else " such as Qwen, Llama or GPT-2."
    )
    if found == "reward" and method in ("grpo", "rloo", "ppo"):
        fix = (
            "Give the model that is to learn as --base-model, and this one as what scores it: "
            f'--set method.rewards="[{{kind: model, model: {base}}}]"'
        )
    raise ModelError(
        f"'{base}' is {what}, and the method '{method}' {makes}.",
        found=_architecture(configuration(base, revision)),
        fix=fix,
    )


def check_weights(base: str, *, revision: str | None = None) -> None:
    """Raises ModelError for a folder of this machine without weights: a plan needs none, a training does."""
    folder = Path(locate(base, revision=revision))
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        names = sorted(path.name for path in folder.iterdir())
        raise ModelError(
            f"The folder of '{base}' has no weights.",
            found=f"no *.safetensors in {folder}, but {', '.join(names[:8])}{', …' if len(names) > 8 else ''}",
            fix="Put them there as safetensors, the only kind that is read, or give a folder that has them; "
            "`tunesmith plan` alone does without.",
        )


def check_writes(base: str) -> None:
    """Raises ModelError for a reward model, which cannot be asked anything."""
    if kind(base) == "reward":
        raise _writes_nothing(base)


def check_can_write(model: Any) -> None:
    """The same for a loaded model."""
    if is_reward(model):
        raise _writes_nothing(str(model.config.name_or_path) or type(model).__name__)


def _writes_nothing(name: str) -> ModelError:
    return ModelError(
        f"'{name}' is a reward model: it gives answers a score and writes none.",
        fix="Ask a causal model. `tunesmith evaluate` measures how well a reward model ranks pairs of answers, and "
        "reinforcement learning takes it as a reward: `rewards: [{kind: model, model: FOLDER}]`.",
    )


def _is_scoring_adapter(folder: Path) -> bool:
    file = folder / "adapter_config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"


def configuration(base: str, revision: str | None = None) -> Any:
    """A model's configuration; of an adapter that of its base."""
    from transformers import AutoConfig

    folder = folder_of(base, revision=revision, weights=False)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        said = json.loads(adapter.read_text(encoding="utf-8"))
        return configuration(str(said.get("base_model_name_or_path")), said.get("revision"))
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:
        raise _not_loaded("model", base, error) from error


def _kind(config: Any, base: str) -> Kind:
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    if _architecture(config).endswith(SCORING) and not fills_gaps(config):
        if config.num_labels == 1:
            return "reward"
        raise ModelError(
            f"'{base}' sorts texts into {config.num_labels} classes; a reward model gives one number.",
            found=_architecture(config),
            fix="Name a causal language model, or a classifier with num_labels 1.",
        )
    if fills_gaps(config) or _architecture(config).endswith("EncoderModel"):
        raise ModelError(
            f"'{base}' is an encoder-only model: it reads a text from both sides and writes none, so it cannot "
            "be asked or tuned to answer.",
            found=f"{_architecture(config)}, model type '{config.model_type}'",
            fix="Use a causal language model (Qwen, Llama, GPT-2), or an encoder-decoder model (T5, BART) with "
            "--set method.kind=seq2seq.",
        )
    return "causal"


def fills_gaps(config: Any) -> bool:
    """Whether it is a BERT-like: one can be built as a decoder, but was trained as such only where its
    configuration says so."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    writes = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return config.model_type in ENCODERS and not writes


def _architecture(config: Any) -> str:
    return next(iter(config.architectures or ()), f"model type '{config.model_type}'")


SCORING = "ForSequenceClassification"
"""How transformers' names of models end that give a text a score."""
AUTO: dict[Kind, str] = {
    "causal": "CausalLM",
    "seq2seq": "Seq2SeqLM",
    "reward": "SequenceClassification",
}
"""Kind -> what transformers' and PEFT's automatic classes are called, behind `AutoModelFor`."""


def _model_class(kind: Kind) -> Any:
    import transformers

    return getattr(transformers, f"AutoModelFor{AUTO[kind]}")


def _check_can_score(config: Any, base: str) -> None:
    """Raises ModelError where transformers has no such model with a score instead of an output layer."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS,
    )

    if config.model_type not in CLASSIFIERS:
        raise ModelError(
            f"'{base}' cannot become a reward model: transformers has no {config.model_type} that gives scores.",
            found=_architecture(config),
            fix="Use one of a family that has, such as Llama, Qwen, Mistral, Gemma or GPT-2.",
        )


def load_model(
    base: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    attention: str = "auto",
    quantize: QLoRA | None = None,
    head: Head | None = None,
) -> Any:
    """A model of any kind on a device; an adapter's folder gives its base with the adapter on it.

    With `head` a causal model gets that head in place of its output layer; a reward model keeps the one it has.
    """
    import torch

    location = str(folder_of(base, revision=revision))
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if attention != "auto":
        options["attn_implementation"] = attention
    if quantize:
        place = torch.cuda.current_device() if device == "cuda" else device  # each process has its own
        options |= {
            "quantization_config": four_bit(quantize, head, device=device),
            "device_map": {"": place},
        }
    is_adapter = (Path(location) / "adapter_config.json").is_file()
    if is_adapter and quantize:
        raise ModelError(
            f"{base} is an adapter, and QLoRA quantizes whole weights.",
            fix="Merge it into its base first, or use --lora.",
        )
    found = kind(base, revision=revision)
    of_kind: Kind = "reward" if head else found
    if of_kind == "reward":
        _check_can_score(configuration(base, revision), base)
        options["num_labels"] = 1
    missing: set[str] = set()
    is_packed = bool(quantize or getattr(configuration(base, revision), "quantization_config", None))
    if not is_packed:
        with libraries.loading():
            import transformers.modeling_utils  # noqa: F401
    # PEFT asks of every layer under an adapter whether one of these packages has packed it, and loads them for that.
    hides = is_adapter and not is_packed
    hiding = libraries.loading(libraries.PACKERS) if hides else contextlib.nullcontext()
    try:
        with hiding:
            if is_adapter and of_kind != found:
                model = _adapter_with_head(location, dtype=dtype, device=device, attention=attention)
            elif is_adapter:
                import peft

                tuned = getattr(peft, f"AutoPeftModelFor{AUTO[of_kind]}")
                model = tuned.from_pretrained(location, **options)
            elif of_kind == "reward":
                auto = _model_class(of_kind)
                model, info = auto.from_pretrained(location, output_loading_info=True, **options)
                missing = set(info["missing_keys"])
            else:
                model = _model_class(of_kind).from_pretrained(location, **options)
    except ModelError:
        raise
    except Exception as error:
        raise _not_loaded("model", base, error) from error
    if of_kind == "reward" and not is_adapter:
        _settle_head(model, base, missing, is_new=of_kind != found)
    if of_kind == "reward":
        _settle_padding(model, base, revision, is_new=of_kind != found, is_adapter=is_adapter)
    starts_with_pad = hasattr(model, "_shift_right")  # T5 and its kin, whose configurations may leave it open
    if starts_with_pad and getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = model.config.pad_token_id
    if not Path(base).expanduser().is_dir() and base != "tiny" and not is_adapter:
        # A Hub model that came from the cache's folder is still that of the Hub.
        model.name_or_path = model.config.name_or_path = base
    if quantize and device == "cpu":
        _keep_packing(model)
    return model if quantize else model.to(device)


HEAD = "score"
"""What transformers calls the layer that gives the score."""


def _adapter_with_head(location: str, *, dtype: str, device: str, attention: str) -> Any:
    """An adapter of a causal model, on its base with a head in place of the output layer."""
    import peft

    config = peft.PeftConfig.from_pretrained(location)
    base = load_model(
        str(config.base_model_name_or_path),
        revision=config.revision,
        dtype=dtype,
        device=device,
        attention=attention,
        head="score",
    )
    config.task_type = None  # as a causal model's it would ask for an output layer
    return peft.PeftModel.from_pretrained(base, location, config=config)


def _settle_head(model: Any, base: str, missing: set[str], *, is_new: bool) -> None:
    """Start a new head at zero, and see that no other weight is a new one.

    At zero it says of any two answers that they are alike, which is what is known before training. Drawn at random
    it would prefer whole groups of answers by chance, and training would have to undo that first.
    """
    import torch

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = getattr(inner, HEAD, None)
    others = {name for name in missing if not name.startswith(f"{HEAD}.")}
    if head is None or others or (missing and not is_new):
        raise ModelError(
            f"'{base}' has not the weights of a model that gives scores."
            if not is_new
            else f"'{base}' cannot become a reward model.",
            found=f"{type(inner).__name__} without {', '.join(sorted(missing)[:5]) or HEAD}",
            fix="Use a model of another family, such as Llama, Qwen, Mistral, Gemma or GPT-2.",
        )
    if is_new:
        with torch.no_grad():
            head.weight.zero_()


def _settle_padding(model: Any, base: str, revision: str | None, *, is_new: bool, is_adapter: bool) -> None:
    """Which token pads: what a model with a score was trained with. A new one is yet to be told.

    An adapter has no configuration of its own to say so, but its tokenizer says so.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = inner.config.get_text_config()
    if is_new:
        text.pad_token_id = None
    elif is_adapter or text.pad_token_id is None:
        text.pad_token_id = load_tokenizer(base, revision=revision).pad_token_id


def set_padding(model: Any, tokenizer: Any) -> None:
    """Tell a reward model which token pads: it reads its score at the last token that is another one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def is_reward(model: Any) -> bool:
    """Whether a loaded model gives texts a score."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.endswith(SCORING)


def outline(
    base: str,
    *,
    revision: str | None = None,
    head: Head | None = None,
    dtype: str = "float32",
    attention: str = "auto",
) -> Any:
    """A model's modules without their weights, from its configuration: no memory, no time."""
    import torch

    config = configuration(base, revision)
    of_kind: Kind = "reward" if head else kind(base, revision=revision)
    if of_kind == "reward":
        _check_can_score(config, base)
        config.num_labels = 1
    auto = _model_class(of_kind)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": False}
    if attention != "auto":
        options["attn_implementation"] = attention
    try:
        with torch.device("meta"):
            return auto.from_config(config, **options)
    except Exception as error:
        raise _not_loaded("model", base, error) from error


def check_fit(
    base: str,
    adapter: Adapter,
    *,
    revision: str | None = None,
    max_length: int,
    head: Head | None = None,
) -> None:
    """Whether adapter and length fit the model, before a row is read. Raises ModelError."""
    from tunesmith.generation import context_length

    model = outline(base, revision=revision, head=head)
    if isinstance(adapter, LoRA):
        _check_rank(model, adapter, target_modules(model, adapter.targets))
        _check_names(model, adapter.modules_to_save, "modules_to_save")
    elif isinstance(adapter, Freeze):
        freeze(model, adapter.ratio)
    limit = context_length(model)
    if limit and max_length > limit:
        raise ModelError(
            f"data.max_length {max_length} is above the context of the model, {limit} tokens.",
            fix=f"Give --max-length {limit} or less; data.over_long says what happens to longer examples.",
        )


CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How the names of starts begin with which PEFT takes a part out of the base as it loads an adapter."""


def takes_from_base(adapter: Path) -> str | None:
    """The start by which an adapter, as its configuration says, changes its base on being loaded; None for the others.

    A run's final model says none, as it is delivered as plain LoRA; its checkpoints and adapters from elsewhere can.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return start if is_from_base(start := config.get("init_lora_weights")) else None


def is_from_base(start: Any) -> bool:
    """Whether a start, as PEFT's configurations say it, is a part of the base."""
    return isinstance(start, str) and start.lower().startswith(CHANGING)


def _check_rank(model: Any, adapter: LoRA, targets: Sequence[str]) -> None:
    if adapter.init not in PRINCIPAL:
        return
    ends = tuple(f".{target}" for target in targets)
    sizes = [
        (min(m.weight.shape), n)
        for n, m in model.named_modules()
        if n.endswith(ends) and hasattr(m, "weight")
    ]
    least, name = min(sizes, default=(adapter.rank, ""))
    if adapter.rank > least:
        raise ModelError(
            f"adapter.rank {adapter.rank} is above the {least} that {name} has with adapter.init {adapter.init}.",
            fix=f"Give --lora-rank {least} or less, leave adapter.init out, or name other modules with "
            "--target-modules.",
        )


def _not_loaded(what: str, base: str, error: Exception) -> ModelError:
    first_line = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    if "custom code" in first_line:
        return ModelError(
            f"The {what} of '{base}' needs code of its own, and no code of a model is ever run here.",
            found="auto_map in its configuration, and a model type that transformers does not know",
            fix="Use a model that transformers itself has.",
        )
    return ModelError(
        f"The {what} of '{base}' cannot be loaded.",
        found=f"{type(error).__name__}: {first_line}",
        fix="Give a folder with safetensors weights, config.json and tokenizer, or a Hub id that you can reach.",
    )


def copied(model: Any) -> Any:
    """A copy of a model that shares with it those weights that are not trained."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, dict(shared))


def reference_of(policy: Any) -> tuple[Any, str]:
    """What the policy's divergence is measured from, None for the policy without its adapter; and why.

    An adapter that trains biases or starts from the base's own principal parts leaves something else than the base
    when it is switched off; then, as without an adapter, it is a frozen copy.
    """
    configs = list(getattr(policy, "peft_config", {}).values())
    if configs and all(c.bias == "none" and c.init_lora_weights not in PRINCIPAL for c in configs):
        return None, "the model with its adapter switched off, which takes no memory"
    frozen = copied(policy).requires_grad_(False).eval()
    own = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    return frozen, f"a frozen copy of the {own:,} weights that are trained"


@contextlib.contextmanager
def keeping_types(model: Any) -> Iterator[None]:
    """Give trained weights back their type where what happens meanwhile changes it.

    TRL's trainers turn the adapter of a quantized base into bfloat16 without a word: its updates would be rounded to
    three digits, and a scoring head no longer fits what it reads.
    """
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name]


def _keep_packing(model: Any) -> None:
    """Leave 4-bit weights packed as they are. On CPUs with bfloat16 instructions bitsandbytes packs them anew at the
    first evaluation, which fails for sizes that are no multiple of 32 and is no form to train on."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def require_four_bits() -> None:
    """Raises MissingExtra where the package that packs weights into 4 bits is not installed."""
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "QLoRA", install="'tunesmith[qlora]'")


def four_bit(adapter: QLoRA, head: Head | None = None, *, device: str) -> Any:
    """How weights are packed into 4 bits, as transformers is told. Raises MissingExtra without bitsandbytes."""
    import torch
    from transformers import BitsAndBytesConfig

    require_four_bits()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=adapter.double_quantization,
        bnb_4bit_compute_dtype=torch.bfloat16 if device == "cuda" else torch.float32,
        # Given modules take the place of transformers' own choice, the output layer; a scoring model has none.
        llm_int8_skip_modules=[HEAD] if head else None,
    )


def base_of(adapter: Path) -> tuple[str, str | None]:
    """The base that an adapter names, and its revision. Raises ModelError where it is not there."""
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"The adapter {adapter} names no base.",
            found="adapter_config.json without base_model_name_or_path",
            fix="Write the folder or Hub id of its base there.",
        )
    revision = config.get("revision")
    try:
        locate(base, revision=revision)
    except ModelError as error:
        raise ModelError(
            f"The base of the adapter {adapter} is missing: {base}.",
            found=error.found or error.problem,
            fix="Put it back, or write where it is now as base_model_name_or_path into adapter_config.json.",
        ) from None
    return base, revision


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder brings a tokenizer of its own."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def settle_template(tokenizer: Any, *, is_pair: bool) -> tuple[str, str]:
    """Settle the chat template that goes with a model, an encoder-decoder one with `is_pair`; where it is and why."""
    from tunesmith.data import pairs, templates

    return "saved with it", (pairs.settle_template if is_pair else templates.set_template)(tokenizer, None)


def settle_asking(tokenizer: Any, kind: Kind, section: Model, method: Method) -> None:
    """Settle how a model of this kind is asked outside of a training, as its section and the method's say."""
    from tunesmith import scoring
    from tunesmith.data import pairs
    from tunesmith.data.templates import set_template

    if kind == "seq2seq":
        # A tuned model brings the prefix that it was trained with.
        prefix = None if tokenizer.chat_template else getattr(method, "source_prefix", None)
        pairs.settle_template(tokenizer, section.chat_template, prefix)
    else:
        set_template(tokenizer, section.chat_template)
        if kind == "causal" and method.kind == "reward":
            scoring.settle_padding(tokenizer)


PACKING = "packing.json"
"""Beside an adapter: how its base was packed into 4 bits in training, which PEFT's own file does not say. It goes
wherever the adapter goes."""


@dataclass(frozen=True)
class Packing:
    """A base as an adapter was trained on it."""

    double_quantization: bool
    dtype: str
    """Type of its weights before they were packed."""


def write_packing(model: Any, folder: Path) -> None:
    """Say beside an adapter that its base was packed, if it was."""
    from tunesmith.training.run import write_whole

    owner = getattr(model, "policy", model)
    owner = owner.get_base_model() if hasattr(owner, "get_base_model") else owner
    packed: Any = getattr(getattr(owner, "config", None), "quantization_config", None)
    if not getattr(packed, "load_in_4bit", False) or not (folder / "adapter_config.json").is_file():
        return
    facts = {
        "base": "packed into 4 bits in training; merge with the weights as they were after that",
        "bits": 4,
        "type": packed.bnb_4bit_quant_type,
        "double_quantization": packed.bnb_4bit_use_double_quant,
        "dtype": str(owner.config.dtype).removeprefix("torch."),
    }
    write_whole(folder / PACKING, json.dumps(facts, indent=1))


def read_packing(folder: Path) -> Packing | None:
    """How the base of an adapter was packed, as the file beside it says; None without one. Raises ModelError for one
    that is damaged."""
    file = folder / PACKING
    if not file.is_file():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if (facts["bits"], facts["type"]) != (4, "nf4"):
            raise ValueError(f"{facts['bits']} bits of type {facts['type']}")
        return Packing(bool(facts["double_quantization"]), str(facts["dtype"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{file} does not say how the adapter's base was packed.",
            found=repr(error)[:200],
            fix="Copy it again from the run's final_model.",
        ) from None


def attach(
    model: Any,
    adapter: Adapter,
    *,
    gradient_checkpointing: bool = False,
    merged_base: Path | None = None,
    revision: str | None = None,
) -> Any:
    """The model with only those weights trainable that the adapter names.

    An adapter that the model already carries (a tuned run as the base) becomes part of the weights; a new
    one then needs these on disk, and `merged_base` is where they are written. `revision` is the base's; it is
    written into the adapter, which else would be loaded on another one.
    """
    with libraries.loading():
        import peft

    if isinstance(model, peft.PeftModel):
        model = merged(model).requires_grad_(True)
        if isinstance(adapter, LoRA):
            assert merged_base, "an adapter on an adapter needs a folder for the weights between them"
            with ranks.first() as mine:
                if mine:
                    model.save_pretrained(merged_base)
            model.name_or_path = model.config.name_or_path = str(merged_base.resolve())
            revision = None
    if isinstance(adapter, Freeze):
        freeze(model, adapter.ratio)
        return model
    if not isinstance(adapter, LoRA):
        return model
    if isinstance(adapter, QLoRA):
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    targets = target_modules(model, adapter.targets)
    saved = list(adapter.modules_to_save)
    task = peft.TaskType.SEQ_2_SEQ_LM if is_seq2seq(model) else peft.TaskType.CAUSAL_LM
    if is_reward(model):
        saved, task = list(dict.fromkeys([*saved, HEAD])), peft.TaskType.SEQ_CLS
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha or 2 * adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=targets,
        # Conv1D keeps its weights transposed; PEFT finds that out as well, with a warning per matrix.
        fan_in_fan_out=any(
            type(module).__name__ == "Conv1D"
            and f".{name}".endswith(tuple(f".{target}" for target in targets))
            for name, module in model.named_modules()
        ),
        bias=adapter.bias,
        modules_to_save=saved or None,
        use_rslora=adapter.rank_stabilized,
        use_dora=adapter.dora,
        init_lora_weights=True if adapter.init == "default" else adapter.init,
        revision=revision,
        task_type=task,
    )
    _check_names(model, adapter.modules_to_save, "modules_to_save")
    if adapter.dora:
        _check_directions(model, config.target_modules)
    with contextlib.nullcontext() if isinstance(adapter, QLoRA) else libraries.loading():
        adapted = peft.get_peft_model(model, config)
    # With each save PEFT would write its empty form of a model card; the card comes from us.
    adapted.create_or_update_model_card = lambda output_dir: None
    return adapted


def merged(model: Any) -> Any:
    """A model with its adapter as part of the weights, which are whole again and plain.

    Raises ModelError where that gives a weight that is not a number.
    """
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    is_changed = any(hasattr(end, "base_layer") for end in (head, words))
    if is_changed and head is not None and head.weight.data_ptr() == words.weight.data_ptr():
        import torch

        # One matrix serves both ends, and the adapter may change it at one of them only.
        own = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        getattr(head, "base_layer", head).weight = own
        model.config.tie_word_embeddings = False
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(
            "The adapter cannot be merged into its base.",
            found=str(error).splitlines()[0],
            fix="Its weights are damaged or not numbers: use an earlier checkpoint, or train again.",
        ) from error


def _check_directions(model: Any, targets: Iterable[str]) -> None:
    """DoRA divides each output's weights by their norm: raises ModelError where one is all zeros."""
    for name, module in model.named_modules():
        if name.endswith(tuple(f".{target}" for target in targets)) and module.weight.is_floating_point():
            # Conv1D keeps outputs in columns
            outputs = 0 if type(module).__name__ == "Conv1D" else 1
            dead = int((module.weight.detach().norm(dim=outputs) == 0).sum())
            if dead:
                raise ModelError(
                    f"DoRA does not work on {name}: {dead} of its outputs have no weight, hence no direction.",
                    fix="Leave adapter.dora out, or name other modules with --target-modules.",
                )


def linear_modules(model: Any) -> list[str]:
    """Names of the matrices an adapter can sit on: linear layers and GPT-2's Conv1D, without the head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, HEAD, None) if is_reward(model) else model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def target_modules(model: Any, targets: str | Sequence[str]) -> list[str]:
    """The matrices that `targets` names in this model, as `parent.name` suffixes that PEFT matches.

    `attention` takes every matrix beside a query or value projection, so that GPT-2's `attn.c_proj` is
    in and its `mlp.c_proj` is not. Raises ModelError where nothing matches: training everything
    instead would be a silent change of method.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    linear = linear_modules(model)
    if not isinstance(targets, str):
        convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        _check_names(
            model, targets, "targets", (nn.Linear, Conv1D, nn.Embedding, *convolutions)
        )  # PEFT's LoRA
        return list(targets)
    if targets == "all-linear":
        chosen = linear
    else:
        chosen = [name for name in linear if name.rpartition(".")[2] in QUERY_VALUE]
        if targets == "attention":
            parents = {name.rpartition(".")[0] for name in chosen}
            chosen = [name for name in linear if name.rpartition(".")[0] in parents]
    if not chosen:
        raise ModelError(
            f"No module of {type(model).__name__} is known as {targets}.",
            found="linear modules " + ", ".join(sorted({_suffix(name) for name in linear})[:12]),
            fix="Name the modules: --target-modules NAME,NAME, or use all-linear.",
        )
    return sorted({_suffix(name) for name in chosen})


def _suffix(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _check_names(model: Any, names: Sequence[str], field: str, kinds: tuple[type, ...] = ()) -> None:
    """Raises ModelError where a name is none of a module of these kinds, or of any."""
    known = {name: module for name, module in model.named_modules() if name}
    fitting = [name for name, module in known.items() if not kinds or isinstance(module, kinds)]

    def strangers(modules: Iterable[str]) -> list[str]:
        return [n for n in names if not any(m == n or m.endswith("." + n) for m in modules)]

    if not (missing := strangers(fitting)):
        return
    leaves = {name.rpartition(".")[2] for name in fitting}
    if unknown := strangers(known):
        what = f"modules that {type(model).__name__} does not have: {', '.join(unknown)}"
    else:
        what = f"what is no matrix, which alone an adapter changes: {', '.join(missing)}"
    raise ModelError(
        f"adapter.{field} names {what}.",
        fix=nearest(missing[0], sorted(leaf for leaf in leaves if not leaf.isdigit())),
    )


def freeze(model: Any, ratio: float) -> None:
    """Freeze the bottom share of the layers and what they are fed from, in place: all tables of words and positions.

    A table that is trained would have the backward pass go through every frozen layer. Of an encoder-decoder model that
    share of each half is frozen. Raises ModelError where the share comes to no layer at all.
    """
    stacks = layer_stacks(model)
    counts = [int(len(stack) * ratio) for stack in stacks]
    if not any(counts):
        longest = max(len(stack) for stack in stacks)
        raise ModelError(
            f"--freeze-ratio {ratio:g} freezes no layer.",
            found=" and ".join(f"{len(stack)} layers" for stack in stacks),
            fix=f"Use at least {1 / longest:.2f}, or full fine-tuning.",
        )
    frozen = _feeds(model, stacks)
    for stack, count in zip(stacks, counts, strict=True):
        frozen += stack[:count]
    for module in frozen:
        module.requires_grad_(False)


def _feeds(model: Any, stacks: Sequence[Any]) -> list[Any]:
    """A model's modules before its layers: tables of words and positions, and the norm that BART puts on their sum."""
    import torch

    inside = {module for stack in stacks for module in stack.modules()}
    return [
        module
        for name, module in model.named_modules()
        if module not in inside
        and (isinstance(module, torch.nn.Embedding) or name.endswith("layernorm_embedding"))
    ]


def is_seq2seq(model: Any) -> bool:
    """Whether a loaded model has an encoder that reads and a decoder that writes."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def layer_stacks(model: Any) -> list[Any]:
    """The model's stacks of layers, each bottom first: one, or those of encoder and decoder.

    Raises ModelError for an unknown shape.
    """
    if is_seq2seq(model):
        return [_largest_stack(half, model, None) for half in _halves(model)]
    # Of a model that sees pictures too the layers that write.
    return [_largest_stack(model, model, getattr(model.config.get_text_config(), "num_hidden_layers", None))]


def decoder_layers(model: Any) -> Any:
    """The stack of layers that writes, bottom first. Raises ModelError for an unknown shape."""
    return layer_stacks(model)[-1]


def _halves(model: Any) -> tuple[Any, Any]:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_encoder(), inner.get_decoder()


def _largest_stack(part: Any, model: Any, count: int | None) -> Any:
    import torch

    lists = [m for m in part.modules() if isinstance(m, torch.nn.ModuleList)]
    stacks = [m for m in lists if count is None or len(m) == count]
    if not stacks:
        raise ModelError(
            f"The layers of {type(model).__name__} were not found.", fix="Use --lora or full fine-tuning."
        )
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))


def describe(model: Any) -> Description:
    """The model in numbers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()  # of a model that sees pictures too
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    if is_seq2seq(base):
        layers = sum(len(stack) for stack in layer_stacks(base))
    return Description(
        architecture=type(base).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=layers,
        context_length=getattr(config, "max_position_embeddings", None),
    )


def first_tokens(model: Any) -> dict[str, int]:
    """With what the decoder of an encoder-decoder model begins: its start token, and a first token that the
    model was made to write (BART's opening, the language of mBART). Nothing for a causal model."""
    if not is_seq2seq(model):
        return {}
    found: dict[str, int] = {}
    for name in ("decoder_start_token_id", "forced_bos_token_id"):
        for place in (model.config, model.generation_config):
            if getattr(place, name, None) is not None:
                found.setdefault(name, int(getattr(place, name)))
    if "decoder_start_token_id" not in found:
        start = getattr(model.config, "bos_token_id", None)
        found["decoder_start_token_id"] = int(model.config.pad_token_id if start is None else start)
    return found


def set_stop_tokens(model: Any, tokenizer: Any) -> None:
    """Make the model's own generation defaults end where its template ends a turn, and nothing else.

    A reward model has none; it is told what pads.
    """
    if is_reward(model):
        set_padding(model, tokenizer)
        return
    from transformers import GenerationConfig

    from tunesmith.data.templates import end_of_turn_ids

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generation_config = GenerationConfig(
        **first_tokens(base),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(end_of_turn_ids(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
    )

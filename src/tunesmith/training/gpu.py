"""What a recipe asks of a GPU and of the packages for one: optimizers in fewer bits, Liger's kernels, FlashAttention,
types of numbers. All of it is looked at when a run is planned, before any work.

What only changes the speed is replaced on a device that has no such thing, and said. What changes the numbers is
refused, and so is a package that is missing.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tunesmith.devices import DeviceFacts
from tunesmith.errors import MissingExtra, OutOfResources, TunesmithError
from tunesmith.recipe import Model, Training

if TYPE_CHECKING:
    from tunesmith.plan import Device

INSTALL = "'tunesmith[gpu]'"


@dataclass(frozen=True)
class Need:
    """What an option of a recipe needs."""

    module: str
    """As it is imported."""
    package: str
    """As it is installed."""
    devices: tuple[str, ...]
    install: str = INSTALL

    def check(self, option: str, where: str, *, here: bool, fix: str) -> None:
        """Raises OutOfResources on another device, and `here` MissingExtra where the package is not installed, or a
        TunesmithError where it cannot be loaded."""
        if where not in self.devices:
            what = " or ".join({"cuda": "a CUDA device", "cpu": "a CPU"}[kind] for kind in self.devices)
            raise OutOfResources(f"{option} needs {what}.", found=f"device '{where}'", fix=fix)
        if here and importlib.util.find_spec(self.module) is None:
            raise MissingExtra(self.package, option, install=self.install)
        if here and (why := broken(self.module)):
            raise TunesmithError(
                f"{option} needs the package '{self.package}', which is installed and cannot be loaded.",
                found=why,
                fix=f"{fix}, or install one that fits this machine's torch: pip install {self.install}",
            )


@functools.cache
def broken(module: str) -> str | None:
    """Why an installed package cannot be loaded, such as one that was built for another torch; None where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # of the package, its libraries, the driver: whatever it is, it does not load
        return next(iter(str(error).splitlines()), "")[:160] or type(error).__name__
    return None


_BITSANDBYTES = Need("bitsandbytes", "bitsandbytes", ("cuda", "cpu"))
_TORCHAO = Need("torchao", "torchao", ("cuda",))
OPTIMIZERS = {
    "adamw_bnb_8bit": _BITSANDBYTES, "paged_adamw_8bit": _BITSANDBYTES, "paged_adamw_32bit": _BITSANDBYTES,
    "adamw_torch_8bit": _TORCHAO, "adamw_torch_4bit": _TORCHAO,
}  # fmt: skip
"""What optimizers need beside torch."""
LIGER = Need("liger_kernel", "liger-kernel", ("cuda",))
FLASH = Need("flash_attn", "flash-attn", ("cuda",), install="flash-attn --no-build-isolation")


def checked(
    training: Training, model: Model, where: Device, *, elsewhere: DeviceFacts | None = None
) -> list[tuple[str, str, str]]:
    """Name, value and reason of what a recipe comes to on a device, this machine's or one that is `elsewhere`.

    Raises OutOfResources, MissingExtra and other TunesmithErrors for what is not to be had there.
    """
    here = elsewhere is None
    found: list[tuple[str, str, str]] = []
    if here and where == "cuda" and (count := _gpus()) > 1:
        why = f"one process writes a run, and takes the first of {count} GPUs; CUDA_VISIBLE_DEVICES names another"
        found.append(("device", "cuda:0", why))
    name = training.optimizer
    if need := OPTIMIZERS.get(name):
        fix = "--set training.optimizer=adamw_torch_fused"
        need.check(f"training.optimizer={name}", where, here=here, fix=fix)
        if name.startswith("paged") and where == "cpu":
            why = "there is no memory of a GPU to page out of: the states are held as they are"
            found.append(("optimizer", name, why))
    if model.attention == "flash_attention_2":
        FLASH.check("model.attention=flash_attention_2", where, here=here, fix="--set model.attention=auto")
    if training.kernels == "liger" and where != "cuda":
        found.append(("kernels", "torch", f"Liger's kernels run on CUDA alone, and this is '{where}'"))
    elif training.kernels == "liger":
        LIGER.check("training.kernels=liger", where, here=here, fix="--set training.kernels=torch")
    if where == "cuda" and training.mixed_precision == "bf16" and not has_bfloat16(elsewhere):
        raise OutOfResources(
            "--mixed-precision bf16 needs a GPU that computes in bfloat16, from Ampere (compute capability 8.0) on.",
            found=elsewhere.name if elsewhere else _capability(),
            fix="--mixed-precision fp16, or no",
        )
    if where == "cuda" and training.mixed_precision == "no":
        # The same GPUs, from Ampere on, have bfloat16 and TF32.
        faster, kept = (
            ("bf16", ": float32 is not rounded to TF32") if has_bfloat16(elsewhere) else ("fp16", "")
        )
        why = f"as the recipe says{kept}; --mixed-precision {faster} is several times as fast"
        found.append(("mixed_precision", "no", why))
    return found


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def has_bfloat16(elsewhere: DeviceFacts | None = None) -> bool:
    """Whether a device computes in bfloat16, this machine's GPU or one that is `elsewhere`."""
    if elsewhere:
        return "bfloat16" in elsewhere.peaks
    import torch

    # torch calls what older GPUs emulate supported as well.
    return bool(torch.version.hip) or torch.cuda.get_device_capability() >= (8, 0)


def _capability() -> str:
    import torch

    own = ".".join(map(str, torch.cuda.get_device_capability()))
    return f"{torch.cuda.get_device_name()}, compute capability {own}"


PARTS = ("rope", "rms_norm", "swiglu", "geglu")
"""Of Liger's kernels those that are taken. Its losses are not: the fast forward has a head of its own, which asks the
vocabulary only where a label is."""
FAMILIES = {
    "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3_text", "llama": "llama", "mistral": "mistral",
    "phi3": "phi3", "qwen2": "qwen2", "qwen3": "qwen3",
}  # fmt: skip
"""Kinds of models that they are put into, and what Liger calls them."""


def put_in_liger(model: Any) -> tuple[str, str]:
    """Put Liger's kernels into a model that has no adapter yet: value and reason of what was done.

    Liger changes transformers' modules as well, for all models of the kind that are made later, on whatever device.
    That is taken back, but for the rotary positions, which go to Liger only on CUDA.
    """
    kind = model.config.get_text_config().model_type
    if kind not in FAMILIES:
        return "torch", f"Liger's kernels are not used for models of the kind {kind}"
    import liger_kernel.transformers as liger  # type: ignore[import-not-found,import-untyped,unused-ignore]

    apply = getattr(liger, f"apply_liger_kernel_to_{FAMILIES[kind]}")
    known = [name for name in inspect.signature(apply).parameters if name != "model"]
    module = inspect.getmodule(type(model))
    assert module
    before = dict(vars(module))
    try:
        apply(model=model, **{name: name in PARTS for name in known})
    except (AttributeError, TypeError) as error:  # a class of the kind that it does not know
        return "torch", f"Liger has no kernels for {type(model).__name__} ({error})"
    finally:
        rotary = vars(module).get("apply_rotary_pos_emb")
        for name, value in before.items():
            setattr(module, name, value)
    _rotate(module, rotary)
    return "liger", f"{', '.join(name for name in known if name in PARTS)}; the head stays ours"


def _rotate(module: ModuleType, theirs: Callable[..., Any] | None) -> None:
    """Have a module of transformers take Liger's rotary positions on CUDA, and its own elsewhere."""
    plain: Any = getattr(module, "apply_rotary_pos_emb", None)
    if plain is None or theirs is None or theirs is plain or hasattr(plain, "plain"):
        return

    @functools.wraps(plain)
    def rotated(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        return (theirs if q.is_cuda else plain)(q, k, *args, **kwargs)

    rotated.plain = plain  # type: ignore[attr-defined]
    module.apply_rotary_pos_emb = rotated  # type: ignore[attr-defined]


def trained_in_float32(model: Any) -> int:
    """Keep trained weights in float32 under fp16, whose scaled gradients half a number cannot hold; how many were not.

    A scoring head and modules that are saved with an adapter come in the type of a frozen base.
    """
    import torch

    found = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.float16]
    for parameter in found:
        parameter.data = parameter.data.float()
    return sum(p.numel() for p in found)

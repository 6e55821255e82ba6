"""What a recipe asks of a GPU: said or refused in one sentence before any work; Liger's kernels by a stand-in."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from tunesmith import devices
from tunesmith.errors import MissingExtra, OutOfResources, TunesmithError
from tunesmith.estimate.step import STATES, state_bytes
from tunesmith.recipe import Model, Training
from tunesmith.training import gpu


def checked(where="cuda", *, elsewhere=None, model=None, **training):
    training.setdefault("mixed_precision", "fp16")
    return gpu.checked(Training(**training), model or Model(), where, elsewhere=elsewhere)


@pytest.fixture
def nothing_installed(monkeypatch):
    find = importlib.util.find_spec
    absent = {"bitsandbytes", "torchao", "liger_kernel", "flash_attn"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))


@pytest.mark.parametrize(
    ("options", "package", "install"),
    [
        ({"optimizer": "adamw_bnb_8bit"}, "bitsandbytes", "'tunesmith[gpu]'"),
        ({"optimizer": "paged_adamw_32bit"}, "bitsandbytes", "'tunesmith[gpu]'"),
        ({"optimizer": "adamw_torch_4bit"}, "torchao", "'tunesmith[gpu]'"),
        ({"kernels": "liger"}, "liger-kernel", "'tunesmith[gpu]'"),
        ({"model": Model(attention="flash_attention_2")}, "flash-attn", "flash-attn --no-build-isolation"),
    ],
)
def test_a_package_that_is_not_installed_costs_one_sentence(options, package, install, nothing_installed):
    with pytest.raises(MissingExtra) as error:
        checked(**options)
    [problem, fix] = error.value.lines()
    assert problem.endswith(f" needs the package '{package}', which is not installed.")
    assert fix.endswith(f"pip install {install}")
    # A plan for a machine that is elsewhere does not ask what is installed here.
    assert checked(**options, elsewhere=devices.named("h100-80gb")) == []


@pytest.mark.parametrize(
    ("options", "module"),
    [({"optimizer": "adamw_torch_4bit"}, "torchao"), ({"kernels": "liger"}, "liger_kernel")],
)
def test_a_package_that_cannot_be_loaded_costs_one_sentence(options, module, tmp_path, monkeypatch):
    (tmp_path / f"{module}.py").write_text("raise RuntimeError('0 active drivers ([])\\nmore of it')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, module, raising=False)
    gpu.broken.cache_clear()
    try:
        with pytest.raises(TunesmithError) as error:
            checked(**options)
    finally:
        gpu.broken.cache_clear()
    assert error.value.problem.endswith("which is installed and cannot be loaded.")
    assert error.value.found == "0 active drivers ([])"
    assert "--set training." in error.value.fix


@pytest.mark.parametrize(
    ("where", "options", "said"),
    [
        (
            "cpu",
            {"optimizer": "adamw_torch_8bit"},
            "training.optimizer=adamw_torch_8bit needs a CUDA device.",
        ),
        ("mps", {"optimizer": "adamw_bnb_8bit"}, "needs a CUDA device or a CPU."),
        ("cpu", {"model": Model(attention="flash_attention_2")}, "flash_attention_2 needs a CUDA device."),
    ],
)
def test_what_changes_the_numbers_is_refused_where_it_cannot_be_had(where, options, said):
    with pytest.raises(OutOfResources) as error:
        checked(where, **options)
    assert said in error.value.problem
    assert error.value.found == f"device '{where}'"
    assert error.value.fix.startswith("--set ")


def test_what_changes_only_the_speed_is_replaced_and_said():
    [(name, value, why)] = checked("cpu", kernels="liger")
    assert (name, value) == ("kernels", "torch")
    assert "CUDA alone" in why
    [(name, value, why)] = checked("cpu", optimizer="paged_adamw_8bit")
    assert (name, value) == ("optimizer", "paged_adamw_8bit")
    assert "held as they are" in why


def test_a_gpu_without_bfloat16_is_told_before_any_work(monkeypatch):
    assert checked(mixed_precision="bf16", elsewhere=devices.named("h200")) == []
    with pytest.raises(OutOfResources, match="fp16, or no") as error:
        checked(mixed_precision="bf16", elsewhere=devices.named("t4"))
    assert error.value.found == "t4"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    with pytest.raises(OutOfResources) as error:
        checked(mixed_precision="bf16")
    assert error.value.found == "Tesla T4, compute capability 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (8, 6))
    assert checked(mixed_precision="bf16") == []


def test_float32_on_a_gpu_is_said_with_what_becomes_of_tf32():
    [(name, value, why)] = checked(mixed_precision="no", elsewhere=devices.named("h200"))
    assert (name, value) == ("mixed_precision", "no")
    assert "TF32" in why
    [(_, _, why)] = checked(mixed_precision="no", elsewhere=devices.named("t4"))
    assert "TF32" not in why, "a T4 has none"
    assert "fp16" in why
    assert torch.get_float32_matmul_precision() == "highest"


def test_of_several_gpus_one_is_taken_and_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    [(name, value, why)] = checked()
    assert (name, value) == ("device", "cuda:0")
    assert "the first of 4 GPUs" in why
    assert checked(elsewhere=devices.named("h100-80gb")) == []


def test_a_peak_is_counted_from_where_the_training_begins(monkeypatch):
    from tunesmith.training import fit

    peak = [125 * 10**9]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 3 * 10**9))
    fit.forget_peak()  # no tensor is on the GPU yet, and torch would raise
    assert fit.peak_memory() == 125 * 10**9
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    fit.forget_peak()
    assert fit.peak_memory() == 3 * 10**9


def test_a_trainer_spreads_no_batch_over_gpus(tiny_model_folder, tmp_path):
    """DataParallel would multiply the batch, and run copies of the model that have not our forward."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from tunesmith.training.checkpoints import keeping_run_folder
    from tunesmith.training.run import Run

    def trainer(kind):
        args = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2, report_to=[]
        )
        args._n_gpu = 4
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        return kind(model=model, args=args)

    plain, ours = trainer(Trainer), trainer(keeping_run_folder(Trainer, Run(tmp_path), keep=1))
    assert plain.args.train_batch_size == 8
    assert ours.args.train_batch_size == 2
    assert type(ours._wrap_model(ours.model)).__name__ == "LlamaForCausalLM"


def test_a_loss_scale_is_restored_where_there_is_one():
    from tunesmith.training import state

    class Scaler:
        def __init__(self):
            self.loaded = None

        def load_state_dict(self, given):
            self.loaded = given

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    saved = {
        "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
        "scaler": {"scale": 1024.0, "growth_factor": 2.0, "_growth_tracker": 7},
    }  # fmt: skip
    on_gpu, on_cpu = types.SimpleNamespace(scaler=Scaler()), types.SimpleNamespace(scaler=None)
    for accelerator in (on_gpu, on_cpu):  # a checkpoint of a GPU is continued on a CPU as well
        state.restore_optimizer(
            types.SimpleNamespace(
                accelerator=accelerator, optimizer=optimizer, lr_scheduler=scheduler, sharding=None
            ),
            saved,
        )
    assert on_gpu.scaler.loaded == saved["scaler"]


def test_random_numbers_of_gpus_come_back(monkeypatch):
    from tunesmith.training import state

    kept, given = [torch.arange(4, dtype=torch.uint8), torch.ones(4, dtype=torch.uint8)], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: kept)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", given.extend)
    found = state.randomness()
    tensors: dict[str, torch.Tensor] = {}
    tree = state.packed(found, tensors, "random")
    state.set_randomness(state.unpacked(tree, tensors))
    assert all(torch.equal(one, other) for one, other in zip(kept, given, strict=True))
    given.clear()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # fewer GPUs: theirs are left
    state.set_randomness(found)
    assert given == []


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    ],
    ids=["allocator", "driver", "cuBLAS", "Metal"],
)
def test_memory_that_ran_out_is_known_by_what_is_said(error):
    from tunesmith.errors import is_out_of_memory

    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


# Liger


def made(family="Llama", **changes):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, **changes,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture
def liger(monkeypatch):
    """The function for Llama of liger-kernel 0.8.5 by its signature and by what it changes, without its kernels."""
    calls = []

    def apply_liger_kernel_to_llama(
        rope=True,
        cross_entropy=False,
        fused_linear_cross_entropy=True,
        rms_norm=True,
        swiglu=True,
        model=None,
    ):
        from transformers.models.llama import modeling_llama

        calls.append((rope, cross_entropy, fused_linear_cross_entropy, rms_norm, swiglu))
        modeling_llama.apply_rotary_pos_emb = rotary
        modeling_llama.LlamaRMSNorm = modeling_llama.LlamaMLP = object
        for layer in model.model.layers:
            layer.mlp.__dict__["forward"] = gated.__get__(layer.mlp, type(layer.mlp))

    def rotary(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
        return "liger", q

    def gated(self, x):
        self.asked = True
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    package = types.ModuleType("liger_kernel")
    package.transformers = types.ModuleType("liger_kernel.transformers")
    package.transformers.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)
    return calls


def test_liger_goes_into_one_model_and_leaves_the_next_alone(liger, monkeypatch):
    from transformers.models.llama import modeling_llama

    names = ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb")
    before = {name: getattr(modeling_llama, name) for name in names}
    for name, value in before.items():
        monkeypatch.setattr(modeling_llama, name, value)  # put back afterwards
    model, plain = made(), made()
    ids = torch.arange(12)[None]
    wanted = model(ids).logits
    assert gpu.put_in_liger(model) == ("liger", "rope, rms_norm, swiglu; the head stays ours")
    # Neither loss of its own, and all that is left of it in the module asks where the numbers are.
    assert liger == [(True, False, False, True, True)]
    assert modeling_llama.LlamaMLP is before["LlamaMLP"]
    assert modeling_llama.LlamaRMSNorm is before["LlamaRMSNorm"]
    rotated = modeling_llama.apply_rotary_pos_emb
    on_cuda = types.SimpleNamespace(is_cuda=True)
    assert rotated(on_cuda, on_cuda, None, None) == ("liger", on_cuda)
    torch.testing.assert_close(model(ids).logits, wanted)
    assert all(layer.mlp.asked for layer in model.model.layers)
    plain(ids)
    assert not any(hasattr(layer.mlp, "asked") for layer in plain.model.layers)
    # A second time it is not wrapped again, and an adapter finds its layers.
    gpu.put_in_liger(plain)
    assert modeling_llama.apply_rotary_pos_emb is rotated


def test_liger_under_an_adapter_and_in_a_copy(liger, monkeypatch):
    from transformers.models.llama import modeling_llama

    from tunesmith import models
    from tunesmith.recipe import LoRA

    for name in ("LlamaRMSNorm", "LlamaMLP", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = made()
    gpu.put_in_liger(model)
    adapted = models.attach(model, LoRA(targets="all-linear", dropout=0.0))
    adapted(torch.arange(12)[None]).logits.sum().backward()
    learnt = {name.split(".")[-4] for name, p in adapted.named_parameters() if p.grad is not None}
    assert {"gate_proj", "up_proj", "down_proj", "q_proj"} <= learnt
    copy = models.copied(adapted)
    with torch.no_grad():
        for name, p in copy.named_parameters():
            if "gate_proj.lora_B" in name:
                p.fill_(1.0)
    one, other = (m(torch.arange(12)[None]).logits for m in (adapted, copy))
    assert not torch.equal(one, other)  # the copy's layers are its own


def test_a_model_that_liger_has_no_kernels_for_is_left_as_it_is():
    value, why = gpu.put_in_liger(made("GPT2", n_positions=32))
    assert value == "torch"
    assert "gpt2" in why


def test_a_class_that_liger_does_not_know_is_left_as_it_is(monkeypatch):
    def refusing(rope=True, model=None):
        raise TypeError("The model must be Gemma3ForCausalLM.")

    package = types.ModuleType("liger_kernel.transformers")
    package.apply_liger_kernel_to_llama = refusing
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    value, why = gpu.put_in_liger(made())
    assert value == "torch"
    assert "LlamaForCausalLM (The model must be" in why


def test_trained_weights_are_whole_under_fp16():
    model = made().half()
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert gpu.trained_in_float32(model) == model.lm_head.weight.numel()
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float16
    assert gpu.trained_in_float32(model) == 0


# States


def held(optimizer, model) -> int:
    """Bytes of what an optimizer keeps after a step, without its step counters and code tables."""
    model(torch.arange(12)[None]).logits.float().sum().backward()
    optimizer.step()
    total = 0
    for states in optimizer.state.values():
        for name, value in states.items():
            if isinstance(value, torch.Tensor) and not name.startswith("qmap") and value.dim():
                parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
                total += sum(getattr(value, p).nbytes for p in parts if p != "qmap") or value.nbytes
    return total


WIDE = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 144}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_states_are_those_that_bitsandbytes_keeps(dtype, tied):
    from bitsandbytes.optim import AdamW, GlobalOptimManager

    model = made(**WIDE, tie_word_embeddings=tied).to(dtype)
    manager = GlobalOptimManager.get_instance()
    manager.register_module_override(model.model.embed_tokens, "weight", {"optim_bits": 32})  # as the Trainer
    expected = state_bytes("adamw_bnb_8bit", model)
    assert held(AdamW(model.parameters(), lr=1e-3, optim_bits=8), model) == expected
    whole = sum(8 * p.numel() for p in model.parameters())
    assert 2.03 / 8 * whole < expected < whole
    assert state_bytes("paged_adamw_32bit", model) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_states_are_those_that_torch_keeps(dtype):
    model = made(**WIDE).to(dtype)
    assert held(torch.optim.AdamW(model.parameters()), model) == state_bytes("adamw_torch", model)
    assert state_bytes("sgd", model) == 0


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes_of_states_are_those_that_torchao_keeps(bits):
    optim = pytest.importorskip("torchao.optim")
    model = made(**WIDE)
    optimizer = getattr(optim, f"AdamW{bits}bit")(model.parameters(), lr=1e-3)
    with torch.compiler.set_stance("force_eager"):  # it would compile its step for half a minute
        assert held(optimizer, model) == state_bytes(f"adamw_torch_{bits}bit", model)


def test_every_optimizer_of_the_recipe_has_its_bytes_and_is_one_of_transformers():
    from typing import get_args

    from transformers.training_args import OptimizerNames

    names = set(get_args(Training.model_fields["optimizer"].annotation))
    assert names == STATES.keys()
    assert names <= {name.value for name in OptimizerNames}
    assert names >= gpu.OPTIMIZERS.keys()

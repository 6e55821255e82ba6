"""How several processes hold a model: what is refused, what each holds, and DeepSpeed's configuration."""

from __future__ import annotations

import errno
import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunesmith import api, parallel
from tunesmith.compose import compose
from tunesmith.errors import OutOfResources, RecipeError, RunError, is_out_of_disk
from tunesmith.recipe import DDP, FSDP, DeepSpeed, Training
from tunesmith.training import checkpoints

ALONE = parallel.Model(weights=8_000, trained=8_000, states=16_000, layer=1_000, rest=2_000)
STEP = {"weights": 8_000, "gradients": 8_000, "optimizer": 16_000, "activations": 500, "head": 70}


def held(section, processes=4, **more):
    return parallel.held(section, ALONE, STEP, processes=processes, capacity=40_000, **more)


def test_one_process_holds_what_it_holds_alone():
    assert held(FSDP(), processes=1) == STEP


def test_each_of_several_holds_its_share_and_what_it_gathers():
    assert held(DDP()) == {**STEP, "buckets": 8_000}
    shares = {"weights": 2_000, "gradients": 2_000, "optimizer": 4_000, "activations": 500, "head": 70}
    assert held(FSDP()) == {**shares, "gathered": 4_000, "buckets": 3_000}
    assert held(FSDP(), lower=True) == {**shares, "gathered": 2_000, "buckets": 1_500}
    assert held(FSDP(reshard_after_forward=False))["gathered"] == 8_000
    assert "weights" not in held(FSDP(cpu_offload=True))
    assert held(FSDP(cpu_offload=True), device="cpu") == held(FSDP()), "in the machine's memory anyway"
    assert held(DeepSpeed(stage=1)) == {**STEP, "optimizer": 4_000}
    assert held(DeepSpeed(stage=2))["gradients"] == 2_000
    assert held(DeepSpeed(stage=3))["weights"] == 2_000
    more = [sum(held(FSDP(), processes=n).values()) for n in (2, 4, 8)]
    assert more == sorted(more, reverse=True)


def test_packed_weights_stay_whole_and_are_not_gathered():
    packed = replace(ALONE, packed=6_000, layer=300, rest=500)
    for section, weights in ((FSDP(), 6_500), (FSDP(cpu_offload=True), 6_000)):
        found = parallel.held(section, packed, STEP, processes=4, capacity=40_000)
        assert (found["weights"], found["gathered"]) == (weights, 1_100)
    whole = FSDP(reshard_after_forward=False)
    assert parallel.held(whole, packed, STEP, processes=4, capacity=40_000)["gathered"] == 2_000


@pytest.mark.parametrize(("capacity", "stage"), [(100_000, 1), (30_000, 2), (20_000, 3)])
def test_the_stage_is_the_lowest_with_room_for_activations(capacity, stage):
    assert parallel.stage(DeepSpeed(), ALONE, 4, capacity) == stage
    assert parallel.stage(DeepSpeed(stage=2), ALONE, 4, capacity) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"best_by": "exact_match"}}, "no process has the whole model"),
        ({"training": {"optimizer": "adafactor"}}, "training.optimizer adafactor"),
        ({"training": {"cache_frozen": True}, "adapter": {"kind": "freeze"}}, "cache_frozen"),
        ({"training": {"compile": True}}, "training.compile"),
        ({"training": {"mixed_precision": "fp16"}}, "loss scaler"),
        ({"adapter": {"kind": "lora", "init": "pissa"}}, "adapter.init pissa"),
        ({"method": {"kind": "dpo", "reference": "precomputed"}}, "method.reference precomputed"),
    ],
)
def test_what_does_not_go_with_shares_is_refused_with_the_reason(changes, said):
    recipe = compose({**changes, "parallel": {"kind": "fsdp"}, "data": {"dataset": "example:chat"}}).recipe
    with pytest.raises(RecipeError, match=said):
        parallel.check(recipe, 2)
    parallel.check(recipe, 1)
    parallel.check(recipe.model_copy(update={"parallel": DDP()}), 2)


def test_zero_is_refused_where_deepspeed_has_no_device():
    with pytest.raises(OutOfResources, match="DeepSpeed trains on CUDA devices and CPUs"):
        parallel.check_device(DeepSpeed(), 2, "mps", is_here=True)
    parallel.check_device(DeepSpeed(), 1, "mps", is_here=True)
    parallel.check_device(DeepSpeed(), 2, "cpu", is_here=False)


def test_a_checkpoint_of_zero_is_not_continued_without_its_optimizer(few_steps):
    """One process has no part in DeepSpeed, whose optimizer no other reads: it would begin anew unheard."""
    run = api.train(few_steps("zero", num_epochs=1)).run
    folder = run / "checkpoints/checkpoint-step-2"
    (folder / "latest").write_text("global_step2")
    content = checkpoints.manifest(folder)
    content.pop("manifest_sha256")
    digest = hashlib.sha256(b"global_step2").hexdigest()
    content["files"]["latest"] = {"bytes": 12, "sha256": digest}
    (folder / checkpoints.MANIFEST).write_text(checkpoints._sealed(content))
    for name in ("training.json", "status.json"):
        (run / name).unlink()
    with pytest.raises(RunError, match="A checkpoint of DeepSpeed is continued as it was written"):
        api.resume(run, checkpoint="checkpoint-step-2")


def test_the_configuration_of_zero_has_the_batch_of_the_recipe():
    training = Training(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_grad_norm=0.5)
    plan = SimpleNamespace(mixed_precision="bf16", batch_size=32)
    section = DeepSpeed(offload_optimizer=True, offload_parameters=True)
    found = parallel.configuration(section, 3, plan, training)
    assert found["train_batch_size"] == 4 * (
        found["train_micro_batch_size_per_gpu"] * found["gradient_accumulation_steps"]
    )
    assert found["zero_optimization"]["offload_param"]["device"] == "cpu"
    assert (found["bf16"]["enabled"], found["gradient_clipping"]) == (True, 0.5)
    with pytest.raises(RecipeError, match="stage 3"):
        parallel.configuration(section, 2, plan, training)


def test_a_model_that_was_not_gathered_whole_is_not_put_in_place(tmp_path):
    from tunesmith.training import sharding

    whole = {"a": torch.ones(3, 2), "b": torch.ones(4)}
    save_file(whole, tmp_path / "model.safetensors")
    sharding.check_whole(tmp_path, whole)
    for wrong in (
        {"a": torch.ones(3, 2)},
        {"a": torch.ones(3, 2), "b": torch.ones(0)},
        {**whole, "b": torch.ones(5)},
    ):
        save_file(wrong, tmp_path / "model.safetensors")
        with pytest.raises(RunError, match="not whole"):
            sharding.check_whole(tmp_path, whole)


@pytest.mark.parametrize(
    ("met", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError, "No space left"),
        (ValueError("odd"), RunError, "Writing the shares"),
    ],
)
def test_what_goes_wrong_in_a_save_in_shares_is_an_error_that_handlers_see(
    tmp_path, monkeypatch, met, raised, said
):
    """torch wraps it in a BaseException."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from tunesmith.training import sharding

    def fails(*given):
        raise met

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", fails)
    trainer = SimpleNamespace(model=torch.nn.Linear(3, 2))
    with pytest.raises(raised, match=said) as error:
        sharding.write(trainer, tmp_path, {})
    assert is_out_of_disk(error.value) == (raised is OSError)


def test_shares_that_are_not_where_the_run_is_are_no_checkpoint(tmp_path, monkeypatch):
    """As where the nodes write to disks of their own."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    from tunesmith.training import sharding

    trainer, write = SimpleNamespace(model=torch.nn.Linear(3, 2)), HuggingFaceStorageWriter.write_data
    sharding.write(trainer, tmp_path, {"a": torch.ones(2)})
    [file] = (tmp_path / sharding.FOLDER).iterdir()

    def elsewhere(*given):
        found = write(*given)
        found.wait()
        file.unlink()
        return found

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", elsewhere)
    with pytest.raises(RunError, match="not those that the processes wrote") as error:
        sharding.write(trainer, tmp_path, {"a": torch.ones(2)})
    assert file.name in str(error.value)


def test_tied_weights_that_zero_gives_twice_are_saved_once(tiny_model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    from tunesmith.training import fit

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    copies = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = SimpleNamespace(
        model=model,
        model_wrapped=model,
        sharding=None,
        is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(get_state_dict=lambda _: dict(copies), unwrap_model=lambda model: model),
        args=SimpleNamespace(should_save=True),
        processing_class=SimpleNamespace(save_pretrained=lambda folder: None),
    )
    fit.save_model(trainer, tmp_path / "final_model", None, {"step": 1})
    model.save_pretrained(tmp_path / "plain")
    saved, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("final_model", "plain"))
    assert saved.keys() == plain.keys() < copies.keys()


def test_of_a_model_with_an_adapter_zero_saves_the_adapter(tmp_path):
    """DeepSpeed gives base and adapter; what is saved is what is trained, and is then found whole."""
    from peft import LoraConfig, get_peft_model

    from tunesmith.training import fit

    def zero(_):
        return model.state_dict()

    base = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    trainer = SimpleNamespace(
        model=model,
        model_wrapped=model,
        sharding=None,
        is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(get_state_dict=zero, unwrap_model=lambda model: model),
        args=SimpleNamespace(should_save=True),
        processing_class=SimpleNamespace(save_pretrained=lambda folder: None),
    )
    fit.save_model(trainer, tmp_path / "final_model", None, {"step": 1})
    assert set(load_file(tmp_path / "final_model" / "adapter_model.safetensors")) == {
        "base_model.model.0.lora_A.weight",
        "base_model.model.0.lora_B.weight",
    }

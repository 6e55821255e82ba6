import runpy
import sys
from pathlib import Path

import pytest
import torch
from counting import PROMPTS, STOP, TOKENIZER, NumberTokenizer, counting_llama
from transformers import GenerationConfig

from tunesmith import generation
from tunesmith.errors import OutOfResources
from tunesmith.generation import generate, halving, length_batches, stream


class ByteTokenizer(NumberTokenizer):
    """Token n is a byte of a snowman, so that three tokens make one character."""

    def decode(self, ids, **options):
        return bytes("☃".encode()[n % 3] for n in range(len(ids))).decode("utf-8", "replace")


@pytest.fixture(scope="module")
def llama():
    return counting_llama()


def answers(model, prompts=PROMPTS, **options):
    settings = {"max_new_tokens": 20, "stop_ids": [STOP]} | options
    return generate(model, TOKENIZER, prompts, **settings)


def alone(model, prompts=PROMPTS, **options):
    return [answers(model, [prompt], **options)[0] for prompt in prompts]


def test_batched_is_single_and_padding_is_end_of_text(llama):
    together = answers(llama)
    assert together == alone(llama)
    assert len({answer.ids for answer in together}) > 4, "the answers differ, so that equality says something"
    assert {answer.finish_reason for answer in together} == {"stop", "length"}
    assert all(STOP not in answer.ids for answer in together)
    assert together[0].text == TOKENIZER.decode(together[0].ids)


@pytest.mark.parametrize("wrong", ["no mask", "right padding"])
def test_negative_control_wrong_padding_is_caught(llama, wrong):
    width = max(map(len, PROMPTS))
    pads = [[STOP] * (width - len(p)) for p in PROMPTS]
    rows = [p + pad if wrong == "right padding" else pad + p for p, pad in zip(PROMPTS, pads)]
    masks = [
        [1] * len(p) + [0] * len(pad) if wrong == "right padding" else [1] * width
        for p, pad in zip(PROMPTS, pads)
    ]
    config = GenerationConfig(max_new_tokens=20, eos_token_id=STOP, pad_token_id=STOP, do_sample=False)
    output = llama.generate(
        input_ids=torch.tensor(rows), attention_mask=torch.tensor(masks), generation_config=config
    )[:, width:].tolist()
    found = [tuple(row[: row.index(STOP)] if STOP in row else row) for row in output]
    assert found != [answer.ids for answer in answers(llama)]


def test_order_company_and_batch_size_do_not_change_an_answer(llama):
    expected = answers(llama)
    order = [3, 1, 4, 0, 5, 8, 2, 6, 7]
    assert answers(llama, [PROMPTS[n] for n in order]) == [expected[n] for n in order]
    assert answers(llama, [*PROMPTS, [1] * 50])[:-1] == expected
    assert answers(llama, batch_tokens=1) == expected
    assert answers(llama, batch_tokens=100) == expected


@pytest.mark.parametrize("apart", [True, False], ids=["without their keys", "read anew"])
def test_ended_rows_leave_the_batch_and_the_others_go_on_as_alone(llama, monkeypatch, apart):
    if not apart:
        monkeypatch.setattr(generation, "_keeps_rows_apart", lambda model: False)
    fed: list[tuple[int, int]] = []
    layer = llama.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(
            tuple((args[0] if args else kwargs["hidden_states"]).shape[:2])
        ),
        with_kwargs=True,
    )
    prompts = [[start, start + 1] for start in (56, 55, 52, 50, 46, 42, 38, 30, 24, 20)]
    together = answers(llama, prompts, max_new_tokens=40)
    layer.remove()
    assert together == alone(llama, prompts, max_new_tokens=40)
    assert len({len(answer.ids) for answer in together}) > 4
    sizes = [rows for rows, _ in fed]
    assert len(set(sizes)) > (2 if apart else 1), "rows have left"
    assert sizes == sorted(sizes, reverse=True)
    reads = sum(tokens > 1 for _, tokens in fed)
    assert reads == 1 if apart else reads > 1


def test_ended_rows_leave_a_batch_with_sliding_windows():
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=12,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    prompts = [[(7 * n + k) % 60 + 1 for k in range(3 + 2 * n)] for n in range(12)]
    stops = list(range(40, 44))
    together = answers(model, prompts, max_new_tokens=60, stop_ids=stops)
    assert together == alone(model, prompts, max_new_tokens=60, stop_ids=stops)
    assert len({len(answer.ids) for answer in together}) > 4


def test_the_context_length_is_respected(llama):
    room_for_three = [n % 50 + 1 for n in range(77)]
    found = answers(llama, [[1] * 80, room_for_three, [1] * 90, [1, 2]], stop_ids=[])
    assert [len(answer.ids) for answer in found] == [0, 3, 0, 20]
    assert {answer.finish_reason for answer in found} == {"length"}
    assert answers(llama, []) == []


def test_nothing_is_inherited_or_left_behind(llama):
    expected = answers(llama)
    own = GenerationConfig(repetition_penalty=5.0, max_new_tokens=2, do_sample=True, min_length=60)
    before, llama.generation_config = llama.generation_config, own
    llama.train()
    llama.model.layers[0].eval()
    llama.config.use_cache = False
    state = torch.get_rng_state()
    try:
        assert answers(llama) == expected
        assert llama.generation_config is own
        assert llama.training
        assert not llama.model.layers[0].training, "a frozen part keeps its own mode"
        assert llama.config.use_cache is False
        answers(llama, temperature=1.0)
        list(stream(llama, TOKENIZER, [3], max_new_tokens=3, stop_ids=[STOP], temperature=1.0))
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.is_inference_mode_enabled()
    finally:
        llama.generation_config = before
        llama.config.use_cache = True
        llama.eval()


def test_sampling_follows_its_seed(llama):
    options = {"temperature": 2.0, "stop_ids": []}
    assert answers(llama, seed=1, **options) == answers(llama, seed=1, **options)
    assert answers(llama, seed=1, **options) != answers(llama, seed=2, **options)


def test_progress_tells_finished_prompts(llama):
    told = []
    answers(llama, batch_tokens=60, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == len(PROMPTS)


def test_stream_is_generate_in_pieces(llama):
    for prompt, expected in zip(PROMPTS, answers(llama)):
        pieces = list(stream(llama, TOKENIZER, prompt, max_new_tokens=20, stop_ids=[STOP]))
        assert "".join(pieces) == expected.text
        assert len(pieces) == len(expected.ids)


def test_stream_holds_back_torn_characters_and_leaves_no_mode(llama):
    pieces = []
    for piece in stream(llama, ByteTokenizer(), [1, 2], max_new_tokens=8, stop_ids=[]):
        assert not torch.is_inference_mode_enabled()
        pieces.append(piece)
    assert pieces == ["☃", "☃", "\ufffd"]


def test_stream_samples_by_seed_and_nucleus(llama):
    def text(**options):
        pieces = stream(llama, TOKENIZER, [1, 2], max_new_tokens=12, stop_ids=[], temperature=3.0, **options)
        return "".join(pieces)

    assert text(seed=1) == text(seed=1)
    assert text(seed=1) != text(seed=2)
    assert text(top_p=1e-6) == "".join(stream(llama, TOKENIZER, [1, 2], max_new_tokens=12, stop_ids=[]))


def test_batches_are_sorted_and_within_the_budget():
    batches = length_batches({0: 3, 1: 10, 2: 4, 3: 10}, tokens=20)
    assert batches == [[1, 3], [2, 0]]
    assert length_batches({0: 30, 1: 30}, tokens=20) == [[0], [1]]


def test_a_batch_that_does_not_fit_is_halved():
    tried = []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("too much")
        return [n * 10 for n in batch]

    found = {k: v for part, results in halving(work, [1, 2, 3, 4, 5]) for k, v in zip(part, results)}
    assert found == {n: n * 10 for n in range(1, 6)}
    assert tried == [5, 2, 3, 1, 2]

    def never(batch):
        raise torch.OutOfMemoryError("too much")

    with pytest.raises(OutOfResources, match="single example"):
        list(halving(never, [1, 2]))


BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "generation.py"


def test_the_benchmark_of_no_rows_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generation.py", "--rows", "0"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(BENCHMARK), run_name="__main__")
    assert stopped.value.code == 2
    assert "--rows 0: at least one row has to be answered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "beyond", "misses"), [(4.99, 0, True), (5.0, 0, False), (4.99, -48, True), (2.9, 1, False)]
)
def test_the_bar_of_the_benchmark_holds_up_to_its_number_of_new_tokens(ratio, beyond, misses):
    benchmark = runpy.run_path(str(BENCHMARK))
    assert benchmark["BAR_TOKENS"] >= 64
    assert benchmark["below"](ratio, 5.0, benchmark["BAR_TOKENS"] + beyond) is misses

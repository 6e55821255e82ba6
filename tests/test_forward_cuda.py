"""Kernels of CUDA without CUDA: what they are given, by stand-ins that do what their documentation says; and the mask
of the tree, against a walk through it and through FlexAttention's forward, which runs on CPUs."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from tunesmith import forward
from tunesmith.forward import cuda, tree
from tunesmith.forward.attention import rows_attention
from tunesmith.forward.cuda import Asked
from tunesmith.training import gpu

HEADS, SHARED, WIDTH = 4, 2, 16


def layout(lengths=((60, (7, 53, 1)), (40, (3, 3, 10))), seed=0) -> tree.Layout:
    """Answers to two prompts, each with labels in gaps."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, answers in lengths:
        shared = torch.randint(3, 90, (prompt,), generator=draw)
        rows += [torch.cat([shared, torch.randint(3, 90, (n,), generator=draw)]) for n in answers]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.zeros_like(ids)
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for number, row in enumerate(rows):
        mask[number, : len(row)] = 1
        wanted[number, : len(row)] = torch.rand(len(row), generator=draw) < 0.3
        wanted[number, len(row) - 1] = True
    found = tree.rows_of(ids, mask, None, wanted)
    assert found
    made = tree.layout(found, share=True, device="cpu")
    assert any(piece.way for piece in made.pieces)
    return made


def states(rows: tree.Layout, trimmed: bool, dtype=torch.float64) -> list[torch.Tensor]:
    """Queries, keys and values; queries of the kept tokens alone where they are trimmed."""
    torch.manual_seed(1)
    asks = len(rows.kept) if trimmed else rows.ids.shape[1]
    shapes = ((HEADS, asks), (SHARED, rows.ids.shape[1]), (SHARED, rows.ids.shape[1]))
    return [torch.randn(1, *shape, WIDTH, dtype=dtype, requires_grad=True) for shape in shapes]


def reference(q, k, v, queries, keys, scale, window, softcap=0.0):
    """Rows of various lengths as FlashAttention documents it: aligned at the bottom right, windows inclusive."""
    assert queries.dtype == keys.dtype == torch.int32
    assert queries[-1] == len(q)
    assert keys[-1] == len(k) == len(v)
    left, right = window
    found = []
    for row in range(len(queries) - 1):
        own = q[queries[row] : queries[row + 1]].transpose(0, 1)
        part = slice(int(keys[row]), int(keys[row + 1]))
        seen, taken = (x[part].transpose(0, 1).repeat_interleave(HEADS // SHARED, 0) for x in (k, v))
        scores = own @ seen.transpose(1, 2) * (WIDTH**-0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(own.shape[1])[:, None] + seen.shape[1] - own.shape[1]
        key = torch.arange(seen.shape[1])[None]
        seeing = key <= at + right if right >= 0 else torch.ones_like(key <= at)
        if left >= 0:
            seeing &= key >= at - left
        found.append((scores.masked_fill(~seeing, -1e30).softmax(-1) @ taken).transpose(0, 1))
    return torch.cat(found)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """FlashAttention 2.8's own signature."""
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    assert causal
    assert not dropout_p
    # As in its C++: where rows have one query, causal is taken back, and the window says what is seen.
    causal = max_seqlen_q > 1
    left, right = window_size
    assert right == 0 or not (max_seqlen_q == 1 and HEADS > SHARED), "another kernel, that of writing answers"
    return reference(
        q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, (left, 0 if causal else right), softcap
    )


@functools.wraps(varlen_attn)
def torch_varlen(*args, **named):
    """Torch's own, by its real signature."""
    given = inspect.signature(varlen_attn).bind(*args, **named)
    given.apply_defaults()
    a = given.arguments
    assert a["enable_gqa"]
    assert a["window_size"][1] == 0
    return reference(
        a["query"], a["key"], a["value"], a["cu_seq_q"], a["cu_seq_k"], a["scale"], a["window_size"]
    )


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(cuda, "flash_function", lambda: (flash_attn_varlen_func, ""))
    monkeypatch.setattr(cuda, "_torch_function", lambda: torch_varlen)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize(
    ("kernel", "asked"),
    [
        ("flash", Asked()),
        ("flash", Asked(scale=0.3, window=20, softcap=2.0)),
        ("varlen", Asked(scale=0.3)),
        ("varlen", Asked(window=1)),
        ("varlen", Asked(window=70)),
    ],
)
def test_kernels_for_rows_of_various_lengths_get_what_row_by_row_gets(kernel, asked, trimmed, stand_ins):
    rows = layout()
    mine, other = states(rows, trimmed), states(rows, trimmed)
    found = cuda.answered(*mine, rows, asked, kernel=kernel)
    wanted, _ = rows_attention(
        None, *other, None, rows=rows, scaling=asked.scale, sliding_window=asked.window, softcap=asked.softcap
    )
    # The capped path adds its softmax up in float32.
    close = {"rtol": 1e-5, "atol": 1e-6} if asked.softcap else {}
    torch.testing.assert_close(found, wanted, **close)
    pull = torch.randn_like(found)
    found.backward(pull)
    wanted.backward(pull)
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one.grad, two.grad, **close)


def test_rows_of_one_query_each_go_to_the_kernel_of_all_others(stand_ins):
    """As where a reward model's score is read."""
    ids, mask = torch.arange(3, 17).reshape(2, 7), torch.ones(2, 7, dtype=torch.long)
    wanted = torch.zeros(2, 7, dtype=torch.bool)
    wanted[:, -1] = True
    rows = tree.layout(tree.rows_of(ids, mask, None, wanted), share=False, device="cpu")
    given = states(rows, True)
    assert cuda.spread(rows, None, True).longest_queries == 1
    found = cuda.answered(*given, rows, Asked(), kernel="flash")
    torch.testing.assert_close(found, rows_attention(None, *given, None, rows=rows)[0])


@pytest.mark.parametrize(
    ("known", "taken"),
    [
        ("is_causal=False, return_aux=None", False),  # torch 2.10
        ("*, return_aux=None, scale=None, window_size=(-1, -1)", True),  # on the way to 2.12
    ],
)
def test_torchs_function_is_taken_where_it_can_be_told_what_is_seen(known, taken, monkeypatch):
    names = "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k"
    scope: dict = {}
    exec(f"def older({names}, {known}): return query", scope)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", scope["older"])
    monkeypatch.setattr(cuda, "flash_function", lambda: (None, "none is installed"))
    cuda._torch_function.cache_clear()
    try:
        assert cuda.choose(torch.bfloat16, 64, (9, 0))[0] == ("varlen" if taken else "rows")
        if taken:
            rows = layout()
            query, *others = states(rows, False)
            out = cuda.answered(query, *others, rows, Asked(), kernel="varlen")
            assert out.shape == (1, query.shape[2], HEADS, WIDTH)
    finally:
        cuda._torch_function.cache_clear()


def test_a_layout_is_spread_once_for_all_layers_and_left_alone_where_nothing_is_shared():
    rows = layout()
    assert cuda.spread(rows, None, False) is cuda.spread(rows, None, False)
    apart = tree.layout(
        [tree.Row(row.ids, row.start, row.wanted, row.slots) for row in _rows()], share=False, device="cpu"
    )
    alone = cuda.spread(apart, None, False)
    assert alone.order is None
    assert alone.places is None
    assert alone.queries.tolist() == alone.keys.tolist() == [0, 5, 12]


def _rows() -> list[tree.Row]:
    ids = torch.arange(3, 17).reshape(2, 7)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    found = tree.rows_of(ids, mask, None, mask.bool())
    assert found
    return found


def seen_by_walking(rows: tree.Layout, window: int | None, trimmed: bool) -> torch.Tensor:
    """Which token sees which: those of its own piece and of the pieces on its way, counted one by one."""
    starts = [0]
    for length in rows.lengths:
        starts.append(starts[-1] + length)
    seen = torch.zeros(starts[-1], starts[-1], dtype=torch.bool)
    for number, piece in enumerate(rows.pieces):
        way = [t for n in (*piece.way, number) for t in range(starts[n], starts[n + 1])]
        for place in range(piece.offset, piece.offset + piece.length):
            low = 0 if window is None else max(place - window + 1, 0)
            seen[way[place], way[low : place + 1]] = True
    return seen[rows.kept] if trimmed else seen


@pytest.mark.parametrize("window", [None, 1, 20, 70])
@pytest.mark.parametrize("trimmed", [False, True])
def test_the_mask_of_the_tree_and_its_blocks(window, trimmed):
    rows = layout()
    wanted = seen_by_walking(rows, window, trimmed)
    sees = cuda.block_mask(rows, window, trimmed).mask_mod
    queries, keys = (torch.arange(size) for size in wanted.shape)
    assert (sees(None, None, queries[:, None], keys[None]) == wanted).all()
    tile = 8
    some, every = cuda.sight(rows, trimmed).blocks(window, tile)
    fulls = 0
    for q in range(some.shape[0]):
        for k in range(some.shape[1]):
            part = wanted[q * tile : (q + 1) * tile, k * tile : (k + 1) * tile]
            assert some[q, k] or not part.any()
            assert not every[q, k] or (part.all() and part.numel() == tile * tile)
            fulls += int(every[q, k])
    assert some.sum() < some.size
    assert fulls or window in (1, 20) or trimmed


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize(
    "asked", [Asked(), Asked(scale=0.3, softcap=2.0), Asked(window=20, softcap=2.0), Asked(window=70)]
)
def test_flex_attention_reads_the_tree_in_place(asked, trimmed):
    # Longer than two blocks of the mask.
    rows = layout(((150, (70, 90)), (40, (3, 10))))
    given = [x.detach() for x in states(rows, trimmed, torch.float32)]
    found = cuda.answered(*given, rows, asked, kernel="flex")
    wanted, _ = rows_attention(
        None, *given, None, rows=rows, scaling=asked.scale, sliding_window=asked.window, softcap=asked.softcap
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    mask = cuda.block_mask(rows, asked.window, trimmed)
    assert mask is cuda.block_mask(rows, asked.window, trimmed)


@torch.no_grad()
def test_flex_attention_is_compiled_for_few_kinds_of_batches(monkeypatch):
    """Torch compiles it anew for whatever it takes for a constant, and behind a limit writes out all scores."""
    made = []

    def backend(graph, inputs):
        made.append([x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.float64])
        return lambda *given: (
            next(x for x in given if isinstance(x, torch.Tensor) and x.dim() == 4).clone(),
        )

    compiled = cuda._flex(True, backend)
    monkeypatch.setattr(cuda, "_flex", lambda on: compiled)
    shapes = (
        ((150, (70, 90)), (40, (3, 10))),
        ((300, (70, 90)), (400, (3, 10))),
        ((200, (20, 70)), (11, (9,))),
    )
    for seed, lengths in enumerate(shapes):
        rows = layout(lengths, seed)
        for window in (None, 20, 70):
            for trimmed in (False, True):
                given = [x.detach() for x in states(rows, trimmed, torch.float32)]
                cuda.in_tree(*given, rows, Asked(scale=0.3, window=window, softcap=2.0))
    assert len(made) == 2  # all queries, or some of them
    assert not any(made), "a number that the kernel would have to be given"


def test_torch_takes_what_it_is_given():
    """Torch's own operation, and its backward pass, without data."""
    rows = layout()
    given = [x.detach().to("meta", torch.bfloat16).requires_grad_() for x in states(rows, True)]
    facts = cuda.spread(rows, 20, True)
    flat = [x[0].transpose(0, 1) for x in given]
    asked = torch.empty(facts.size, HEADS, WIDTH, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out = cuda._torch_varlen(varlen_attn, asked, *flat[1:], facts, Asked(window=20))
    assert out.shape == asked.shape
    out.sum().backward()
    assert given[1].grad.shape == given[1].shape


def test_autocast_reaches_queries_that_rotary_positions_left_in_float32(monkeypatch):
    rows = layout()
    query, key, value = (x.detach().float() for x in states(rows, False))
    taken = []

    def kernel(q, k, v, *args, **named):
        taken.extend([q.dtype, k.dtype, v.dtype])
        return torch.zeros_like(q)

    monkeypatch.setattr(cuda, "flash_function", lambda: (kernel, ""))
    with torch.autocast("cpu", torch.bfloat16):
        assert cuda.compute_type(query) == torch.bfloat16
        out = cuda.answered(query, key, value.bfloat16(), rows, Asked(), kernel="flash")
    assert taken == [torch.bfloat16] * 3
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "width", "capability", "options", "flash", "kernel", "said"),
    [
        (torch.bfloat16, 64, (9, 0), {}, True, "flash", "FlashAttention is installed"),
        (torch.bfloat16, 256, (9, 0), {"capped": True, "drops": True}, True, "flash", "installed"),
        (torch.float16, 64, (8, 0), {}, False, "varlen", "flash-attn) is not installed"),
        (torch.float16, 64, (8, 0), {"drops": True}, False, "rows", "no kernel for dropout"),
        (torch.bfloat16, 256, (8, 0), {"capped": True}, False, "flex", "no kernel for capped scores"),
        (torch.float32, 256, (8, 0), {"capped": True}, True, "flex", "float32 is not a type"),
        (torch.float32, 64, (9, 0), {}, True, "rows", "float32 is not a type"),
        (torch.float16, 64, (7, 5), {}, True, "rows", "this one is of 7.5"),
        (torch.bfloat16, 12, (9, 0), {}, True, "rows", "these have 12"),
        (torch.bfloat16, 288, (9, 0), {}, True, "rows", "these have 288"),
        (torch.bfloat16, 12, (9, 0), {"capped": True}, True, "rows", "these have 12"),
    ],
)
def test_which_kernel_and_why(dtype, width, capability, options, flash, kernel, said, monkeypatch):
    absent = (None, "FlashAttention (flash-attn) is not installed")
    monkeypatch.setattr(cuda, "flash_function", lambda: (flash_attn_varlen_func, "") if flash else absent)
    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    name, why = cuda.choose(dtype, width, capability, **options)
    assert name == kernel
    assert said in why
    if name == "flex":
        monkeypatch.setattr(cuda, "has_triton", lambda: False)
        assert cuda.choose(dtype, width, capability, **options)[0] == "rows"


def test_an_old_flash_attention_caps_nothing(monkeypatch):
    def old(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        raise AssertionError

    monkeypatch.setattr(cuda, "flash_function", lambda: (old, ""))
    monkeypatch.setattr(cuda, "has_triton", lambda: False)
    assert cuda.choose(torch.bfloat16, 64, (8, 0))[0] == "flash"
    name, why = cuda.choose(torch.bfloat16, 64, (8, 0), capped=True)
    assert name == "rows"
    assert "the installed FlashAttention caps no scores" in why


def test_a_flash_attention_that_does_not_load_costs_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10\\nmore')")
    monkeypatch.syspath_prepend(str(tmp_path))
    cuda.flash_function.cache_clear()
    gpu.broken.cache_clear()
    try:
        assert cuda.flash_function() == (
            None,
            "FlashAttention is installed and cannot be loaded (undefined symbol: _ZN3c10)",
        )
    finally:
        cuda.flash_function.cache_clear()
        gpu.broken.cache_clear()


def test_a_run_on_cuda_is_told_its_kernel(monkeypatch):
    from types import SimpleNamespace

    from transformers import Gemma2Config, LlamaConfig

    monkeypatch.setattr(cuda, "flash_function", lambda: (flash_attn_varlen_func, ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    args = SimpleNamespace(bf16=True, fp16=False)
    weights = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    llama = SimpleNamespace(config=LlamaConfig(hidden_size=64, num_attention_heads=4), **vars(weights))
    assert cuda.told(llama, args) == ("flash", "FlashAttention is installed")
    args.bf16 = False
    assert cuda.told(llama, args)[0] == "rows"
    gemma = SimpleNamespace(config=Gemma2Config(head_dim=300), **vars(weights))
    args.fp16 = True
    monkeypatch.setattr(cuda, "has_triton", lambda: True)
    assert cuda.told(gemma, args)[0] == "flex"
    llama.device = torch.device("cpu")
    assert cuda.told(llama, args) is None


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_the_heads_gradients_stay_numbers_in_half_precision(offset):
    """Probabilities before they are divided add up to as much as the vocabulary, and half a number ends at 65,504."""
    from tunesmith.forward.head import Reading, read

    torch.manual_seed(0)
    hidden, table = torch.randn(3, 8) / 4, torch.randn(40_000, 8) / 50 + offset
    labels = torch.tensor([1, 5, 7])
    found = {}
    for dtype in (torch.float16, torch.float32):
        given = [x.detach().half().to(dtype).requires_grad_() for x in (hidden, table)]
        read(*given, None, labels, Reading(alike=True)).log_probs.sum().backward()
        found[dtype] = [x.grad.float() for x in given]
    for half, whole in zip(found[torch.float16], found[torch.float32], strict=True):
        assert (half - whole).abs().max() <= 5e-3 * max(whole.abs().max(), offset)


def test_shared_heads_are_written_out_where_sdpa_would_write_out_all_scores():
    keys = torch.arange(4.0).reshape(1, 2, 2, 1)
    assert cuda.repeated(keys, 1) is keys
    assert cuda.repeated(keys, 2)[0, :, :, 0].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_what_is_registered_is_ours():
    from transformers import AttentionInterface

    assert AttentionInterface()[forward.attention.NAME] is rows_attention

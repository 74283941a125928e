"""Memory estimates against llama.cpp's own figures, and the choice of slots and context."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import llama_cpp as lc

from swarmcpp.errors import NotEnoughMemory
from swarmcpp.models.capacity import (
    AUTO_CTX,
    MIN_CTX,
    OVERHEAD,
    STAGE_OVERHEAD,
    choose_capacity,
    embedding_bytes,
    estimate_memory,
    gigabytes,
    head_bytes,
    kv_bytes_per_token,
    layer_bytes,
    stage_memory,
)
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.inspect import ModelFile, inspect
from swarmcpp.models.slicing import write_slice
from swarmcpp.models.synthetic import TINY, Shape, write_model

MODEL = ModelFile(
    path=Path("model.gguf"),
    files=(Path("model.gguf"),),
    name="model",
    architecture="qwen2",
    n_layers=24,
    n_ctx_train=32768,
    n_embd=896,
    n_head=14,
    n_head_kv=(2,) * 24,
    head_dim_k=64,
    head_dim_v=64,
    n_ff=4864,
    n_vocab=151936,
    size_bytes=530_000_000,
    tensor_bytes=525_000_000,
    n_params=494_000_000,
    ftype="Q8_0",
    chat_template=None,
    has_tokenizer=True,
)
GB = 10**9


@lc.llama_log_callback
def _silent(_level: int, _message: bytes, _data: Any) -> None:
    """Module level: llama.cpp keeps the pointer for good."""


def test_kv_bytes_per_token() -> None:
    assert kv_bytes_per_token(MODEL) == 12_288
    assert kv_bytes_per_token(replace(MODEL, n_head_kv=(1, 3) + (0,) * 22)) == 4 * 128 * 2


@pytest.mark.parametrize(("ctx", "slots", "batch"), [(256, 1, 64), (300, 3, 32), (2048, 4, 512)])
def test_estimate_covers_what_llama_cpp_reserves(tmp_path: Path, ctx: int, slots: int, batch: int) -> None:
    path = write_model(tmp_path / "m.gguf", replace(TINY, n_vocab=4096, n_ff=1024), quant="Q8_0")
    need = estimate_memory(inspect(path), ctx, slots, batch)
    reserved = reserved_by_llama_cpp(path, ctx, slots, batch)
    # The log has two decimals of a MiB.
    assert reserved["KV"] == pytest.approx(need.kv, abs=0.006 * 2**20)
    used, real = need.compute - OVERHEAD, reserved["compute"] + reserved["output"]
    assert real <= used <= 3 * real + 2**20


STAGE_SHAPES = {
    "llama": Shape("random", "llama", 5, 64, 4, 2, 1024, 512, 4096),
    "tied": Shape("random", "qwen2", 5, 128, 4, 2, 512, 512, 4096, True),
    "experts": Shape("random", "qwen3moe", 5, 256, 4, 2, 256, 512, 4096, n_expert=4),
}


@pytest.fixture(params=STAGE_SHAPES)
def stages(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf", STAGE_SHAPES[request.param], quant="Q8_0")


@pytest.mark.parametrize(("ctx", "slots"), [(256, 1), (2048, 4)])
@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 4), (3, 5)])
def test_stage_estimate_is_what_llama_cpp_reserves(stages: Path, first: int, last: int, ctx: int, slots: int) -> None:
    path = write_slice(stages, first, last, stages.with_name("slice.gguf"), fingerprint=bytes(32))
    need = stage_memory(inspect(stages), first, last, ctx, slots)
    reserved = reserved_by_llama_cpp(path, ctx, slots, 512, outputs=slots if last == 5 else 512)
    # The log has two decimals of a MiB.
    assert reserved["KV"] == pytest.approx(need.kv, abs=0.006 * 2**20)
    tensors = inspect(path).tensor_bytes
    assert tensors - 1024 <= need.weights <= tensors
    used, real = need.compute - STAGE_OVERHEAD, reserved["compute"] + reserved["output"]
    assert real - 0.02 * 2**20 <= used <= 1.5 * real + 2 * 2**20


def test_bytes_of_layers_and_of_what_is_no_layer(stages: Path) -> None:
    model, tensors = inspect(stages), {t.name: t.n_bytes for t in read_header(stages).tensors}
    assert layer_bytes(model) == tuple(
        sum(size for name, size in tensors.items() if name.startswith(f"blk.{layer}.")) for layer in range(5)
    )
    assert embedding_bytes(model) == tensors["token_embd.weight"]
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    assert head_bytes(model) == head + tensors["output_norm.weight"]
    assert stage_memory(model, 0, 5, 256, 1).weights == model.tensor_bytes


def test_a_header_is_enough(stages: Path) -> None:
    model = inspect(stages)
    expected = stage_memory(model, 1, 5, 512, 2), layer_bytes(model)
    with stages.open("rb+") as file:
        file.truncate(read_header(stages).data_offset)
        file.truncate(model.size_bytes)
    assert (stage_memory(inspect(stages), 1, 5, 512, 2), layer_bytes(inspect(stages))) == expected


def reserved_by_llama_cpp(path: Path, ctx: int, slots: int, batch: int, outputs: int = 0) -> dict[str, float]:
    """Bytes of each kind of buffer, from llama.cpp's log."""
    found: dict[str, float] = {}

    @lc.llama_log_callback
    def log(_level: int, message: bytes, _data: Any) -> None:
        match = re.search(r"(\w+) buffer size = +([\d.]+) MiB", message.decode())
        if match is not None:
            found[match[1]] = float(match[2]) * 2**20

    lc.llama_log_set(log, ctypes.c_void_p(0))
    load = lc.llama_model_default_params()
    load.use_extra_bufts = False
    model = lc.llama_model_load_from_file(str(path).encode(), load)
    params = lc.llama_context_default_params()
    padded = -(-ctx // 256) * 256
    params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = padded * slots, slots, batch, batch
    params.kv_unified, params.flash_attn_type = False, 1
    if outputs:
        params.n_outputs_max = outputs
    context = lc.llama_init_from_model(model, params)
    assert context
    lc.llama_free(context)
    lc.llama_model_free(model)
    lc.llama_log_set(_silent, ctypes.c_void_p(0))
    return found


def test_plenty_of_memory() -> None:
    assert choose_capacity(MODEL, 64 * GB) == (AUTO_CTX, 8)


def test_short_training_context_is_the_start() -> None:
    assert choose_capacity(replace(MODEL, n_ctx_train=2048), 64 * GB) == (2048, 8)
    assert choose_capacity(replace(MODEL, n_ctx_train=128), 64 * GB) == (128, 8)


def test_slots_go_before_context() -> None:
    free = int(estimate_memory(MODEL, 8192, 2).total / 0.8) + 2
    assert choose_capacity(MODEL, free) == (8192, 2)
    free = int(estimate_memory(MODEL, 2048, 1).total / 0.8) + 2
    assert choose_capacity(MODEL, free) == (2048, 1)


def test_given_values_are_kept() -> None:
    assert choose_capacity(MODEL, 64 * GB, ctx_size=65536, slots=3) == (65536, 3)
    ctx, slots = choose_capacity(MODEL, 2 * GB, ctx_size=8192)
    assert (ctx, slots) == (8192, 4)
    ctx, slots = choose_capacity(MODEL, 2 * GB, slots=16)
    assert slots == 16
    assert MIN_CTX <= ctx < 8192


def test_both_given_may_fill_all_that_is_free() -> None:
    need = estimate_memory(MODEL, 4096, 4).total
    assert choose_capacity(MODEL, need, 4096, 4) == (4096, 4)
    with pytest.raises(NotEnoughMemory):
        choose_capacity(MODEL, need - 1, 4096, 4)


def test_refusal_says_needed_free_and_remedy() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        choose_capacity(MODEL, 200_000_000)
    assert str(caught.value) == (
        "model.gguf: 1 slot of 512 tokens needs 1.00 GB (weights 525 MB, KV cache 7 MB, buffers 469 MB), free is "
        "200 MB (80% of it usable); free memory, or take a smaller model or quantisation"
    )
    with pytest.raises(NotEnoughMemory, match="choose a smaller --ctx-size or fewer --slots"):
        choose_capacity(MODEL, 2 * GB, ctx_size=100_000, slots=64)


@given(
    free=st.integers(0, 64 * GB),
    ctx=st.one_of(st.just(0), st.integers(1, 1 << 20)),
    slots=st.one_of(st.just(0), st.integers(1, 256)),
    n_ctx_train=st.integers(1, 1 << 20),
)
def test_choice_fits_and_keeps_what_was_given(free: int, ctx: int, slots: int, n_ctx_train: int) -> None:
    model = replace(MODEL, n_ctx_train=n_ctx_train)
    try:
        chosen_ctx, chosen_slots = choose_capacity(model, free, ctx, slots)
    except NotEnoughMemory:
        least = estimate_memory(model, ctx or min(MIN_CTX, n_ctx_train), slots or 1).total
        assert least * 100 > free * (100 if ctx and slots else 80)
        return
    assert estimate_memory(model, chosen_ctx, chosen_slots).total <= free
    assert chosen_ctx == ctx or (not ctx and 1 <= chosen_ctx <= min(n_ctx_train, AUTO_CTX))
    assert chosen_slots == slots or (not slots and chosen_slots in (1, 2, 4, 8))
    more = choose_capacity(model, free * 2, ctx, slots)
    assert more[0] >= chosen_ctx
    assert more[1] >= chosen_slots


def test_gigabytes() -> None:
    assert [gigabytes(n) for n in (0, 1, 999_000_000, 1_500_000_000)] == ["0 MB", "1 MB", "999 MB", "1.50 GB"]

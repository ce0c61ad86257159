"""The breakdown of benchmarks/engine.py: made-up kernels of a GPU's steps, and a real step on a CPU."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import engine

STEP = [  # a step of two weights, two quantized activations
    ("Memcpy DtoD (Device -> Device)", 1),
    ("void at::native::elementwise_kernel<128, 4>", 2),  # transforms
    ("nvjet_tss_128x128_64x4_v_bz_TNN", 4),  # an inverse's product
    ("_forward", 8),
    ("_forward_wide", 16),
    ("void at::native::reduce_kernel<512, 1>", 32),  # a norm
    ("_forward", 64),
    ("nvjet_tst_192x192_64x3_v_bz_TNT", 128),
    ("void pytorch_flash::flash_fwd_kernel<...>", 256),
    ("_forward", 512),
    ("_squared_errors", 1024),
    ("void flash_bwd_dq_dk_dv_loop_kernel<...>", 2048),
    ("_backward", 4096),
    ("sm90_xmma_gemm_bf16bf16_bf16f32", 8192),
    ("_backward_wide", 16384),
    ("_backward", 32768),
    (
        "void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda>",
        65536,
    ),  # between the two weights' backward passes
    ("_backward", 131072),
    ("nvjet_tss_128x128_64x4_v_bz_TNN", 262144),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 524288),
    ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 1048576),
]
EXPECTED = {
    "GEMM": 128 + 8192,
    "attention": 256 + 2048,
    "fake-quant weights": 8 + 16 + 32768 + 131072,
    "fake-quant activations": 64 + 512 + 4096 + 16384,
    "optimizer": 524288 + 1048576,
    "copies": 1,
    "transforms and inverses": 2 + 4 + 65536 + 262144,
    "elementwise and norms": 32 + 1024,
}


@pytest.mark.parametrize("steps", [1, 3])
def test_every_kernel_is_counted_once_and_where_it_belongs(steps: int) -> None:
    found = engine.breakdown(steps * [[(name, float(ms)) for name, ms in STEP]], weights=2)
    assert found == {category: steps * ms for category, ms in EXPECTED.items()}


def test_what_an_epoch_begins_and_ends_with_is_not_the_steps() -> None:
    before, after = [("void getrf_kernel", 1.0)], [("Memcpy DtoH (Device -> Pageable)", 1.0)]
    assert engine.whole_steps(before + 3 * STEP + after) == [STEP, STEP]
    assert engine.whole_steps(STEP + after) == [STEP]  # of one alone there is no other


@pytest.mark.parametrize("scheme", ["W4A4", "W3A16"])
def test_a_cpu_step_is_broken_down(scheme: str) -> None:
    arguments = argparse.Namespace(device="cpu", hidden=32, mlp=48, heads=2, kv_heads=1, seq_len=8, windows=2)
    found = engine.profile(engine.Bench(arguments), "affinequant", scheme, 1)
    spent = dict(found["ms"])
    assert spent.pop("copies") >= 0
    activations = spent.pop("fake-quant activations")
    assert (activations > 0) == (scheme == "W4A4") and all(ms > 0 for ms in spent.values()), spent
    assert sum(k["ms"] for k in found["kernels"]) <= sum(found["ms"].values()) * (1 + 1e-6)
    table = engine.profile_table([found])
    assert table.count("\n") == 1 + len(found["ms"]) + 1 and f"affinequant {scheme}, batch 1" in table

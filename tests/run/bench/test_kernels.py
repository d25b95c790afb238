"""Kernels by kind, from sample names and from traces made by hand."""

import pytest

from epigram.run.bench._kernels import (
    ATTENTION,
    COPIES,
    ELEMENTWISE,
    IDLE,
    KINDS,
    OPTIMIZER,
    PRODUCTS,
    Interval,
    break_down,
    covered,
    kind_of,
)

UPDATE = "update"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (PRODUCTS, "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT"),
        (PRODUCTS, "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_execute_kernel__cublas"),
        (PRODUCTS, "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_nn_align8>(...)"),
        (PRODUCTS, "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int>>>"),
        (PRODUCTS, "ampere_sgemm_128x64_tn"),
        (PRODUCTS, "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)"),
        (PRODUCTS, "void gemv2T_kernel_val<int, int, float, float, float, float, 128, 16, 4, 4, false>"),
        (PRODUCTS, "hopper_wgmma_bf16_tile"),
        (PRODUCTS, "triton_mm_17"),
        (PRODUCTS, "triton_tem_fused_addmm_relu_3"),
        (PRODUCTS, "_product_kernel"),
        (PRODUCTS, "aten::mm"),
        (PRODUCTS, "aten::addmm"),
        (PRODUCTS, "aten::baddbmm"),
        (ATTENTION, "kernel_cutlass_kernel_flash_attncuteflash_fwd_sm90FlashAttentionForwardSm90_object_at_"),
        (ATTENTION, "kernel_cutlass_kernel_flash_attncuteflash_bwd_preprocessFlashAttentionBackwardPreprocess"),
        (ATTENTION, "void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>"),
        (ATTENTION, "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>"),
        (ATTENTION, "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_31_64x128x64_kernel0_0"),
        (ATTENTION, "fmha_cutlassB_bf16_aligned_64x64_k64_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)"),
        (ATTENTION, "triton_tem_fused_flex_attention_backward_4"),
        (ATTENTION, "aten::_scaled_dot_product_flash_attention_for_cpu_backward"),
        (ELEMENTWISE, "triton_poi_fused__to_copy_flash4_forward_mul_12"),
        (ELEMENTWISE, "triton_red_fused_addmm_mean_pow_3"),
        (ELEMENTWISE, "triton_per_fused__scaled_dot_product_efficient_attention_sum_8"),
        (ELEMENTWISE, "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>(...)"),
        (ELEMENTWISE, "void at::native::multi_tensor_apply_kernel<at::native::TensorListMetadata<2>>(...)"),
        (ELEMENTWISE, "_mix_norm_backward_kernel"),
        (ELEMENTWISE, "aten::mul"),
        (ELEMENTWISE, "## Call CompiledFxGraph fyyo7w7ydbzf4xc2kwg7lceiu3w ##"),
        (COPIES, "Memcpy HtoD (Pinned -> Device)"),
        (COPIES, "Memset (Device)"),
    ],
)  # fmt: skip
def test_kinds_by_name(kind: str, name: str):
    assert kind_of(name) == kind


def ran(name: str, start: float, length: float, correlation: int, cat: str = "kernel") -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length, "tid": 7,
            "args": {"correlation": correlation}}  # fmt: skip


def launched(at: float, correlation: int, cat: str = "cuda_runtime") -> dict:
    return ran("cudaLaunchKernel", at, 1, correlation, cat)


def of_the_host(name: str, start: float, length: float, cat: str = "cpu_op", thread: int = 1) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length, "tid": thread}


GPU_TRACE = [
    {"ph": "M", "name": "process_name", "ts": 0},
    of_the_host("aten::mm", 0, 900),  # on the host, which does not count where there is a device
    of_the_host(UPDATE, 100, 50, "user_annotation"),
    ran(UPDATE, 1090, 60, 0, "gpu_user_annotation"),
    launched(10, 1),
    launched(20, 2),
    launched(30, 3),
    launched(40, 4),
    launched(110, 5),
    launched(120, 6, "cuda_driver"),
    launched(160, 7),
    ran("nvjet_1", 1000, 40, 1),
    ran("flash_fwd", 1040, 20, 2),
    ran("triton_poi_fused_mul_0", 1060, 10, 3),
    ran("Memcpy HtoD (Pinned -> Device)", 1065, 15, 4, "gpu_memcpy"),  # on another stream: 5 at the same time
    ran("nvjet_1", 1100, 30, 5),  # after 20 of nothing
    ran("triton_red_fused_sum_1", 1130, 10, 6),
    ran("triton_poi_fused_mul_0", 1150, 50, 7),  # after 10 of nothing
]


def test_a_trace_of_a_device():
    """Two steps in 200 microseconds."""
    found = break_down(GPU_TRACE, 2, UPDATE)
    assert found.wall_ms == pytest.approx(0.1)
    assert found.kinds == pytest.approx(
        {PRODUCTS: 0.020, ATTENTION: 0.010, ELEMENTWISE: 0.030, OPTIMIZER: 0.020, COPIES: 0.0075, IDLE: 0.015}
    )
    assert found.calls == {PRODUCTS: 0.5, ATTENTION: 0.5, ELEMENTWISE: 1, OPTIMIZER: 1, COPIES: 0.5, IDLE: 0}
    first = found.top[0]
    assert (first.name, first.kind, first.calls) == ("triton_poi_fused_mul_0", ELEMENTWISE, 1)
    assert first.ms == pytest.approx(0.030)
    assert sum(kernel.ms for kernel in found.top) == pytest.approx(sum(found.kinds.values()) - found.kinds[IDLE])


def test_kernels_of_one_launch_are_counted_one_by_one():
    """As a CUDA graph does: a launch, many kernels with its number."""
    trace = [of_the_host(UPDATE, 0, 10, "user_annotation"), launched(5, 1), *(ran("k", t, 1, 1) for t in range(20, 25))]
    found = break_down(trace, 1, UPDATE)
    assert (found.calls[OPTIMIZER], found.kinds[OPTIMIZER]) == (5, pytest.approx(0.005))


def test_a_kernel_whose_launch_is_not_in_the_trace_goes_by_its_name():
    found = break_down([of_the_host(UPDATE, 0, 1e6, "user_annotation"), ran("nvjet", 10, 5, 99)], 1, UPDATE)
    assert found.kinds[PRODUCTS] == pytest.approx(0.005)


HOST_TRACE = [
    of_the_host("autograd::engine::evaluate_function: MmBackward0", 0, 60),
    of_the_host("aten::linear", 0, 50),
    of_the_host("aten::t", 2, 3),
    of_the_host("aten::addmm", 10, 30),
    of_the_host("aten::copy_", 10, 4),
    of_the_host("aten::mul", 60, 10),  # after 10 in which no operator ran
    of_the_host("aten::mul", 70, 10),
    of_the_host(UPDATE, 85, 100, "user_annotation"),
    of_the_host("aten::mm", 90, 10),
    of_the_host("aten::sum", 95, 20, thread=2),  # 5 of it beside the product
]


def test_a_trace_of_a_host():
    """Each operator without those inside it; time in which none runs is idle."""
    found = break_down(HOST_TRACE, 1, UPDATE)
    assert found.wall_ms == pytest.approx(0.115)
    assert found.kinds == pytest.approx(
        {PRODUCTS: 0.026, ATTENTION: 0, ELEMENTWISE: 0.044, OPTIMIZER: 0.030, COPIES: 0, IDLE: 0.020}
    )
    calls = {(kernel.name, kernel.kind): (kernel.calls, round(kernel.ms, 6)) for kernel in found.top}
    assert calls == {
        ("aten::linear", ELEMENTWISE): (1, 0.017),
        ("aten::t", ELEMENTWISE): (1, 0.003),
        ("aten::addmm", PRODUCTS): (1, 0.026),
        ("aten::copy_", ELEMENTWISE): (1, 0.004),
        ("aten::mul", ELEMENTWISE): (2, 0.020),
        ("aten::mm", OPTIMIZER): (1, 0.010),
        ("aten::sum", OPTIMIZER): (1, 0.020),
    }


def test_the_union_of_intervals():
    spans = [(10, 20), (0, 5), (12, 14), (19, 30), (30, 31), (40, 41)]
    assert covered([Interval("k", start, end, None) for start, end in spans]) == 5 + 21 + 1
    assert covered([]) == 0


def test_every_kind_has_its_place():
    assert tuple(break_down(GPU_TRACE, 1, UPDATE).kinds) == KINDS

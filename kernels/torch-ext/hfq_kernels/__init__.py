"""hfq's native operators as a Hub kernel: the same sources that the hfq package ships, without the package.

    cpu_linear(x, qweight, scales, zeros, codebook, bias, bits, group_size, in_features, out_features, int8_activations)
    cpu_dequantize(qweight, scales, zeros, codebook, bits, group_size, in_features, out_features, dtype)
    cuda_dequantize_neutral(qweight, scales, zeros, codebook, g_idx, bits, group_size, in_features, dtype)

Schemas are those of hfq/kernels/ops.py, which says what each tensor holds.
"""

from ._ops import ops

__all__ = ["cpu_dequantize", "cpu_linear", "cuda_dequantize_neutral"]

cpu_linear = ops.cpu_linear
cpu_dequantize = ops.cpu_dequantize
cuda_dequantize_neutral = ops.cuda_dequantize_neutral

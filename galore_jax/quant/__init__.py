"""Arrays in few bits: blockwise codes for weights and bases, power maps for moments."""

from galore_jax.quant.array import QuantizedArray, dequantize, quantize
from galore_jax.quant.differentiate import DifferentiableWeight, value_and_grad
from galore_jax.quant.params import dequantize_params, params_sharding, quantize_params
from galore_jax.quant.power import PowerArray
from galore_jax.quant.weight import matmul

__all__ = [
    "DifferentiableWeight",
    "PowerArray",
    "QuantizedArray",
    "dequantize",
    "dequantize_params",
    "matmul",
    "params_sharding",
    "quantize",
    "quantize_params",
    "value_and_grad",
]

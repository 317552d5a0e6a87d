"""Compressors of what travels: the table of their names, and packets with an exact byte encoding.

To add one: a frozen dataclass that extends `fedsim.compress.packet.Compressor`, and a row below. The contract suite
then checks its bits, its round trip and its constants.
"""

from __future__ import annotations

from fedsim.compress.adaptive import AdaptiveQSGD
from fedsim.compress.combined import Composed, PerTensor
from fedsim.compress.low_rank import PowerSGD
from fedsim.compress.quantize import QSGD, BFloat16, Float16, Natural, NaturalDithering, ScaledSign, TernGrad
from fedsim.compress.seeds import Seeds
from fedsim.compress.sparsify import Bernoulli, Identity, RandK, TopK

COMPRESSORS: dict[str, type] = {
    "identity": Identity,
    "rand_k": RandK,
    "top_k": TopK,
    "bernoulli": Bernoulli,
    "qsgd": QSGD,
    "adaptive_qsgd": AdaptiveQSGD,
    "terngrad": TernGrad,
    "natural": Natural,
    "bf16": BFloat16,
    "fp16": Float16,
    "natural_dithering": NaturalDithering,
    "scaled_sign": ScaledSign,
    "powersgd": PowerSGD,
    "seeds": Seeds,
    "composed": Composed,
    "per_tensor": PerTensor,
}

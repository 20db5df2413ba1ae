"""The exact (erf) GELU in a dozen instructions, within the rounding of the type that it is stored in.

GELU(x) = max(x, 0) - |x| Q(|x|), where Q(a) = erfc(a / sqrt 2) / 2 = exp(-a^2 / 2) times a smooth function, here a
polynomial in 1 / (1 + p a) (the form of Abramowitz and Stegun, 7.1.26). Its coefficients are fitted for the least
largest relative error over 0 <= a <= 13, where Q passes float32's least number; nothing cancels, so that is also the
error of GELU's own tail: 3.8e-5 for 16-bit results, a sixth of what float16 rounds by, and 1.8e-7 for float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

_HALF_LOG2_E = tl.constexpr(0.7213475204444817)
#: Q's relative errors, with 5 coefficients and with 8.
SHORT_ERROR, LONG_ERROR = 3.8e-5, 1.85e-7


@triton.jit
def gelu(x, SHORT: tl.constexpr):
    """GELU of float32 ``x``; NaN of NaN and of -inf, as PyTorch's. SHORT: for a result of 16 bits."""
    magnitude = tl.abs(x)
    tail = tl.minimum(magnitude, 14.0)  # Q is 0 there, and infinity times 0 is no number
    if SHORT:
        inverse = tl.rsqrt((1.0 + 0.37 * tail) * (1.0 + 0.37 * tail))  # one instruction, which a quotient is not
        smooth = -0.0899834558 * inverse + 0.209078431
        smooth = smooth * inverse + 0.0768280923
        smooth = smooth * inverse + 0.157150045
        smooth = smooth * inverse + 0.146944866
    else:
        inverse = tl.rsqrt((1.0 + 0.3 * tail) * (1.0 + 0.3 * tail))
        smooth = 0.0359317325 * inverse - 0.158275992
        smooth = smooth * inverse + 0.208206594
        smooth = smooth * inverse - 0.0553938411
        smooth = smooth * inverse + 0.129469201
        smooth = smooth * inverse + 0.0996374935
        smooth = smooth * inverse + 0.120798357
        smooth = smooth * inverse + 0.119626388
    q = smooth * inverse * tl.exp2(tail * tail * -_HALF_LOG2_E)
    return 0.5 * x + 0.5 * magnitude - tail * q  # halves of a number add up to it, or to 0, exactly

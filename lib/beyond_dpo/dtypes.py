"""Numbers as a safetensors file stores them, widened to float32 and rounded back by numpy alone.

numpy has no bfloat16, so its bits are held as uint16. torch would do all of this too, but to import
it takes longer than to copy a model of a billion parameters.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dtype:
    """A kind of stored numbers."""

    name: str  # as an attribute of torch
    numpy: np.dtype  # of arrays that hold the stored bits
    infinity: int | None = None  # the bits of the positive one; None: these are no floats

    def __str__(self) -> str:
        return f"torch.{self.name}"

    @property
    def is_floating_point(self) -> bool:
        return self.infinity is not None

    @property
    def sign(self) -> int:
        """The bit that is set in negative floats."""
        return 1 << (8 * self.numpy.itemsize - 1)


BFLOAT16 = Dtype("bfloat16", np.dtype(np.uint16), 0x7F80)
FLOAT16 = Dtype("float16", np.dtype(np.float16), 0x7C00)
# By their names in a safetensors file.
DTYPES = {
    "F64": Dtype("float64", np.dtype(np.float64), 0x7FF << 52),
    "F32": Dtype("float32", np.dtype(np.float32), 0x7F80 << 16),
    "F16": FLOAT16,
    "BF16": BFLOAT16,
    "BOOL": Dtype("bool", np.dtype(np.bool_)),
    "I64": Dtype("int64", np.dtype(np.int64)),
    "I32": Dtype("int32", np.dtype(np.int32)),
    "I16": Dtype("int16", np.dtype(np.int16)),
    "I8": Dtype("int8", np.dtype(np.int8)),
    "U8": Dtype("uint8", np.dtype(np.uint8)),
}


# ---- what bits say


def _bits(stored: np.ndarray) -> np.ndarray:
    return stored.view(f"u{stored.itemsize}")


def all_finite(stored: np.ndarray, dtype: Dtype) -> bool:
    """Return whether no float of an array, which is not empty, is NaN or infinite.

    Among the bits of positive floats the largest are those of infinity and NaN, and so among those
    of negative ones. Two maxima are found faster than a test of each float.
    """
    largest = stored.view(f"i{stored.itemsize}").max()  # of the positive ones, if there are any
    largest_negative = _bits(stored).max()
    return largest < dtype.infinity and largest_negative < dtype.sign | dtype.infinity


def are_finite(stored: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return for each float whether it is neither NaN nor infinite."""
    return _bits(stored) & dtype.infinity != dtype.infinity


def are_infinite(stored: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return for each float whether it is infinite, of either sign."""
    return _bits(stored) & (dtype.sign - 1) == dtype.infinity


def are_negative(stored: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return for each float whether its sign is set."""
    return _bits(stored) & dtype.sign != 0


def values(stored: np.ndarray, dtype: Dtype) -> np.ndarray:
    """Return an array whose elements compare as the stored numbers do."""
    if dtype != BFLOAT16:
        return stored
    wide = np.empty(len(stored), np.float32)
    widen(stored, dtype, wide)
    return wide


# ---- from and to float32


def widen(stored: np.ndarray, dtype: Dtype, wide: np.ndarray) -> None:
    """Write stored floats into an array of float32; those of float64 are rounded."""
    if dtype == BFLOAT16:
        bits = wide.view(np.uint32)
        np.copyto(bits, stored)
        bits <<= 16
    elif dtype == FLOAT16 and all_finite(stored, dtype):
        _widen_float16(stored, wide)
    else:
        np.copyto(wide, stored, casting="same_kind")


def narrow(wide: np.ndarray, dtype: Dtype, stored: np.ndarray, work: np.ndarray) -> None:
    """Round float32 to nearest, ties to even, into an array of a dtype; `wide` is overwritten.

    What is beyond the dtype's range becomes infinite. work: uint32 of the same size.
    """
    if dtype == BFLOAT16:
        bits = _round_to_bfloat16(wide, work)
        bits >>= 16
        np.copyto(stored, bits, casting="unsafe")
    elif dtype == FLOAT16:
        _narrow_float16(wide, stored, work)
    else:
        np.copyto(stored, wide, casting="same_kind")


def _round_to_bfloat16(wide: np.ndarray, work: np.ndarray) -> np.ndarray:
    """Return the bits of float32, of which the upper 16 are rounded; the lower ones mean nothing.

    Added to the lower half are 2**15 - 1 and the last bit that stays, so that a tie is carried into
    the upper half only where that is odd. `wide` is overwritten.
    """
    bits = wide.view(np.uint32)
    np.right_shift(bits, 16, out=work)
    work &= 1
    work += 0x7FFF
    bits += work
    return bits


# numpy converts float16 one by one; with operations on whole arrays it takes a third of the time.
#
# The bits of a float16, but for the sign, 13 to the left are those of a float32, 2**112 times
# smaller. So they are for subnormal numbers too.


def _widen_float16(stored: np.ndarray, wide: np.ndarray) -> None:
    """Write float16, all finite, into an array of float32."""
    bits = wide.view(np.int32)
    np.copyto(bits, stored.view(np.int16))  # the sign fills the upper half
    bits <<= 13
    bits &= 0x0FFFE000 - (1 << 31)
    wide *= np.float32(2.0**112)


def _narrow_float16(wide: np.ndarray, stored: np.ndarray, work: np.ndarray) -> None:
    """Round float32 into an array of float16; both `wide` and `work` are overwritten.

    A number that is so large that its last bit is the last one that float16 keeps is added and
    subtracted again: 1.5 * 2**13 times the number's power of two, and no less than for 2**-14, the
    smallest that is not subnormal.
    """
    bits = wide.view(np.uint32)
    large = work.view(np.float32)
    result = stored.view(np.uint16)
    np.right_shift(bits, 16, out=result, casting="unsafe")
    result &= 0x8000  # the sign, which is lost where the rest is rounded to 0
    np.bitwise_and(bits, 0x7F800000, out=work)
    np.clip(large, 2.0**-14, 2.0**100, out=large)
    large *= np.float32(1.5 * 2**13)
    wide += large
    wide -= large
    np.abs(wide, out=wide)
    np.minimum(wide, np.float32(65536.0), out=wide)  # which is infinite in float16
    wide *= np.float32(2.0**-112)
    bits >>= 13
    np.bitwise_or(result, bits, out=result, casting="unsafe")


# ---- the same for bfloat16, two numbers at a time
#
# Two stored numbers are one word of 32 bits. One operation gives the float32 of all the lower ones,
# one that of all the upper ones, and so the even elements come to stand before the odd ones.


def in_split_order(elements: np.ndarray) -> np.ndarray:
    """Return the even elements, then the odd ones, as widen_split() puts them."""
    pairs = len(elements) // 2 * 2
    return np.concatenate([elements[0:pairs:2], elements[1:pairs:2], elements[pairs:]])


def widen_split(stored: np.ndarray, wide: np.ndarray) -> None:
    """Write bfloat16 into an array of float32, the even elements before the odd ones."""
    half = len(stored) // 2
    words = stored[: 2 * half].view(np.uint32)
    bits = wide.view(np.uint32)
    np.left_shift(words, 16, out=bits[:half])
    np.bitwise_and(words, 0xFFFF0000, out=bits[half : 2 * half])
    if len(stored) % 2:
        bits[-1] = int(stored[-1]) << 16


def narrow_split(wide: np.ndarray, stored: np.ndarray, work: np.ndarray) -> None:
    """Do for bfloat16 in the order of widen_split() what narrow() does."""
    bits = _round_to_bfloat16(wide, work)
    half = len(stored) // 2
    even = bits[:half]
    odd = bits[half : 2 * half]
    even >>= 16
    odd &= 0xFFFF0000
    np.bitwise_or(even, odd, out=stored[: 2 * half].view(np.uint32))
    if len(stored) % 2:
        stored[-1] = bits[-1] >> 16

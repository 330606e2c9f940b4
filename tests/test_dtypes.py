"""Numbers between their stored form and float32: the bits are those of torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from beyond_dpo import dtypes
from beyond_dpo.dtypes import DTYPES

SIXTEEN_BITS = np.arange(1 << 16, dtype=np.uint16)
FLOATS = ("BF16", "F16", "F32", "F64")


def of_torch(stored: np.ndarray, dtype: dtypes.Dtype) -> torch.Tensor:
    """Return a torch tensor of the same bits."""
    stored_bytes = torch.from_numpy(stored.copy().view(np.uint8))
    return stored_bytes.view(getattr(torch, dtype.name))


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a torch tensor's bits."""
    size = tensor.element_size()
    return tensor.view(torch.uint8).numpy().view(f"u{size}")


def hard_float32() -> np.ndarray:
    """Return float32: random bits, ties of 16-bit dtypes and their neighbours, subnormals, limits.

    None is NaN.
    """
    generator = np.random.default_rng(0)
    random = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    upper_halves = np.arange(1 << 16, dtype=np.uint32) << 16
    near_ties = [upper_halves + low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    # ties of float16's numbers of each power of two, also of its subnormal ones
    in_range = generator.integers(0x32000000, 0x47900000, 200_000, dtype=np.uint32)
    near_ties += [in_range & ~np.uint32(0x1FFF) | low for low in (0, 0xFFF, 0x1000, 0x1001)]
    halves = SIXTEEN_BITS.view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float32)
    middles = (halves + np.float32(2.0**-25)).view(np.uint32)
    bits = np.concatenate([random, *near_ties, in_range, halves.view(np.uint32), middles])
    bits = np.concatenate([bits, bits | np.uint32(1 << 31)])
    floats = bits.view(np.float32)
    return floats[~np.isnan(floats)]


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_every_number_of_16_bits_is_widened_as_by_torch(name):
    """NaN stays NaN; the others have torch's bits."""
    dtype = DTYPES[name]
    stored = SIXTEEN_BITS.view(dtype.numpy)
    finite = stored[dtypes.are_finite(stored, dtype)]
    for numbers in (stored, finite):
        wide = np.empty(len(numbers), np.float32)
        dtypes.widen(numbers, dtype, wide)
        wanted = of_torch(numbers, dtype).float()
        nan = wanted.isnan().numpy()
        assert np.isnan(wide[nan]).all()
        assert np.array_equal(wide.view(np.uint32)[~nan], bits_of(wanted)[~nan])


@pytest.mark.parametrize("name", FLOATS)
def test_float32_is_rounded_as_by_torch(name):
    """Ties to even, subnormal numbers, what overflows, infinities and signed zeros."""
    dtype = DTYPES[name]
    wide = hard_float32()
    assert len(wide) > 1_000_000
    assert np.isinf(wide).sum() >= 2
    wanted = bits_of(torch.from_numpy(wide.copy()).to(getattr(torch, dtype.name)))
    stored = np.empty(len(wide), dtype.numpy)
    work = np.empty(len(wide), np.uint32)
    with np.errstate(all="ignore"):
        dtypes.narrow(wide, dtype, stored, work)
    assert np.array_equal(stored.view(wanted.dtype), wanted)


@pytest.mark.parametrize("name", FLOATS)
def test_nan_stays_nan(name):
    dtype = DTYPES[name]
    wide = np.full(3, np.nan, np.float32)
    stored = np.empty(3, dtype.numpy)
    dtypes.narrow(wide, dtype, stored, np.empty(3, np.uint32))
    assert of_torch(stored, dtype).isnan().all()


@pytest.mark.parametrize("size", [1, 2, 7, 8, 1 << 16])
def test_two_at_a_time_give_what_one_by_one_does(size):
    stored = SIXTEEN_BITS[-size:].copy()
    wide = np.empty(size, np.float32)
    dtypes.widen(stored, dtypes.BFLOAT16, wide)
    split = np.empty(size, np.float32)
    dtypes.widen_split(stored, split)
    ordered = dtypes.in_split_order(wide.view(np.uint32))
    assert np.array_equal(split.view(np.uint32), ordered)
    numbers = hard_float32()[-size:]
    wanted = np.empty(size, np.uint16)
    work = np.empty(size, np.uint32)
    dtypes.narrow(numbers.copy(), dtypes.BFLOAT16, wanted, work)
    result = np.empty(size, np.uint16)
    dtypes.narrow_split(dtypes.in_split_order(numbers), result, work)
    assert np.array_equal(result, wanted)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, "inf", "-inf", "nan", "-nan"])
def test_what_bits_say(name, value):
    """Beside numbers of either sign one that is not finite is found."""
    dtype = DTYPES[name]
    tensor = torch.tensor([3.0, -3.0, float(value)]).to(getattr(torch, dtype.name))
    for numbers in (tensor, tensor[1:], tensor[2:]):
        stored = bits_of(numbers.clone()).view(dtype.numpy)
        assert dtypes.all_finite(stored, dtype) == bool(numbers.isfinite().all())
        assert dtypes.are_finite(stored, dtype).tolist() == numbers.isfinite().tolist()
        assert dtypes.are_infinite(stored, dtype).tolist() == numbers.isinf().tolist()
        assert dtypes.are_negative(stored, dtype).tolist() == numbers.signbit().tolist()


def test_a_dtype_has_torchs_names():
    for dtype in DTYPES.values():
        of_this_name = getattr(torch, dtype.name)
        assert str(dtype) == str(of_this_name)
        assert dtype.is_floating_point == of_this_name.is_floating_point
        assert dtype.numpy.itemsize == of_this_name.itemsize


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # to import it is an error
from beyond_dpo.jobs import command
sys.exit(command.main(["extrapolate", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_command_needs_no_torch(tmp_path, dtype):
    """To import it takes longer than to copy the model."""
    from safetensors.torch import load_file, save_file

    for i, folder in enumerate(("sft", "aligned")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        state = {"w": torch.arange(7.0).to(dtype) + i, "steps": torch.tensor([i])}
        save_file(state, tmp_path / folder / "model.safetensors")
    folders = [str(tmp_path / name) for name in ("sft", "aligned", "out")]
    command = [sys.executable, "-c", WITHOUT_TORCH, *folders, "--alpha", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = load_file(tmp_path / "out" / "model.safetensors")
    assert result["w"].tolist() == [i + 1.5 for i in range(7)]
    assert result["w"].dtype == dtype
    assert result["steps"].tolist() == [1]

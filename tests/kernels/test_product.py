"""Products with weights that stay integers: every instruction set, level type and shape, against FP64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tenpak.kernels import core

ISAS = core.instruction_sets()
# Inputs, rows, columns: odd ones, both sides of the widths and panels of the compiled core, and empty ones.
SHAPES = [(1, 1, 1), (1, 5, 17), (3, 4, 16), (4, 67, 33), (9, 130, 1030), (2, 64, 2048), (0, 3, 5)]
LEVELS = {
    torch.uint8: (0, 256),
    torch.int8: (-128, 128),
    torch.int16: (-32768, 32768),
    torch.int32: (-(2**24), 2**24),  # beyond it an FP32 does not hold every integer
}


def operands(count: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count + 10 * rows + 100 * columns)
    x = torch.randn(count, columns, generator=generator)
    levels = torch.randint(*LEVELS[dtype], (rows, columns), generator=generator).to(dtype)
    return x, levels, torch.rand(rows, generator=generator) + 0.1, torch.rand(columns, generator=generator) + 0.1


def exact(x: Tensor, levels: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The product in FP64, and that of absolute values, which bounds what rounding may do."""
    integers = levels.double() - (128 if levels.dtype == torch.uint8 else 0)
    weight = integers * row[:, None].double() * column.double()
    return x.double() @ weight.T, x.double().abs() @ weight.abs().T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("threads")
def test_a_product_is_that_of_the_weight(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    given = operands(*shape, dtype)
    expected, bound = exact(*given)
    found = []
    with core.using(isa):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(core.product(*given))
    assert found[0].shape == (shape[0], shape[1])
    assert ((found[0].double() - expected).abs() <= 2e-6 * bound).all()
    if isa != "reference":  # whose sums are the library's
        assert torch.equal(*found)


@pytest.mark.parametrize("isa", ISAS)
def test_every_byte_is_its_level(isa: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[:, None].contiguous()
    one = torch.ones(1)
    with core.using(isa):
        assert torch.equal(core.product(one[None], codes, torch.ones(256), one)[0], torch.arange(-128.0, 128.0))


def test_misuse_is_refused() -> None:
    x, levels, row, column = operands(2, 3, 4, torch.uint8)
    if len(ISAS) == 1:
        pytest.skip("the compiled core is not here")
    for wrong in ((x[:, :3], levels, row, column), (x, levels, row[:2], column), (x, levels, row, column[:3])):
        with pytest.raises(ValueError, match=r"one input|one output"):
            core.product(*(part.contiguous() for part in wrong))

"""Work on several items: in order, in the modes of whoever asks for it, an error when its turn comes."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor

from tenpak.kernels.parallel import each, ordered_map


@pytest.fixture(autouse=True)
def two_workers(threads: None) -> None:
    torch.set_num_threads(2)


def test_results_are_in_order() -> None:
    seen = set()

    def work(item: int) -> int:
        seen.add(threading.get_ident())
        time.sleep(0.01 * (item % 3))
        return item * item

    assert list(ordered_map(work, iter(range(12)))) == [item * item for item in range(12)]
    assert len(seen) == 2
    assert threading.get_ident() not in seen
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_workers_are_in_the_mode_of_whoever_asks(inference: bool, gradients: bool) -> None:
    def mode(_: int) -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
        expected = mode(0)
        assert set(each(mode, range(6))) == {expected}


def test_workers_fill_what_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        room = torch.zeros(8)

        def fill(place: int) -> Tensor:
            room[place] = place
            return room[place]

        each(fill, range(8))
        assert torch.equal(room, torch.arange(8.0))


def test_an_error_comes_when_its_turn_does() -> None:
    def work(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        return item

    results = ordered_map(work, range(5))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert torch.get_num_threads() == 2

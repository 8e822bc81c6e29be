"""Which tensors are compressed, as which matrices, with which patterns; errors name the tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from tenpak.codecs.base import Codec, Payload, require_matrix
from tenpak.codecs.pattern import Pattern
from tenpak.codecs.patterns import PatternDictionary
from tenpak.errors import CalibrationError, CodecError
from tenpak.pixel.tensors import decoded

__all__ = ["Encoder", "chosen", "naming", "tied"]


def chosen(tensors: Mapping[str, Tensor], min_weights: int) -> dict[str, Tensor]:
    """Floating-point tensors of two dimensions and so many weights, as matrices; leading dimensions become rows.

    Raises:
        CodecError: there are no tensors at all, something is no tensor, or one that is chosen is not finite.
    """
    if not isinstance(tensors, Mapping) or not tensors:
        raise CodecError(
            "there are no tensors to compress", hint="give a mapping of names to tensors, such as model.state_dict()"
        )
    matrices: dict[str, Tensor] = {}
    again = tied(tensors)
    for name, tensor in tensors.items():
        if name in again:
            continue
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise CodecError(f"{name} is no tensor with data: {type(tensor).__name__}", hint="load the model first")
        if tensor.is_floating_point() and tensor.ndim >= 2 and tensor.numel() >= max(1, min_weights):
            matrices[name] = tensor.detach().reshape(-1, tensor.shape[-1])
            with naming(name):
                require_matrix(matrices[name])
    return matrices


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are the very memory of another before them, and that one's name."""
    first: dict[object, str] = {}
    found = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.numel():
            memory = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
            if memory in first:
                found[name] = first[memory]
            else:
                first[memory] = name
    return found


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors of codecs within name the tensor."""
    try:
        yield
    except (CodecError, CalibrationError) as error:
        raise type(error)(f"{name}: {error}", hint=error.hint) from error


class Encoder:
    """Encodes matrices with the patterns that a dictionary has now, and counts their uses.

    Args:
        dictionary: whose patterns they share.
        terms: patterns per block.
        scales: codec of their scales.
        rest: codec of what they leave, or None.

    Raises:
        CodecError: the dictionary is empty.
        RecipeError: terms or scales cannot be used.
    """

    def __init__(self, dictionary: PatternDictionary, terms: int, scales: Codec, rest: Codec | None) -> None:
        if not len(dictionary):
            raise CodecError("the dictionary holds no pattern", hint="add some, or let it discover them in a weight")
        self.dictionary, self.rest = dictionary, rest
        self.patterns = dictionary.found
        self.codec = Pattern(dictionary.size, len(self.patterns), dictionary.base, terms, scales)

    def encode(self, matrix: Tensor) -> tuple[Payload, ...]:
        """The payloads whose sum stands for ``matrix``, finite ``[out, in]``.

        Raises:
            CodecError: a codec refuses it.
        """
        base = self.codec.encode_with(matrix, self.patterns)
        self.dictionary.count(self.codec.references(base)[0].cpu())
        if self.rest is None:
            return (base,)
        return base, self.rest.encode(matrix.detach().float() - decoded((base,)))

"""What entropy-coded streams share: lengths as varints, a reader that distrusts its bytes, the number of lanes."""

from __future__ import annotations

from torch import Tensor

from tenpak.errors import InvalidPayloadError

__all__ = ["ByteReader", "damaged", "lane_count", "varint"]


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit says that more follow."""
    found = bytearray()
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)


def lane_count(rows: int, columns: int) -> int:
    """Columns coded side by side: more are faster to decode, and each costs two bytes."""
    lanes = 1
    while lanes < 32 and 2 * lanes <= columns and rows * columns >= 8192 * lanes:
        lanes *= 2
    return lanes


def damaged(codec_id: str, what: str) -> InvalidPayloadError:
    """The error of a stream of that codec, to be raised."""
    return InvalidPayloadError(
        f"the stream of a {codec_id} payload is damaged: {what}",
        hint="obtain the artifact again, or compress the model again",
    )


class ByteReader:
    """A stream that is read from its beginning; too short a one raises InvalidPayloadError."""

    def __init__(self, codec_id: str, stream: Tensor) -> None:
        self.codec_id, self.stream, self.at = codec_id, stream, 0

    def damaged(self, what: str) -> InvalidPayloadError:
        """The error that the stream is damaged, to be raised."""
        return damaged(self.codec_id, what)

    def take(self, count: int) -> Tensor:
        """The next ``count`` bytes, uint8 ``[count]``, which share the stream's memory."""
        if count > len(self.stream) - self.at:
            raise self.damaged("it ends too early")
        self.at += count
        return self.stream[self.at - count : self.at]

    def ahead(self, most: int) -> list[int]:
        """The bytes that come next, at most so many of them, without taking them."""
        found: list[int] = self.stream[self.at : self.at + most].tolist()
        return found

    def varint(self) -> int:
        """The integer that comes next, of at most five bytes."""
        value = 0
        for place in range(5):
            byte = int(self.take(1))
            value |= (byte & 127) << (7 * place)
            if byte < 128:
                return value
        raise self.damaged("a length")

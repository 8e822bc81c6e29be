"""Statistics of several texts, or of shards of one, as those of all of them.

Merging weighs means by their counts, which is what one pass over all texts would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from tenpak.calibration.statistics import Origin, Part, StatisticsFolder, new_folder, write_part, write_table
from tenpak.calibration.sums import InputSums, Sums
from tenpak.errors import CalibrationError

__all__ = ["merge"]


def merge(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Origin:
    """Merge statistics of several texts, or shards of one, into a new folder.

    Args:
        folders: of statistics, one at least.
        out: the new folder.
        overwrite: replace statistics that are there.
        progress: called with the phase, blocks done and blocks in all.

    Raises:
        CalibrationError: they are of different models or were collected in different ways.
        OutputExistsError: ``out`` exists.
    """
    opened = [StatisticsFolder(folder) for folder in folders]
    first = opened[0].origin
    for other in opened[1:]:
        for name in ("source_sha256", "method", "window"):
            if getattr(other.origin, name) != getattr(first, name):
                raise CalibrationError(
                    f"{other.folder} and {opened[0].folder} differ in {name}: "
                    f"{getattr(other.origin, name)} and {getattr(first, name)}",
                    hint="merge statistics of one model that were collected in one way",
                )
    with new_folder(Path(out), overwrite=overwrite) as folder:
        return _merge_into(folder, opened, progress)


def _merge_into(
    out: Path, opened: Sequence[StatisticsFolder], progress: Callable[[str, int, int], None] | None
) -> Origin:
    first, parts = opened[0].origin, opened[0].parts
    for done, number in enumerate(parts, 1):
        sums = Sums()
        extra: dict[str, Tensor] = {}
        for shard in opened:
            part = shard.part(number)
            sums.add(_as_sums(part))
            for name in ("token_frequency", "input_curvature"):
                if name in part.tensors:
                    weighed = part.tensors[name].double() * shard.origin.tokens
                    extra[name] = extra[name] + weighed if name in extra else weighed
        tokens = sum(shard.origin.tokens for shard in opened)
        write_part(out, number, sums, {name: (value / tokens).float() for name, value in extra.items()})
        if progress is not None:
            progress("merging", done, len(parts))
    origin = replace(
        first,
        text=", ".join(shard.origin.text for shard in opened),
        text_sha256=", ".join(shard.origin.text_sha256 for shard in opened),
        tokens=sum(shard.origin.tokens for shard in opened),
    )
    write_table(out, origin, parts)
    return origin


def _as_sums(part: Part) -> Sums:
    sums = Sums()
    for number, count in enumerate(part.table.counts):
        hessian, mean, mean_abs = (
            part.tensors[f"{number}.{name}"].double() for name in ("hessian", "mean", "mean_abs")
        )
        sums.inputs.append(InputSums(count, hessian * count, mean * count, mean_abs * count))
    for position, (parameter, matrix, group) in enumerate(part.table.weights):
        sums.group_of[parameter, matrix] = group
        if f"{position}.curvature" in part.tensors:
            curvature = part.tensors[f"{position}.curvature"].double()
            sums.squares[parameter, matrix] = curvature * part.table.counts[group]
    return sums

"""The quality of what was written: the texts that it may be measured on, and the fresh process that measures it.

What is measured is the artifact as it loads from disk, by ``tenpak evaluate``, not what this process has in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from tenpak.calibration.choice import Text
from tenpak.calibration.overlap import overlap
from tenpak.calibration.text import load_text, tokenize
from tenpak.errors import CalibrationError, EvaluationError
from tenpak.evaluation.evaluate import load_tokenizer
from tenpak.job import Job
from tenpak.task import Progress, Task

__all__ = ["check_text", "evaluate_apart", "followed", "require_other_text"]

_MOST_OVERLAP = 0.01  # texts of one kind have a little in common by chance


def require_other_text(task: Task, evaluation: str | Path | None, *, allowed: bool) -> float | None:
    """Refuse to measure on what was calibrated on, which would flatter.

    Returns:
        The share of the evaluation text that occurs in the calibration text; None where one of the two is not read, or
        the latter is sampled from the model.

    Raises:
        CalibrationError: both texts are the same, or have more than a per cent in common and that is not allowed.
    """
    if evaluation is None or not task.texts:
        return None
    name, text = Path(evaluation).name, load_text(evaluation)
    if Text(name, text).sha256 in task.texts:
        raise CalibrationError(
            f"calibration and evaluation text are the same ({name})", hint="give another --evaluation text"
        )
    if task.reading is None or task.reading.text.sampled:
        return None
    shared = overlap(text, task.reading.text.content)
    if shared > _MOST_OVERLAP and not allowed:
        raise CalibrationError(
            f"{shared:.1%} of the evaluation text ({name}) occurs in the calibration text ({task.reading.text.name})",
            hint="give another --evaluation text, or --allow-overlap to measure on it nevertheless",
        )
    return shared


def check_text(job: Job, text: str | Path | None, trust_remote_code: bool) -> None:
    """Find out before the work, not after it, that there is nothing to measure on.

    Raises:
        CalibrationError: the text cannot be read.
        EvaluationError: there is no tokenizer, or the text has a single token.
    """
    if text is None:
        return
    tokenizer = load_tokenizer(job.checkpoint.folder, trust_remote_code=trust_remote_code)
    if tokenize(tokenizer, load_text(text)).numel() < 2:
        raise EvaluationError(f"the text at {str(text)!r} has a single token", hint="give a longer text")


def evaluate_apart(out: Path, task: Task, text: str | Path, progress: Progress | None) -> dict[str, Any]:
    """Measure a written artifact in a fresh process, whose progress is passed on.

    Args:
        out: the artifact.
        task: what it was made by.
        text: to measure on.
        progress: as that of ``pipeline.compress``.

    Returns:
        What ``tenpak evaluate --json`` prints.

    Raises:
        EvaluationError: it failed; says why.
    """
    command = [sys.executable, "-m", "tenpak", "evaluate", str(out), "--against", str(task.job.checkpoint.folder)]
    command += ["--text", str(text), "--json", *(["--trust-remote-code"] if task.trust_remote_code else [])]
    with TemporaryFile() as printed:  # a pipe could fill up while the other one is read
        code, lines = followed(command, printed, progress)
        if code != 0:
            lines = lines or [f"exit code {code}"]
            reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
            raise EvaluationError(
                f"{out} is written, but measuring it failed: {reason}", hint="repeat it with `tenpak evaluate`"
            )
        printed.seek(0)
        result: dict[str, Any] = json.load(printed)
    return result


def followed(command: list[str], printed: BinaryIO, progress: Progress | None) -> tuple[int, list[str]]:
    """Run a command of tenpak, with its progress passed on; its exit code, and what else it says on stderr, by line.

    Args:
        command: the command.
        printed: where its stdout goes.
        progress: as that of ``compress``.
    """
    lines = []
    environment = {**os.environ, "TENPAK_PROGRESS": "json"}
    with subprocess.Popen(
        command, stdout=printed, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        assert process.stderr is not None  # it is a pipe
        try:
            for line in process.stderr:
                step = _progress_in(line)
                if step is None:
                    lines.append(line.rstrip("\n"))
                elif progress is not None:
                    progress(*step)
        except BaseException:  # Ctrl-C as well: it must not go on by itself
            process.kill()
            raise
    return process.returncode, [line for line in lines if line.strip()]


def _progress_in(line: str) -> tuple[str, int, int] | None:
    """What a line says of the progress of another process; None where it says something else."""
    try:
        what, done, total = json.loads(line)["progress"]
        return str(what), int(done), int(total)
    except (ValueError, TypeError, KeyError):
        return None

"""Writers of scalars and texts: `metrics.jsonl` and TensorBoard, with the method names of `clu.metric_writers`.

clu's own writers, which need TensorFlow, can therefore be used in their place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from tensorboardX import SummaryWriter


class Writer(Protocol):
    """The part of clu's MetricWriter that a run uses."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records numbers by name."""
        ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Records texts by name."""
        ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Records the settings of a run."""
        ...

    def flush(self) -> None:
        """Writes everything to the disk."""
        ...

    def close(self) -> None:
        """Flushes and closes the files."""
        ...


class JsonlWriter:
    """Writes one JSON object per line: `{"step": 100, "loss": 3.2, ...}`."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Opens the file and drops the lines after `last_step`, which a killed run wrote and this one will write again."""
        kept = [row for row in read_jsonl(path) if row["step"] <= last_step]
        aside = path.with_name(path.name + ".tmp")
        aside.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Does nothing: samples have files of their own."""

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Does nothing: the config has a file of its own."""

    def flush(self) -> None:
        """Passes buffered lines to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """Writes event files for TensorBoard, with tensorboardX."""

    def __init__(self, folder: Path, last_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Adds texts, shown verbatim."""
        for name, text in texts.items():
            self._writer.add_text(name, f"```\n{text}\n```", step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Adds the settings as a table."""
        rows = "\n".join(f"|{name}|{value}|" for name, value in hparams.items())
        self._writer.add_text("config", f"|setting|value|\n|---|---|\n{rows}", 0)

    def flush(self) -> None:
        """Writes queued events."""
        self._writer.flush()

    def close(self) -> None:
        """Writes queued events and closes the file."""
        self._writer.close()


class MultiWriter:
    """Several writers as one."""

    def __init__(self, *writers: Writer) -> None:
        self._writers = writers

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records numbers with each."""
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Records texts with each."""
        for writer in self._writers:
            writer.write_texts(step, texts)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Records settings with each."""
        for writer in self._writers:
            writer.write_hparams(hparams)

    def flush(self) -> None:
        """Flushes each."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Closes each."""
        for writer in self._writers:
            writer.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file, without a last line that a kill cut short; none if there is no file."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return rows

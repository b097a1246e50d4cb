"""What ``fastlm train`` shows while it trains."""

import math

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastlm.train import Trainer


class TrainingDisplay:
    """A progress bar with loss, tokens/s and time left, and a line for each evaluation."""

    def __init__(self, trainer: Trainer, console: Console):
        self.progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn(f"{{task.fields[speed]:,.0f}} {trainer.unit}/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.progress.add_task(
            "train",
            total=trainer.progress.max_steps,
            loss=math.nan,
            speed=0,
            completed=trainer.progress.step,
        )
        self.loss = self.tokens = self.seconds = None

    def __enter__(self) -> "TrainingDisplay":
        self.progress.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.progress.__exit__(*error)

    def report(self, kind: str, values: dict) -> None:
        if kind == "eval":
            self.progress.print(
                f"step {values['step']:>6}   training loss {self.loss:.3f}   validation {_shown(values)}"
            )
            return
        self.loss = _smooth(self.loss, values["loss"])
        self.tokens = _smooth(self.tokens, values["targets"])
        self.seconds = _smooth(self.seconds, values["seconds"])
        self.progress.update(
            self.task,
            completed=values["step"],
            total=values["max_steps"],
            loss=self.loss,
            speed=self.tokens / self.seconds,
        )


def _shown(values: dict) -> str:
    if "accuracy" in values:
        return (
            f"loss {values['loss']:.3f}, accuracy {values['accuracy']:.1%}, macro F1 {values['macro_f1']:.3f}"
        )
    return f"{values['bits_per_byte']:.3f} bits/byte"


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else 0.95 * old + 0.05 * new

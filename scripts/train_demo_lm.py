"""Trains the demo language model: labelled text in, a model folder for transformers out.

    python scripts/train_demo_lm.py --collect collected  # text that this machine has; any will do
    python scripts/train_demo_lm.py --text corpus collected --out demo-model --hours 4
    python scripts/judge_demo_lm.py --text corpus collected --model demo-model --report docs/demo-model.md

`--text`: folders of `<label>.txt` files or `<label>/` folders of them, UTF-8, passages separated by a blank line. One
in twenty documents is held out, by hash, and only measures. `--out` always holds the best model so far by held-out bits
per byte (the mean over labels); what training needs to go on lies in `<out>-state`.

Stop it with Ctrl-C; the same command goes on, and with --steps the result has the same bits as an uninterrupted run's
(same machine and threads). The rate warms up, stays, and falls along a cosine over the last --decay of the run. A later
`--extend` with more --hours or --steps takes a finished model up from where its rate began to fall. `--decay 0` keeps
the rate, for a run that a later one finishes.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from demo_lm_collect import collect
from demo_lm_model import (
    BOS,
    EOS,
    Recipe,
    Shape,
    bits_per_byte,
    check_target,
    document_bits,
    encode,
    save_atomically,
    save_model,
    token_losses,
    train_tokenizer,
)
from demo_lm_text import Document, Sampler, fingerprint, labels, read_documents, spread
from tokenizers import Tokenizer
from torch import nn

from saeforge.errors import CheckpointError, ConfigError, SaeforgeError


@dataclass
class Progress:
    """Where training stands; all of it is saved."""

    step: int = 0
    tokens: int = 0
    origin: int = 0  # the step from which this leg's --steps and --hours count
    seconds: float = 0.0  # trained since `origin`
    decay_start: int = -1  # the step at which the rate begins to fall; -1: not yet fixed
    decay_steps: int = 0
    best: float = math.inf  # bits per byte, mean over labels
    history: list[list[float]] = field(default_factory=list)  # [step, bits per byte]

    @property
    def finished(self) -> bool:
        return self.decay_start >= 0 and self.step >= self.decay_start + self.decay_steps


def rate(recipe: Recipe, progress: Progress) -> float:
    """The learning rate of the coming step."""
    value = recipe.lr * min(1.0, (progress.step + 1) / recipe.warmup)
    if 0 <= progress.decay_start <= progress.step:
        done = (progress.step - progress.decay_start + 1) / (progress.decay_steps + 1)
        value *= 0.5 * (1 + math.cos(math.pi * done))
    return value


class Trainer:
    """One model in training: text, network, optimiser, progress, and the files that they go to."""

    def __init__(
        self, documents: list[Document], recipe: Recipe, out: Path, device: str, eval_bytes: int, micro_batch: int = 8
    ) -> None:
        check_target(out)
        self.recipe, self.out, self.device, self.micro_batch = recipe, out, torch.device(device), micro_batch
        self.state_folder = out.with_name(out.name + "-state")
        self.state_folder.mkdir(parents=True, exist_ok=True)
        self.identity = {"recipe": asdict(recipe), "text": fingerprint(documents)}
        self.progress = Progress()
        state = self._load("state.pt")

        self.tokenizer = self._tokenizer(documents, begun=state is not None)
        training = [document for document in documents if not document.held_out]
        ids = encode(self.tokenizer, [document.text for document in training])
        streams = {}
        for label in labels(documents):
            parts = [[BOS, *part, EOS] for part, doc in zip(ids, training, strict=True) if doc.label == label]
            streams[label] = np.concatenate(parts).astype(np.uint16)
        self.sampler = Sampler(
            streams, bos=BOS, context=recipe.shape.context, temperature=recipe.temperature, seed=recipe.seed
        )
        self.judged = spread([document for document in documents if document.held_out], eval_bytes)
        self.judged_ids = encode(self.tokenizer, [document.text for document in self.judged])

        torch.manual_seed(recipe.seed)
        # Plain products of 256 x 256 beat torch's fused attention on a CPU: 15% of a step there, 2% so.
        self.model = recipe.shape.build("eager" if self.device.type == "cpu" else "sdpa").to(self.device)
        for layer in self.model.model.layers:  # Llama's own dropout is of the attention's weights only
            for part in (layer.self_attn.o_proj, layer.mlp):
                part.register_forward_hook(lambda part, _, out: F.dropout(out, recipe.dropout, part.training))
        # Muon (Jordan et al. 2024; its update scaled as in arXiv:2502.16982, so that one rate suits both) for the
        # layers' matrices, Adam for the rest.
        matrices = [parameter for parameter in self.model.model.layers.parameters() if parameter.ndim > 1]
        scales = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        groups = [
            {"params": [self.model.get_input_embeddings().weight], "weight_decay": 0.1},
            {"params": scales, "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True),
            torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        ]
        if state is not None:
            self._restore(state)

    def step(self) -> float:
        """One update; returns the mean loss in nats per token."""
        recipe = self.recipe
        sequences = max(1, recipe.batch_tokens // recipe.shape.context)
        batch = torch.from_numpy(self.sampler.batch(self.progress.step, sequences))
        torch.manual_seed(recipe.seed * 1_000_003 + self.progress.step)  # of dropout; so it is no state
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate(recipe, self.progress)
        total = torch.zeros((), device=self.device)
        for part in batch.split(self.micro_batch):
            loss = token_losses(self.model, part.to(self.device), autocast=True).sum() / batch[:, 1:].numel()
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += batch[:, 1:].numel()
        value = total.item()
        if not math.isfinite(value):
            raise ConfigError(f"the loss is {value} at step {self.progress.step}: lower --lr, and begin again")
        return value

    def evaluate(self) -> float:
        """Held-out bits per byte, mean over labels; the model goes to `out` if it is the best so far."""
        bits = document_bits(self.model, self.judged_ids, self.recipe.shape.context, autocast=True)
        by_label = bits_per_byte(self.judged, bits)
        mean = sum(by_label.values()) / len(by_label)
        self.progress.history.append([self.progress.step, round(mean, 5)])
        if mean < self.progress.best:
            self.progress.best = mean
            save_model(self.out, self.model, self.tokenizer, self.recipe.shape, self._facts(by_label))
        return mean

    def begin_decay(self, steps: int) -> None:
        """Lets the rate fall over the coming `steps`, and keeps the state for `extend`."""
        self.save("stable.pt")
        self.progress.decay_start, self.progress.decay_steps = self.progress.step, steps

    def extend(self) -> None:
        """Goes back to where the rate began to fall, as a new leg; the best model stays.

        Raises:
            CheckpointError: If that state is missing.
        """
        best, history = self.progress.best, self.progress.history
        state = self._load("stable.pt")
        if state is None:
            raise CheckpointError(f"no {self.state_folder / 'stable.pt'}: nothing to extend, train with another --out")
        self._restore(state)
        progress = self.progress
        progress.best, progress.history, progress.origin, progress.seconds = best, history, progress.step, 0.0
        self.save()

    def save(self, name: str = "state.pt") -> None:
        """Writes everything that training needs to go on."""
        state = {
            "identity": self.identity,
            "progress": asdict(self.progress),
            "used": self.sampler.used,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        save_atomically(state, self.state_folder / name)

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.state_folder / name
        if not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
        for part, said in (("recipe", "other options"), ("text", "other text")):
            if state["identity"][part] != self.identity[part]:
                raise CheckpointError(f"{path} was trained with {said}: give the same ones, or another --out")
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        self.sampler.used = dict(state["used"])
        self.model.load_state_dict(state["model"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)

    def _tokenizer(self, documents: list[Document], begun: bool) -> Tokenizer:
        path = self.state_folder / "tokenizer.json"
        if begun:
            return Tokenizer.from_file(str(path))
        tokenizer = train_tokenizer(documents, self.recipe.shape.vocab_size)
        tokenizer.save(str(path))
        return tokenizer

    def _facts(self, by_label: dict[str, float]) -> dict[str, Any]:
        sizes = {label: len(stream) for label, stream in self.sampler.streams.items()}
        read = {label: used * self.recipe.shape.context for label, used in self.sampler.used.items()}
        return {
            "recipe": asdict(self.recipe),
            "text_sha256": self.identity["text"],
            "step": self.progress.step,
            "tokens": self.progress.tokens,
            "torch": str(torch.__version__),
            "device": self.device.type,
            "labels": {
                label: {"tokens": sizes[label], "epochs": round(read[label] / sizes[label], 2), "bits_per_byte": bits}
                for label, bits in by_label.items()
            },
            "history": self.progress.history,
        }


def train(trainer: Trainer, *, steps: int | None, hours: float | None, decay: float, eval_minutes: float) -> bool:
    """Trains until `steps` or `hours` of this leg are done; False if a signal stopped it."""
    progress, recipe = trainer.progress, trainer.recipe
    stopped = []

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once
        print("stopping after this step; again to stop at once and lose the steps since the last save", flush=True)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    clock = evaluated = reported = time.monotonic()
    losses, first = [], (clock, progress.tokens)
    try:
        while not stopped and not _done(progress, steps, hours):
            pace = progress.seconds / max(1, progress.step - progress.origin)
            if decay > 0 and progress.decay_start < 0:
                if steps is not None and progress.step >= steps - round(decay * (steps - progress.origin)):
                    trainer.begin_decay(steps - progress.step)
                elif hours is not None and progress.seconds >= (1 - decay) * hours * 3600:
                    trainer.begin_decay(max(1, round((hours * 3600 - progress.seconds) / max(pace, 1e-9))))
            losses.append(trainer.step())
            now = time.monotonic()
            progress.seconds, clock = progress.seconds + now - clock, now
            if now - evaluated > eval_minutes * 60:
                trainer.evaluate()
                trainer.save()
                evaluated = time.monotonic()
            if now - reported > 15 or progress.step - progress.origin == 1:
                speed = (progress.tokens - first[1]) / max(now - first[0], 1e-9)
                print(
                    f"step {progress.step}  {progress.tokens / 1e6:.2f}M tokens  loss {np.mean(losses):.3f}  "
                    f"rate {rate(recipe, progress):.1e}  {_held_out(progress)}"
                    f"{speed:,.0f} tokens/s  {_left(progress, steps, hours)} left",
                    flush=True,
                )
                reported, losses = now, []
        trainer.save()
        if not stopped:
            trainer.evaluate()
            trainer.save()
            print(f"step {progress.step}, {_held_out(progress)}in {trainer.out}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return not stopped


def _done(progress: Progress, steps: int | None, hours: float | None) -> bool:
    if progress.decay_start >= 0:
        return progress.finished
    return progress.step >= steps if steps is not None else progress.seconds >= (hours or 0.0) * 3600


def _held_out(progress: Progress) -> str:
    if not progress.history:
        return ""
    return f"held-out {progress.history[-1][1]:.4f} bits/byte (best {progress.best:.4f})  "


def _left(progress: Progress, steps: int | None, hours: float | None) -> str:
    end = progress.decay_start + progress.decay_steps if progress.decay_start >= 0 else steps
    pace = progress.seconds / max(1, progress.step - progress.origin)
    seconds = (end - progress.step) * pace if end is not None else (hours or 0.0) * 3600 - progress.seconds
    minutes = max(0, math.ceil(seconds / 60))
    return f"{minutes // 60}:{minutes % 60:02d} h"


def main(argv: Sequence[str] | None = None) -> int:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape, recipe = Shape(), Recipe()
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="write what this machine has, and end")
    parser.add_argument("--collect-megabytes", type=float, default=3.0, help="at most, of each label")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FOLDER", help="labelled text; labels are joined")
    parser.add_argument("--out", type=Path, help="folder of the model")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--hours", type=float, help="train this long, interruptions not counted (with --extend: longer)"
    )
    length.add_argument("--steps", type=int, help="train up to this step, counted from the very beginning")
    parser.add_argument("--decay", type=float, default=0.25, help="last share of it in which the rate falls to zero")
    parser.add_argument("--extend", action="store_true", help="take a finished model up again")
    parser.add_argument("--eval-minutes", type=float, default=10.0, help="between evaluations; each one also saves")
    parser.add_argument("--eval-bytes", type=int, default=20_000, help="held-out text of each label that they read")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; another number gives other last bits")
    parser.add_argument("--micro-batch", type=int, default=8, help="sequences at once; another number, other dropout")
    for name, value in {**asdict(recipe), **asdict(shape)}.items():
        if name != "shape":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args(argv)
    try:
        if given.collect is not None:
            collect(given.collect, int(given.collect_megabytes * 1e6))
            return 0
        if given.text is None or given.out is None or (given.hours is None and given.steps is None):
            parser.error("give --text, --out, and --hours or --steps (or --collect)")
        if not 0 <= given.decay <= 1:
            raise ConfigError(f"--decay {given.decay}: expected a share between 0 and 1")
        return _run(given)
    except SaeforgeError as error:
        print(f"train_demo_lm.py: error: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace) -> int:
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    shape = Shape(**{name: getattr(given, name) for name in asdict(Shape())})
    options = {name: getattr(given, name) for name in asdict(Recipe()) if name != "shape"}
    documents = read_documents(given.text, given.held_out)
    trainer = Trainer(
        documents, Recipe(shape=shape, **options), given.out, given.device, given.eval_bytes, given.micro_batch
    )
    for label, share in zip(trainer.sampler.streams, trainer.sampler.shares, strict=True):
        size = len(trainer.sampler.streams[label])
        print(f"{label:<12} {size / 1e6:6.2f}M tokens, {share:6.1%} of each batch")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {trainer.device}, from step {trainer.progress.step}", flush=True)
    if trainer.progress.finished:
        if not given.extend:
            raise ConfigError(f"the model in {given.out} is finished: --extend goes on, or give another --out")
        trainer.extend()
        print(f"extending from step {trainer.progress.step}")
    done = train(trainer, steps=given.steps, hours=given.hours, decay=given.decay, eval_minutes=given.eval_minutes)
    return 0 if done else 130  # as a shell reports a process ended by SIGINT


if __name__ == "__main__":
    sys.exit(main())

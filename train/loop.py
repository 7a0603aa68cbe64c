"""The training loop, from a config to a run folder.

    runs/<name>/config.yaml         the resolved configuration, written first
                metrics.jsonl       a line per logged step; tensorboard/ has the same numbers
                events.jsonl        a line per start, end, checkpoint and warning
                checkpoints/        step-000200/ … the last few, to go on from
                model.safetensors   the weights, with config.json, when training ends or is asked to stop

Update ``step`` (1 … steps) depends on the weights, the optimizer's state and ``step`` alone: the batch, the learning
rate and the random seed are functions of it. So a run that is killed and started again by the same command restores the
newest sound checkpoint, cuts the metrics back to it, and repeats the lost steps bit for bit.

The loss is a mean over the valid targets of the whole global batch: each micro batch's *sum* is divided by the number
that all micro batches of all processes hold, so uneven ones weigh as they should in the gradient.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..models import MemoryLM, Output, build
from . import launch, optim, parallel, sequence, sltrain
from .board import GROUP, sample
from .checkpoint import Checkpointer, step_of
from .config import RunConfig
from .data import Corpus
from .events import note, recording
from .examples import ExampleSplit, TaskCorpus, answered
from .interrupt import Interrupt
from .metrics import MetricLog, Progress, Record, peak_flops, peak_memory, read_metrics
from .mixture import MixtureSplit
from .parallel import World
from .recovery import TrainingDiverged, heed
from .schedules import rate_of
from .spikes import Verdict, Watch, update_unless
from .split import IGNORE, Batch, Split, derive

__all__ = ["Run", "Summary", "TrainingDiverged", "train"]

logger = logging.getLogger("palimpsest.train")

SAMPLE = 64
"""Tokens of a text that a model writes as training goes."""


@dataclass(frozen=True)
class Summary:
    """How a call of :func:`train` ended: ``complete``, or ``stopped`` by a signal (then run it again)."""

    folder: Path
    status: str
    step: int
    resumed_from: int
    loss: float | None
    validation_loss: float | None
    seconds: float


def train(config: RunConfig, listener: Callable[[Record], None] | None = None) -> Summary:
    """Train, or go on training, until ``train.steps`` updates are done; called by every process of the run.

    Args:
        listener: called in the first process with each record that goes to metrics.jsonl.

    Raises:
        ConfigMismatch: the run folder or the checkpoint belongs to another config; names the differing keys.
        ConfigError: keys that do not fit this machine or number of processes.
        DataError: a corpus that cannot be used.
        TrainingDiverged: after ``train.max_bad_steps`` bad steps in a row, or as ``train.faults`` says.
    """
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    world = parallel.start(config.train.device)
    if world.device.type == "cpu":
        launch.keep_freed_memory()
    try:
        with launch.hold(config.folder, world), recording(config.folder, world.first):
            return _train(config, world, listener)
    finally:
        parallel.stop(world)


def _train(config: RunConfig, world: World, listener: Callable[[Record], None] | None) -> Summary:
    begin = time.monotonic()
    settings, folder = config.train, config.folder
    settings.micro_batches(world.size)  # refuses a batch that does not divide, before anything is written
    launch.claim(folder, config, world)
    saver = Checkpointer(folder / "checkpoints", settings.keep_last, config.plain()["model"], launch.complete_model)
    saver.clean()
    newest = saver.latest_valid()
    if newest is not None and step_of(newest) >= settings.steps and (folder / "model.safetensors").exists():
        logger.info("%s is already complete: %d steps", folder, settings.steps)
        last = (read_metrics(folder) or [{}])[-1]
        losses = last.get("loss"), last.get("validation_loss")
        return Summary(folder, "complete", settings.steps, settings.steps, *losses, time.monotonic() - begin)

    corpus = launch.corpus(config, world)
    core, model, optimizer = launch.model(config, world)
    extra = launch.restore(saver, newest or launch.origin(config), model, optimizer, corpus)
    start = extra["step"]
    note("resume" if start else "start", start, processes=world.size, device=str(world.device))
    metrics = MetricLog(folder, start, settings.tensorboard, listener) if world.first else None
    with (
        Interrupt() as interrupt,
        Progress(settings.steps, start, silent=not world.first) as progress,
        contextlib.closing(saver),  # whatever happens, what is being written is written to its end
    ):
        run = Run(config, world, folder, core, model, optimizer, corpus, saver, metrics, progress, interrupt)
        run.start = start
        run.resume(extra)
        run.loop()
        stopped = run.step < settings.steps
        if stopped:  # the state first: who asks to stop may not wait long
            run.save()
            run.export()
        else:  # the weights first: a checkpoint of the last step means that all is there
            run.export()
            run.save()
    if metrics is not None:
        metrics.close()
    status = "stopped" if stopped else "complete"
    seconds = time.monotonic() - begin
    note(status, run.step, seconds=round(seconds, 3))
    return Summary(folder, status, run.step, start, run.loss, run.validation_loss, seconds)


class Run:
    """One run in one process: what the loop works on, and where it stands."""

    def __init__(
        self,
        config: RunConfig,
        world: World,
        folder: Path,
        core: MemoryLM,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        corpus: Corpus | TaskCorpus,
        saver: Checkpointer,
        metrics: MetricLog | None,
        progress: Progress,
        interrupt: Interrupt,
    ):
        self.config, self.settings, self.world, self.folder = config, config.train, world, folder
        self.core, self.model, self.optimizer = core, model, optimizer
        self.corpus, self.saver, self.metrics, self.progress = corpus, saver, metrics, progress
        self.interrupt = interrupt
        self.split = corpus.split("train")
        self.held_out = launch.validation(corpus, config)
        self.micro_batches, self.micro_size = self.settings.micro_batches(world.size)
        self.start = self.step = self.bad = self.rollbacks = 0
        self.watch = Watch(self.settings.faults, world.device)
        self.skipped: list[int] = []  # steps whose update was not done, or was undone
        self.last: Verdict | None = None
        self.loss: float | None = None
        self.validation_loss: float | None = None
        self.sequence = sequence.start(config, world, core, model)
        self.read: Callable[..., Any] = model if self.sequence is None else self.sequence.read
        self.autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=self.settings.precision != "fp32")
        self.flops = core.flops_per_token(self.settings.seq_len)
        self.peak = peak_flops(world.device, self.settings.precision)

    def resume(self, extra: Record) -> None:
        """Stand where a checkpoint's ``extra`` says that it was."""
        self.step = extra["step"]
        self.bad, self.rollbacks = extra.get("bad", 0), extra.get("rollbacks", 0)
        self.skipped = list(extra.get("skipped", []))
        self.watch.restore(extra.get("statistics"))

    def loop(self) -> None:
        """Update until the last step is done or somebody asks to stop."""
        settings = self.settings
        tokens, busy = 0, 0.0  # since the last record
        while self.step < settings.steps:
            begin = time.perf_counter()
            batches, valid, stop = self.fetch(self.step + 1)
            if stop:
                heed(self)
                logger.warning("asked to stop: saving after step %d", self.step)
                return
            self.step += 1
            rate = self.update(batches, valid)
            tokens += sum(batch.tokens.numel() for batch in batches) * self.world.size
            log, diagnose, validate, save = map(self.due, ("log", "diagnostics", "validate", "checkpoint"))
            back = heed(self, 0 if log or diagnose or validate or save else self.watch.lag)
            busy += time.perf_counter() - begin
            if back:
                tokens, busy = 0, 0.0
                continue
            speed = tokens / busy

            loss, norm = (math.nan, math.nan) if self.last is None else (self.last.loss, self.last.norm)
            record: Record = {"step": self.step, "loss": loss, "lr": rate, "grad_norm": norm}
            if diagnose:
                record |= self.diagnose(self.share(self.split, self.step - 1, whole=True)[0])
            if validate and self.held_out is not None:
                record |= self.validate(self.held_out)
                self.write_sample()
            if log or len(record) > 4:
                record |= {"tokens_per_second": speed, "peak_memory": peak_memory(self.world.device)}
                if self.peak is not None:
                    record["mfu"] = speed * self.flops / (self.peak * self.world.size)
                if self.metrics is not None:
                    self.metrics.write(record)
                tokens, busy = 0, 0.0
            self.progress.show(record, speed, log)
            if save and not self.bad:
                self.rollbacks = 0
                self.save(background=settings.async_checkpoint)

    def due(self, what: str) -> bool:
        """Whether something that is done every so many steps is done now: log, diagnostics, validate, checkpoint."""
        last = self.step == self.settings.steps
        every = getattr(self.settings, f"{what}_every")
        if what == "checkpoint":
            return _due(self.step, every) and not last  # the last one is written when the weights are
        if what == "validate":
            return self.held_out is not None and (_due(self.step, every) or last)
        return _due(self.step, every) or (what == "log" and last)

    def fetch(self, step: int) -> tuple[list[Batch], int, bool]:
        """This process's micro batches of a step, the valid targets in those of all processes, and whether to stop."""
        batches = self.share(self.split, step - 1)
        valid = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        # One small collective on the CPU: the count, and anybody's wish to stop, so that all stop at the same step.
        counts = parallel.total(torch.tensor([valid, int(self.interrupt.asked)]))
        return batches, int(counts[0]), bool(counts[1])

    def share(self, split: Split | ExampleSplit, index: int, *, whole: bool = False) -> list[Batch]:
        """This process's rows of the global batch ``index``, in micro batches, in main memory; its part of them where
        processes share sequences, unless they are wanted ``whole``."""
        settings, size = self.settings, self.micro_size
        shape = {"batch_size": settings.batch_size, "seq_len": settings.seq_len}
        first = self.world.rank // settings.sequence_parallel * self.micro_batches * size
        rows = [range(first + i * size, first + (i + 1) * size) for i in range(self.micro_batches)]
        batches = [split.batch(index, seed=self.config.seed, rows=some, **shape) for some in rows]
        # What a model must not be judged by is no target.
        batches = [b._replace(targets=self.core.counted(b.targets, None, b.cu_seqlens)) for b in batches]
        return batches if self.sequence is None or whole else [self.sequence.cut(batch) for batch in batches]

    def update(self, batches: list[Batch], valid: int) -> float:
        """One optimizer update from the micro batches, which the device leaves out if the step is bad; returns its
        learning rate. Nothing here waits for the device."""
        settings, step = self.settings, self.step
        torch.manual_seed(derive(self.config.seed, step, self.world.rank) >> 1)
        rate = rate_of(settings, step)
        self.optimizer.zero_grad()
        loss_sum = torch.zeros((), device=self.world.device)
        if self.sequence is not None:
            loss_sum += self.sequence.gradients(self, batches, valid)
        for index, batch in enumerate(batches if self.sequence is None else []):
            with parallel.accumulate(self.model, last=index == len(batches) - 1, sharded=True):
                loss_sum += self.backward(batch, valid)
        loss = parallel.total(loss_sum).double() / max(valid, 1)
        norm = optim.clip(self.model.parameters(), settings.grad_clip)
        bad = self.watch.judge(step, loss, norm)
        optim.set_learning_rate(self.optimizer, rate)
        update_unless(bad, self.optimizer)
        return rate

    def backward(self, batch: Batch, valid: int) -> Tensor:
        """Add one micro batch's share of the gradient; returns its loss, summed over its targets."""
        with self.autocast:
            output = self.forward(batch)
        assert output.loss_sum is not None  # it is there whenever there are targets
        self.objective(output, valid).backward()
        return output.loss_sum.detach()

    def objective(self, output: Output, valid: int) -> Tensor:
        """A micro batch's share of what is minimised."""
        assert output.loss_sum is not None
        # ddp and fsdp take the mean of the processes' gradients; what is wanted is their sum. Further losses are means.
        whole = output.loss_sum * (self.world.size / max(valid, 1))
        return whole + sum(output.aux.values()) / self.micro_batches

    def forward(self, batch: Batch, **options: Any) -> Output:
        """The model's answer to a batch with its targets."""
        batch = parallel.to_device(batch, self.world.device)
        return self.read(batch.tokens, cu_seqlens=batch.cu_seqlens, targets=batch.targets, **options)

    def diagnose(self, batch: Batch) -> Record:
        """What the memory layers do on a few rows of this step's batch, {} for a model without memory; of every token
        as histograms on TensorBoard."""
        tokens = batch.tokens[:4, : self.settings.seq_len].to(self.world.device)
        with parallel.evaluation(self.core), self.autocast, torch.compiler.set_stance("force_eager"):
            found = dict(self.core.diagnostics(tokens))
            each = self.core.observe(tokens) if self.settings.tensorboard else {}
        if self.metrics is not None and self.metrics.board is not None:
            self.metrics.board.histograms(each, self.step)
        return found

    def write_sample(self) -> None:
        """A text by the model as it is, on TensorBoard; nothing of a task, whose tokens are none."""
        if not self.settings.tensorboard or not isinstance(self.corpus, Corpus):
            return
        tokenizer, prompt = self.corpus.tokenizer, self.config.eval.prompt
        ids = [tokenizer.separator, *tokenizer.encode(prompt)]
        with parallel.evaluation(self.core), self.autocast, torch.compiler.set_stance("force_eager"):
            seed = derive(self.config.seed, self.step, 4) >> 1
            said = sample(self.core, ids, SAMPLE, seed, tokenizer.vocab_size)
        if self.metrics is not None and self.metrics.board is not None:
            self.metrics.board.text("sample", prompt + tokenizer.decode(said), self.step)

    def validate(self, split: Split | ExampleSplit) -> Record:
        """Held-out loss (nats per token) and bits per byte, on the same first batches each time; or, of a task, the
        share of right answers to all of its examples."""
        if isinstance(split, MixtureSplit):
            return self.validate_each(split)
        settings = self.settings
        count = split.batches(batch_size=settings.batch_size, seq_len=settings.seq_len)
        if isinstance(split, Split):
            count = min(settings.validation_batches, count)
        spans = _groups_of(split, settings.batch_size)
        # Of each group: nats, targets, bytes, right answers.
        sums = torch.zeros(len(spans), 4, dtype=torch.float64, device=self.world.device)
        with parallel.evaluation(self.model), self.autocast:
            for number, batch in ((i, batch) for i in range(count) for batch in self.share(split, i)):
                output = self.forward(batch, reduction="none")
                assert output.loss is not None and output.valid is not None
                size = split.bytes_of(batch.targets).sum().to(sums)
                right = torch.zeros_like(size)
                if isinstance(split, ExampleSplit):
                    batch = batch.to(self.world.device)
                    right = answered(self.read(batch.tokens, return_state=False).logits, batch.targets)[0]
                place = next(i for i, (_, stop) in enumerate(spans) if number < stop)
                sums[place] += torch.stack([output.loss.double().sum(), output.valid.double(), size, right.double()])
        sums = parallel.total(sums)
        nats, valid, size, right = sums.sum(0).tolist()
        self.validation_loss = nats / max(valid, 1)
        if isinstance(split, ExampleSplit):
            share = right / max(valid, 1)
            self.progress.say(f"step {self.step}  validation loss {self.validation_loss:.4f}  {share:.4f} right")
            rows = zip(spans, sums.tolist(), strict=True)
            each = {f"{GROUP}{name}": row[3] / row[1] for (name, _), row in rows if row[1]}
            return {"validation_loss": self.validation_loss, "validation_accuracy": share, **each}
        bits = nats / math.log(2) / max(size, 1)
        self.progress.say(f"step {self.step}  validation loss {self.validation_loss:.4f}  {bits:.4f} bits per byte")
        return {"validation_loss": self.validation_loss, "validation_bits_per_byte": bits}

    def validate_each(self, mixture: MixtureSplit) -> Record:
        """``validate`` of every component of a mixture, and the mean of the components' losses by their shares."""
        record: Record = {}
        loss = bits = 0.0
        for (label, part), share in zip(mixture.parts.items(), mixture.shares, strict=True):
            self.progress.say(f"validation of {label}, {float(share):.3g} of the mixture")
            found = self.validate(part)
            record |= {f"{key}/{label}": value for key, value in found.items()}
            loss += float(share) * found["validation_loss"]
            bits += float(share) * found["validation_bits_per_byte"]
        self.validation_loss = loss
        return record | {"validation_loss": loss, "validation_bits_per_byte": bits}

    def save(self, background: bool = False) -> None:
        """Write a checkpoint of this step, unless it is there or the weights are not finite.

        Args:
            background: copy the state now, and have a thread write it while training goes on.
        """
        self.saver.wait()
        if self.step == self.saver.saved or not self.optimizer.state:
            return
        if not optim.all_finite(self.model.parameters()):
            logger.error("weights after step %d are not finite: no checkpoint is written", self.step)
            return
        if self.metrics is not None:
            self.metrics.sync()
        extra = {"seed": self.config.seed, "corpus": self.corpus.checksum, "statistics": self.watch.state()}
        extra |= {"skipped": self.skipped, "bad": self.bad, "rollbacks": self.rollbacks}
        save = self.saver.save_later if background else self.saver.save
        save(self.step, self.model, self.optimizer, extra)

    def export(self) -> None:
        """Write model.safetensors and config.json: whole weights, whatever the run was spread over."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        if self.world.first:
            with torch.device("meta"):
                whole = build(self.config.plain())
            whole.load_state_dict(sltrain.dense(self.core, weights), assign=True)
            whole.save(self.folder, self.config.plain())
        parallel.broadcast(None)


def _groups_of(split: Split | ExampleSplit, batch_size: int) -> list[tuple[str, float]]:
    """The groups of a task's validation by name, each with the number of the first batch behind it; else one of all."""
    if isinstance(split, Split):
        return [("", math.inf)]
    found, stop = [], 0
    for group in split.groups:
        stop += -(-group.count // batch_size)
        found.append((group.name, float(stop)))
    return found


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

"""What the loop does when the verdict on a step is bad: leave it skipped, go back to a checkpoint, or stop."""

import logging
from typing import TYPE_CHECKING

from .spikes import NOT_FINITE, Verdict

if TYPE_CHECKING:
    from .loop import Run

logger = logging.getLogger("palimpsest.train")


class TrainingDiverged(RuntimeError):
    """A loss or gradient was bad, and ``train.faults`` or ``train.max_bad_steps`` says to stop; names the step."""


def heed(run: "Run", lag: int = 0) -> bool:
    """Act on the verdicts on all steps but the newest ``lag``; called by all processes at the same steps.

    Returns:
        True when the run went back to a checkpoint.

    Raises:
        TrainingDiverged: as ``train.faults`` and ``train.max_bad_steps`` say.
    """
    faults = run.settings.faults
    for verdict in run.watch.read(lag):
        run.last = verdict
        if not verdict.kind:
            run.bad, run.loss = 0, verdict.loss
            continue
        run.bad += 1
        name = "nonfinite" if verdict.kind == NOT_FINITE else "spike"
        policy = getattr(faults, name)
        if policy == "stop":
            _give_up(run, verdict, f"train.faults.{name} is stop")
        most = run.settings.max_bad_steps
        if policy == "rollback" and run.bad < most and _roll_back(run, verdict):
            return True
        run.skipped.append(verdict.step)
        logger.warning("%s: the update is skipped (%d in a row)", verdict, run.bad)
        if run.bad >= most:
            what = "not finite" if verdict.kind == NOT_FINITE else "bad"
            _give_up(run, verdict, f"the last {run.bad} steps were {what} (train.max_bad_steps = {most})")
    return False


def _give_up(run: "Run", verdict: Verdict, why: str) -> None:
    if run.metrics is not None:
        run.metrics.write({"step": verdict.step, "loss": verdict.loss, "grad_norm": verdict.norm})
    run.saver.wait()
    saved = max(run.saver.saved, run.start)
    raise TrainingDiverged(f"{verdict}: {why}; stopped, with nothing saved since step {saved}")


def _roll_back(run: "Run", verdict: Verdict) -> bool:
    """Put the newest sound checkpoint's weights, optimizer and statistics back, as the state after the bad step.

    Batches belong to steps, so those since the checkpoint are passed over: the cause of a spike is seldom its own batch
    alone (Chowdhery et al., PaLM, 2022, section 5.1, skip a few hundred batches in the same way). The state is saved at
    once, with the steps that it lacks: a run that is killed now goes on from here and not through the spike again.
    """
    run.saver.wait()
    path = run.saver.latest_valid()
    if path is None:
        logger.warning("%s: there is no checkpoint to go back to", verdict)
        return False
    limit = run.settings.faults.max_rollbacks
    if run.rollbacks >= limit:
        _give_up(run, verdict, f"after {run.rollbacks} rollbacks (train.faults.max_rollbacks = {limit})")
    bad, rollbacks = run.bad, run.rollbacks + 1
    extra = run.saver.restore(path, run.model, run.optimizer)
    run.resume(extra)
    run.skipped += range(extra["step"] + 1, verdict.step + 1)
    run.step, run.bad, run.rollbacks = verdict.step, bad, rollbacks
    logger.warning(
        "%s: back to the weights of step %d; the batches of steps %d to %d are not seen again (rollback %d of %d)",
        verdict, extra["step"], extra["step"] + 1, verdict.step, rollbacks, limit,
    )  # fmt: skip
    if run.metrics is not None:
        told = {"loss": verdict.loss, "grad_norm": verdict.norm, "rolled_back_to": extra["step"]}
        run.metrics.write({"step": verdict.step, **told})
    run.save()
    return True

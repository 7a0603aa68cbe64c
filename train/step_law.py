"""Learning rate and batch size that a scaling law suggests: ``python -m palimpsest.train.step_law CONFIG key=value …``.

The law ("Predictable Scale: Part I", Li et al., 2025, arXiv 2503.04715) was fitted to AdamW's best peak learning rate
and batch size over some thousand trainings of transformers: η = 1.79 N^−0.713 D^0.307, B = 0.58 D^0.571 tokens; N
parameters without embedding and head, D tokens read. It says nothing of other architectures or optimizers, and outside
of the sizes that it was fitted on it is an extrapolation, which the command says.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..models.config import ConfigError
from ..models.describe import outline
from .config import RunConfig, parse_overrides, read_config
from .optim import outer_matrices

PARAMETERS = (2.1e8, 1.08e9)
TOKENS = (4e9, 1e11)
"""The sizes of the dense models in the measurements that the authors published (github.com/step-law/steplaw)."""


def learning_rate(parameters: float, tokens: float) -> float:
    """η = 1.79 N^−0.713 D^0.307, the peak of the schedule."""
    return 1.79 * parameters**-0.713 * tokens**0.307


def batch_tokens(tokens: float) -> float:
    """B = 0.58 D^0.571, in tokens per update."""
    return 0.58 * tokens**0.571


@dataclass(frozen=True)
class Advice:
    """What the law says of a config: ``parameters`` N and ``tokens`` D as above, and the config's own choice."""

    parameters: int
    tokens: int
    lr: float
    batch: float
    """Tokens per update."""
    own_lr: float
    own_batch: int
    seq_len: int
    optimizer: str

    @property
    def beyond(self) -> list[str]:
        """N and D where they lie outside of what the law was fitted on."""
        spans = (("N", self.parameters, PARAMETERS), ("D", self.tokens, TOKENS))
        return [f"{name} = {x:.3g} (fitted: {a:.3g} to {b:.3g})" for name, x, (a, b) in spans if not a <= x <= b]

    def text(self) -> str:
        """All of it, for a terminal."""
        rows = max(1, round(self.batch / self.seq_len))
        steps = max(1, round(self.tokens / (rows * self.seq_len)))
        lines = [
            f"N  {self.parameters:,} parameters without embedding and head",
            f"D  {self.tokens:,} tokens",
            f"learning rate     law {self.lr:.3g}   config {self.own_lr:.3g}, {self.own_lr / self.lr:.3g} of the law's",
            f"tokens per batch  law {self.batch:,.0f}   config {self.own_batch:,}, "
            f"{self.own_batch / self.batch:.3g} of the law's",
            f"as keys           train.lr={self.lr:.3g} train.batch_size={rows} train.steps={steps}",
        ]
        if self.beyond:
            lines.append(f"an extrapolation: {'; '.join(self.beyond)}")
        if self.optimizer != "adamw":
            lines.append(f"the law is AdamW's; this config has train.optimizer {self.optimizer}")
        return "\n".join(lines)


def advise(config: RunConfig) -> Advice:
    """The law on a config, whose model is not built in memory."""
    model, settings = outline(config.model), config.train
    outer = outer_matrices(model)
    parameters = sum(p.numel() for p in model.parameters() if id(p) not in outer)
    batch = settings.batch_size * settings.seq_len
    tokens = settings.steps * batch
    law = learning_rate(parameters, tokens), batch_tokens(tokens)
    return Advice(parameters, tokens, *law, settings.lr, batch, settings.seq_len, settings.optimizer)


def main(words: Sequence[str] | None = None) -> int:
    """Print the advice; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a YAML file, or a name inside the package's configs, like 170m/titans_mag")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like train.steps=500 model.dim=64")
    options = parser.parse_args(words)
    try:
        print(advise(read_config(options.config, parse_overrides(options.overrides))).text())
    except (ConfigError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

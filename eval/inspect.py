"""Look into a trained model's memories: ``python -m palimpsest.eval.inspect RUN --text FILE`` writes one HTML page.

The page shows the text token by token, coloured by what is chosen: the loss, how much a token surprised a memory (the
inner loss before it is written), the gates, or which memories a router gave it. It loads nothing and needs no network.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import record
from .harness import Run, open_run, pick_device, reported
from .inspect_page import page

DIGITS = 5  # of each number on the page


def pieces(run: Run, tokens: Sequence[int]) -> list[str]:
    """The text of each token; bytes that are part of a character are written as such."""
    found = []
    for token in tokens:
        text = run.tokenizer.decode([token])
        found.append(f"⟨{token}⟩" if "\ufffd" in text else text)
    return found


def channel(name: str, value: Tensor) -> dict[str, Any]:
    """One thing to look at, for the page: ``values`` [T], or ``shares`` [M][T]."""
    value = value[0].float().cpu()
    if value.dim() == 2:
        return {"name": name, "shares": [[round(x, DIGITS) for x in row] for row in value.T.tolist()]}
    return {"name": name, "values": [round(x, DIGITS) for x in value.tolist()]}


@torch.no_grad()
def look(run: Run, ids: Sequence[int]) -> dict[str, Any]:
    """What the page shows of a text's tokens: their own texts, and the channels.

    Raises:
        ValueError: for a text of less than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"text had {len(ids)} tokens; it must have at least two")
    tokens = torch.tensor([list(ids)], device=run.device)
    loss, _ = run.model.per_token_loss(tokens[:, :-1], tokens[:, 1:])
    first = torch.full_like(loss[:, :1], torch.nan)  # nothing comes before the first token
    channels = [channel("loss (nats)", torch.cat([first, loss], 1))]
    channels += [channel(name, value) for name, value in run.model.observe(tokens).items()]
    return {"run": run.config.name, "tokens": pieces(run, ids), "channels": channels}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest-inspect", description=__doc__.splitlines()[0])
    made.add_argument("run", help="run folder, with model.safetensors, config.json and config.yaml")
    made.add_argument("--text", required=True, help="the file to read; - reads standard input")
    made.add_argument("--tokens", type=int, default=2048, help="at most so many from its beginning (default 2048)")
    made.add_argument("--out", help="the page (default: inspect.html in the run folder)")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Read the text, write the page, say where it is; 0 when done, 2 for bad input."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        if args.tokens < 2:
            raise ValueError(f"--tokens was {args.tokens}; it must be at least 2")
        run = open_run(args.run, pick_device(args.device))
        text = sys.stdin.buffer.read() if args.text == "-" else Path(args.text).read_bytes()
        ids = run.tokenizer.encode(text)[: args.tokens]
        found = look(run, ids)
        out = Path(args.out) if args.out else run.folder / "inspect.html"
        record.write_text(out, page(found))
        print(out)
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())

"""Look into a trained model's memories: ``python -m palimpsest.eval.inspect RUN --text FILE`` writes one HTML page.

The page shows the text token by token, coloured by what is chosen: the loss, how much a token surprised a memory (the
inner loss before it is written), the gates, which memories a router gave it, or which chunks it reads. Below stands
what each memory returns when a token is asked for again later: on average by distance, and for the token that is
clicked. The page loads nothing and needs no network.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.recall import recall
from . import record
from .harness import Run, open_run, pick_device, reported
from .inspect_page import page

DIGITS = 5  # of each number on the page
MARKS = 32  # places of the text at which every memory is asked for every token


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


def curve(cosines: Tensor, marks: Sequence[int]) -> list[dict[str, float]]:
    """Recall against distance: of ``cosines`` [marks, T] the mean over all tokens and marks whose distance lies in
    [1, 2), [2, 4), [4, 8) … tokens, and, at distance 0, over all before the token was written.

    The distance of token t from mark n is n − t: 1 right after it was written. ``pairs`` is how many there are.
    """
    distance = torch.tensor(marks)[:, None] - torch.arange(cosines.shape[1])
    spans = [(-cosines.shape[1], 1)]
    while spans[-1][1] <= cosines.shape[1]:
        spans.append((spans[-1][1], 2 * spans[-1][1]))
    found = []
    for low, high in spans:
        inside = cosines.cpu()[(distance >= low) & (distance < high)]
        if len(inside):
            mean = round(inside.mean().item(), DIGITS)
            found.append({"from": max(low, 0), "to": high - 1, "recall": mean, "pairs": len(inside)})
    return found


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
    marks = [round(i * len(ids) / MARKS) for i in range(MARKS + 1)] if len(ids) >= MARKS else list(range(len(ids) + 1))
    recalled = {
        name: {"cosines": [[round(x, DIGITS) for x in row] for row in found.tolist()], "curve": curve(found, marks)}
        for name, found in recall(run.model, tokens, marks).items()
    }
    return {
        "run": run.config.name,
        "tokens": pieces(run, ids),
        "channels": channels,
        "marks": marks,
        "recall": recalled,
    }


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

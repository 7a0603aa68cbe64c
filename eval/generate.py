"""Have a trained model write: ``python -m palimpsest.eval.generate RUN --prompt "def "``."""

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .harness import open_run, pick_device, reported
from .sampling import Sampling, Session

LONGEST_CHARACTER = 4  # bytes of a character in UTF-8


def generate(
    model: Any,
    tokens: Sequence[int] | Tensor,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to ``max_tokens`` tokens that follow ``tokens`` (ids, [T]), one as soon as it is chosen.

    One prefill of the whole prompt, then forwards of length 1 with the carried state. See
    :class:`palimpsest.eval.sampling.Sampling` for the choice, and its ``Session`` for one that can be saved.

    Raises:
        ValueError: for an empty prompt, a token outside the vocabulary, or a sampling value out of its range.
    """
    session = Session(model, Sampling(temperature, top_k, top_p, seed))
    session.read(tokens.tolist() if isinstance(tokens, Tensor) else tokens)
    if not session.unread:
        raise ValueError("prompt was empty; it must have at least one token")
    return session.write(max_tokens, stop)


class Printer:
    """Turns tokens into text as they come; bytes of an unfinished character wait for the rest of it.

    ``waiting`` are the tokens whose text has not been given yet.
    """

    def __init__(self, tokenizer: Any, waiting: Sequence[int] = ()) -> None:
        self.tokenizer, self.waiting = tokenizer, list(waiting)
        self._before: list[int] = []

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self.waiting.append(token)
        text = self._text(len(self.waiting))
        if not text.endswith("\ufffd"):
            return self._give(len(self.waiting))
        if len(self.waiting) < LONGEST_CHARACTER:
            return ""
        # Not the beginning of any character: give the first piece that reads the same without the rest.
        decode = self.tokenizer.decode
        whole = decode(self.waiting)
        cuts = range(1, len(self.waiting))
        alone = (cut for cut in cuts if decode(self.waiting[:cut]) + decode(self.waiting[cut:]) == whole)
        return self._give(next(alone, len(self.waiting)))

    def flush(self) -> str:
        """The text of what still waits, incomplete or not."""
        return self._give(len(self.waiting)) if self.waiting else ""

    def _text(self, count: int) -> str:
        # Decoded behind the tokens before them: a subword tokenizer drops the space of a text's first word.
        known = self.tokenizer.decode(self._before)
        return self.tokenizer.decode(self._before + self.waiting[:count])[len(known) :]

    def _give(self, count: int) -> str:
        text = self._text(count)
        self._before, self.waiting = self.waiting[:count], self.waiting[count:]
        return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser("palimpsest-generate", description=__doc__)
    made.add_argument("run", help="run folder, with model.safetensors, config.json and config.yaml")
    made.add_argument("--prompt", help="text to go on from; - reads it from standard input")
    made.add_argument("--max-tokens", type=int, default=256, help="how many tokens to write (default 256)")
    made.add_argument("--temperature", type=float, help="0 is greedy (default 1)")
    made.add_argument("--top-k", type=int, help="only the k likeliest tokens")
    made.add_argument("--top-p", type=float, help="only the likeliest tokens that together reach this probability")
    made.add_argument("--seed", type=int, help="of the draws (default 0)")
    made.add_argument("--save-state", metavar="FILE", help="afterwards, write what is needed to go on")
    made.add_argument("--load-state", metavar="FILE", help="go on from there; its sampling is kept unless given anew")
    made.add_argument("--past-end", action="store_true", help="write on when a document ends")
    made.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return made


def begin(args: argparse.Namespace, model: Any, tokenizer: Any) -> Session:
    """The session of a command line: loaded or new, with the prompt to read.

    Raises:
        ValueError: for an empty prompt, or none at all without a state to go on from.
    """
    if args.max_tokens < 1:
        raise ValueError(f"--max-tokens was {args.max_tokens}; it must be at least 1")
    names = ("temperature", "top_k", "top_p", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    prompt = sys.stdin.buffer.read().decode("utf-8") if args.prompt == "-" else args.prompt
    if args.load_state is None and prompt is None:
        raise ValueError("--prompt was not given; it must be, or else --load-state")
    if prompt == "":
        raise ValueError("--prompt was empty; it must have at least one character")
    session = Session.load(args.load_state, model, **given) if args.load_state else Session(model, Sampling(**given))
    session.read(tokenizer.encode(prompt) if prompt else [])
    return session


def main(argv: Sequence[str] | None = None) -> int:
    """Write to standard output as it comes; 0 when done, 2 for bad input, 130 when interrupted (the state is saved)."""
    args = parser().parse_args(argv)
    with reported() as outcome:
        run = open_run(args.run, pick_device(args.device))
        session = begin(args, run.model, run.tokenizer)
        printer = Printer(run.tokenizer, session.unprinted)
        stop = () if args.past_end else (run.tokenizer.separator,)
        try:
            for token in session.write(args.max_tokens, stop):
                _say(printer.push(token))
        except KeyboardInterrupt:
            outcome.code = 130
        if args.save_state:
            session.unprinted = printer.waiting
            session.save(Path(args.save_state))
        else:
            _say(printer.flush())
        _say("" if args.save_state else "\n")
    return outcome.code


def _say(text: str) -> None:
    """UTF-8 whatever the terminal's locale; a lone surrogate cannot come out of ``decode``."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    raise SystemExit(main())

"""A trained run as a model of the lm-evaluation-harness (the extra ``lm-eval``), under the name ``palimpsest``::

    import palimpsest.eval.lm_eval_model
    lm_eval.simple_evaluate("palimpsest", {"run": "runs/mine"}, tasks=["lambada_openai"])

or, in one command, :mod:`palimpsest.eval.lm_eval`.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

from ..models import State
from ..models.state import take_rows
from .harness import Run, open_run, pick_device
from .sampling import Sampling, choose

PIECE = 512  # tokens of each row read at a time: one [batch, piece, vocabulary] of logits, whatever a text's length
MOST = 256  # tokens written where a task does not say
Pair = tuple[tuple[str, str], list[int], list[int]]


@register_model("palimpsest")
class RunLM(TemplateLM):
    """What the harness asks of a run.

    A text is read whatever its length, in pieces with the state carried on: nothing is ever cut off, and no window
    slides. Each text begins with the document separator, as those of a corpus do. Rows of a batch are of nearly one
    length.

    Args:
        run: an opened run, or its folder. batch_size: texts side by side. device: as the commands take it.

    Raises:
        ValueError: for a batch size that is no number, or a run that was trained on no text.
    """

    def __init__(self, run: Run | str, batch_size: int | str = 8, device: str = "auto", **unused: Any) -> None:
        super().__init__()
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ValueError(f"batch_size was {batch_size!r}; it must be a whole number, at least 1")
        self.run = run if isinstance(run, Run) else open_run(run, pick_device(device))
        self.model, self.text, self.batch = self.run.model, self.run.tokenizer, int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """The separator of documents."""
        return self.text.separator

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells kept requests apart."""
        return self.text.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text; none are added."""
        return self.text.encode(string)

    # -- likelihoods ---------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: list[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._scores([(context, told) for _, context, told in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text in nats, after a separator."""
        return [total for total, _ in self._scores([([], self.tok_encode(item.args[0])) for item in requests])]

    @torch.no_grad()
    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """For each (context, continuation) log p(continuation | context) in nats, and whether each of its tokens is the
        likeliest."""
        if self.model.hmt is not None and self.model.hmt.recall_by == "half":
            raise ValueError("hmt.recall of the model was 'half', which sees tokens before it says them; it must not")
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        rows = [self._opened(context) + told for context, told in pairs]
        for chosen in self._batches([len(row) for row in rows]):
            longest = max(len(rows[i]) for i in chosen)
            tokens = torch.zeros(len(chosen), longest, dtype=torch.int64)
            targets = torch.full_like(tokens, -1)
            for j, i in enumerate(chosen):
                tokens[j, : len(rows[i])] = torch.tensor(rows[i])
                start = len(rows[i]) - len(pairs[i][1])
                targets[j, start - 1 : len(rows[i]) - 1] = tokens[j, start : len(rows[i])]
            totals, greedy = self._judged(tokens.to(self.run.device), targets.to(self.run.device))
            for j, i in enumerate(chosen):
                found[i] = totals[j], greedy[j]
        return found

    def _judged(self, tokens: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
        """Σ log p of the targets ≥ 0 of each row [B, T], and whether all of them are the likeliest."""
        totals = torch.zeros(tokens.shape[0], dtype=torch.float64, device=tokens.device)
        misses = torch.zeros(tokens.shape[0], dtype=torch.int64, device=tokens.device)
        state = None
        for piece, target in zip(tokens.split(PIECE, 1), targets.split(PIECE, 1), strict=True):
            out = self.model(piece, state)
            state, row = out.state, (target >= 0).nonzero()[:, 0]
            logits, wanted = out.logits[target >= 0].float(), target[target >= 0]
            totals.index_add_(0, row, logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double())
            misses.index_add_(0, row, (logits.argmax(-1) != wanted).long())
        return totals.tolist(), (misses == 0).tolist()

    # -- writing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to (without) the first of the strings that are to end it."""
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for i, item in enumerate(requests):
            groups.setdefault(json.dumps(item.args[1], sort_keys=True), []).append(i)
        for asked, members in groups.items():
            until, most, sampling = _settings(json.loads(asked))
            rows = [self._opened(self.tok_encode(requests[i].args[0])) for i in members]
            for chosen in self._batches([len(row) for row in rows]):
                texts = self._written([rows[i] for i in chosen], until, most, sampling)
                for i, text in zip(chosen, texts, strict=True):
                    found[members[i]] = text
        return found

    def _written(self, rows: list[list[int]], until: Collection[str], most: int, sampling: Sampling) -> list[str]:
        logits, state = self._prefill(rows)
        said: list[list[int]] = [[] for _ in rows]
        open_ = list(range(len(rows)))
        for count in range(most):
            going = []
            for j, i in enumerate(open_):
                token = choose(logits[j], sampling, count)
                if token == self.eot_token_id:
                    continue
                said[i].append(token)
                if not any(end in self.text.decode(said[i]) for end in until):
                    going.append(j)
            if not going or count + 1 == most:
                break
            open_ = [open_[j] for j in going]
            out = self.model(torch.tensor([[said[i][-1]] for i in open_], device=self.run.device), state.select(going))
            logits, state = out.logits[:, -1], out.state
        return [_cut(self.text.decode(tokens), until) for tokens in said]

    def _prefill(self, rows: list[list[int]]) -> tuple[Tensor, State]:
        """Logits [B, V] after the last token of each row, and the state there. Rows go together as far as the shortest
        goes, then those that are longer."""
        ended: dict[int, tuple[Tensor, State]] = {}
        open_, at = list(range(len(rows))), 0
        state: Any = None
        for stop in sorted({len(row) for row in rows}):
            tokens = torch.tensor([rows[i][at:stop] for i in open_], device=self.run.device)
            for piece in tokens.split(PIECE, 1):
                out = self.model(piece, state)
                state = out.state
            going = []
            for j, i in enumerate(open_):
                if len(rows[i]) == stop:
                    ended[i] = out.logits[j, -1], state.select([j])
                else:
                    going.append(j)
            open_, at, state = [open_[j] for j in going], stop, state.select(going) if going else None
        logits, states = zip(*(ended[i] for i in range(len(rows))), strict=True)
        order = range(len(rows))
        layers = [take_rows(parts, order) for parts in zip(*(state.layers for state in states), strict=True)]
        return torch.stack(logits), State(layers, torch.cat([x.position for x in states]), states[0].fingerprint)

    def _opened(self, tokens: list[int]) -> list[int]:
        """A text behind the separator that opens it."""
        return tokens if tokens[:1] == [self.eot_token_id] else [self.eot_token_id, *tokens]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Places of texts by length, the longest first: what does not fit into memory shows at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for start in range(0, len(order), self.batch):
            yield order[start : start + self.batch]


def _settings(asked: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
    """What ends a text, after how many tokens it ends at the latest, and how they are chosen."""
    left = dict(asked)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else [end for end in until if end]
    named = [left.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
    most = int(next((value for value in named if value is not None), MOST))
    temperature = left.pop("temperature", None)
    drawn = left.pop("do_sample", temperature not in (None, 0, 0.0))
    top_k, top_p = left.pop("top_k", None), left.pop("top_p", None)
    if left:
        known = "until, max_gen_toks, do_sample, temperature, top_k, top_p"
        raise ValueError(f"generation_kwargs had {', '.join(sorted(left))}; they must be among {known}")
    if not drawn:
        return until, most, Sampling(0.0)
    heat = 1.0 if temperature is None else float(temperature)
    return until, most, Sampling(heat, top_k or None, 1.0 if top_p is None else float(top_p))


def _cut(text: str, until: Collection[str]) -> str:
    """Up to the first of these strings."""
    return text[: min([text.index(end) for end in until if end in text], default=len(text))]

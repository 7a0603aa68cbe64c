"""Sequences that are divided among processes, each of which holds a part of the tokens and the whole model.

``train.sequence_parallel: R`` has every R processes that follow one another in rank share their sequences: process r
holds tokens ⌊r T / R⌋ to ⌊(r + 1) T / R⌋ − 1 of each, and what later tokens need of earlier ones goes from process to
process. Outputs and every gradient are those of one process, up to rounding; with packed documents, too, of which each
begins with nothing, wherever that is.

    link.py       messages, numbered, with a limit to waiting
    passage.py    sending and receiving that gradients go back through
    documents.py  where a part begins and ends among packed documents
    mixers.py     what each token mixer exchanges; applied from outside, model files know nothing of it
    schedule.py   the order of micro batches, so that processes wait little for each other
    division.py   how the loop calls a model that is so divided
"""

from .division import Division, start
from .link import SequenceError

__all__ = ["Division", "SequenceError", "start"]

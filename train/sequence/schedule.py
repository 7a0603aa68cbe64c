"""In which order a process runs the micro batches that are on their way through the processes of a sequence.

A state goes from process to process layer by layer: when one has run layer l of micro batch m, the next one can, and in
the backward the other way round. So process r begins r slots late, a slot being one layer of one micro batch, and of R
processes with M micro batches of L layers each waits (R − 1) / (M L + R − 1) of the time: as in the pipeline of GPipe
(Huang et al., 2019, section 2.3), with M L in the place of its M, for there a whole part of the model is a slot.

That needs enough micro batches under way, and each keeps its activations. As in 1F1B (Narayanan et al., 2019, section
3.2) a process that holds earlier tokens, which are answered last, takes more of them before it goes back for the first:
R − 1 − r slots of forward and as many of backward pass between the end of its forward and the answer.
"""

from collections.abc import Iterator, Sequence

FORWARD, BACKWARD = "forward", "backward"
Turn = tuple[str, int]


def ahead(rank: int, ranks: int, micro_batches: int, layers: int) -> int:
    """How many micro batches a process runs forward before it runs one backward."""
    after = ranks - 1 - rank
    return min(micro_batches, 1 + max(after, -(-2 * after // layers)))


def order(rank: int, ranks: int, micro_batches: int, layers: int, *, together: bool = False) -> Iterator[Turn]:
    """(forward or backward, number of the micro batch), each of both once.

    No process waits for one that waits for it: later ones run no more ahead than earlier ones. ``together``: the same
    order in every process, each micro batch forward and at once backward.
    """
    early = 1 if together else ahead(rank, ranks, micro_batches, layers)
    for number in range(micro_batches + early):
        if number < micro_batches:
            yield FORWARD, number
        if number >= early - 1 and number - early + 1 < micro_batches:
            yield BACKWARD, number - early + 1


def slots(orders: Sequence[Sequence[Turn]], layers: int, backward: int = 1) -> int:
    """How many slots it takes until all are done, when a layer takes one forward and ``backward`` backward.

    Raises:
        ValueError: when some wait for each other.
    """
    ranks = len(orders)
    done: dict[tuple[str, int, int, int], int] = {}  # (turn, rank, layer) → at its end
    clocks, places = [0] * ranks, [0] * ranks
    steps = [[(kind, m, i) for kind, m in turns for i in range(layers)] for turns in orders]
    while any(place < len(own) for place, own in zip(places, steps, strict=True)):
        moved = False
        for rank, own in enumerate(steps):
            while places[rank] < len(own):
                kind, m, layer = own[places[rank]]
                source = rank - 1 if kind == FORWARD else rank + 1
                if 0 <= source < ranks:
                    if (kind, m, source, layer) not in done:
                        break
                    clocks[rank] = max(clocks[rank], done[kind, m, source, layer])
                clocks[rank] += 1 if kind == FORWARD else backward
                done[kind, m, rank, layer] = clocks[rank]
                places[rank] += 1
                moved = True
        if not moved:
            raise ValueError("the processes wait for each other")
    return max(clocks)

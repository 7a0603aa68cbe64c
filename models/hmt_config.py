"""The ``model.hmt`` section: memory across segments."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from .strict import Count, Strict


class HMTConfig(Strict):
    """Segments of ``segment`` tokens, each a memory vector (HMT; He et al., 2024); see :mod:`palimpsest.models.hmt`.

    ``sensory``: tokens of the segment before that a segment reads again. ``memories``: vectors that are kept.
    ``bptt``: segments that gradients go through; it changes nothing that is computed. ``recall``: by the segment
    before ("previous"), by the beginning of the segment itself, which sees ahead ("half"), or not at all: the last
    vector is passed on ("none"). ``summary``: tokens that the query is made of; null: half a segment.
    """

    segment: Annotated[int, Field(ge=2)] = 256
    sensory: Annotated[int, Field(ge=0)] = 32
    memories: Count = 300
    bptt: Count = 4
    recall: Literal["previous", "half", "none"] = "previous"
    summary: Count | None = None

    @property
    def asking(self) -> int:
        """Tokens that the query is made of."""
        return self.segment // 2 if self.summary is None else self.summary

    @model_validator(mode="after")
    def _inside_a_segment(self) -> Self:
        if self.sensory > self.segment:
            raise ValueError(f"sensory was {self.sensory}; it must be at most segment = {self.segment}")
        most = self.segment - (self.recall == "half")
        if self.asking > most:
            raise ValueError(f"summary was {self.summary}; it must be at most {most} for recall {self.recall}")
        return self

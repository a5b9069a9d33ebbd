"""The corpus: 207 papers on attention and its alternatives, read from ``papers.json``."""

import functools
import importlib.resources
import json
from dataclasses import dataclass

__all__ = ["Paper", "find_paper", "load_papers"]


@dataclass(frozen=True)
class Paper:
    """One paper of the corpus.

    Attributes:
      number: three digits, "000" to "206".
      name: a short name, unique in the corpus.
      kind: what the paper proposes: a mixer, an architecture, a kernel, a task and so on.
      title: its title.
      family: the family of the corpus that it belongs to.
    """

    number: str
    name: str
    kind: str
    title: str
    family: str


@functools.cache
def load_papers() -> tuple[Paper, ...]:
    """All papers, in the order of the corpus: by family, then by number."""
    text = importlib.resources.files("manyheads.experiments").joinpath("papers.json").read_text(encoding="utf-8")
    return tuple(Paper(**row) for row in json.loads(text))


def find_paper(number: str) -> Paper:
    """The paper with that number ("39" and "039" are the same); ValueError if there is none."""
    papers = {paper.number: paper for paper in load_papers()}
    if number.zfill(3) not in papers:
        raise ValueError(f"unknown paper {number!r}. Allowed: {min(papers)} to {max(papers)}")
    return papers[number.zfill(3)]

"""``manyheads generate``: continue texts with a trained model."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import UseAppendAction

from manyheads.experiments.arguments import parse
from manyheads.experiments.commands.output import print_json
from manyheads.experiments.data.tokenizers import Tokenizer
from manyheads.experiments.decoding.generate import generate
from manyheads.experiments.decoding.sampling import check_sampling
from manyheads.experiments.pretrained.loading import load_model

__all__ = ["Completion", "run"]

# ``--prompt one two --prompt three`` is ((one, two), (three,)).
Texts = Annotated[tuple[tuple[str, ...], ...], UseAppendAction]


@dataclass(frozen=True)
class Arguments:
    """Command line of ``manyheads generate``."""

    prompt: Texts
    """Text to continue; several are continued together."""
    model: str = "smollm2"
    """"smollm2", or a folder: of a training run, a saved decoder, or a Llama checkpoint."""
    tokens: int = 64
    """New tokens for each prompt, at most."""
    temperature: float = 0.0
    """0 takes the most probable token; 1 samples from the distribution of the model, more is more random."""
    top_k: int | None = None
    """Sample from this many most probable tokens only."""
    top_p: float | None = None
    """Sample from the fewest most probable tokens with this probability only."""
    seed: int = 0
    """Of the sampling; the same seed gives the same text."""
    stop: Texts = ()
    """Text that ends a completion, and is not part of it."""
    chat: bool = False
    """Answer the prompts, with a model that was trained to do so."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")
        for field, texts in (("prompt", self.prompt), ("stop", self.stop)):
            if not all(values and all(values) for values in texts):
                raise ValueError(f"{field} is empty, it takes texts of at least one character")


def run(argv: list[str]) -> int:
    """Print the completion of each prompt."""
    arguments = parse(Arguments, argv, prog="manyheads generate", description="Continue texts with a trained model.")
    loaded = load_model(arguments.model)
    if arguments.chat and loaded.chat is None:
        raise ValueError(f"chat: model={arguments.model!r} was not trained to answer, it continues texts only")
    texts, stops = ([*itertools.chain(*values)] for values in (arguments.prompt, arguments.stop))
    prompts = [loaded.chat(text) for text in texts] if arguments.chat else texts
    completions = [Completion(loaded.tokenizer, stops) for _ in prompts]
    streams = len(prompts) == 1 and not arguments.json

    def on_token(row: int, token: int) -> bool:
        new, ended = completions[row].add(token)
        if streams:
            print(new, end="", flush=True)
        return ended

    result = generate(
        loaded.model,
        [loaded.tokenizer.encode(prompt) for prompt in prompts],
        max_new_tokens=arguments.tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        stop_tokens=loaded.stop_tokens,
        seed=arguments.seed,
        on_token=on_token,
    )
    if arguments.json:
        columns = zip(texts, completions, result.lengths.tolist(), result.stopped.tolist())
        keys = ("prompt", "completion", "tokens", "stopped")
        print_json([dict(zip(keys, (prompt, row.text, *numbers))) for prompt, row, *numbers in columns])
    elif streams:
        print(completions[0].held)
    else:
        for prompt, row in zip(texts, completions):
            print(f"> {prompt}\n{row.text}")
    return 0


class Completion:
    """The text of one row while its tokens come.

    Args:
      tokenizer: of the model.
      stops: texts that end the row.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._shown = 0
        self.text = ""

    @property
    def held(self) -> str:
        """The end of the text, which ``add`` has not returned."""
        return self.text[self._shown :]

    def add(self, token: int) -> tuple[str, bool]:
        """Add a token.

        Returns:
          The new part of the text that no later token can change or take back, and whether the row has ended.
        """
        self._tokens.append(token)
        self.text = self._tokenizer.decode(self._tokens)
        found = [self.text.index(stop) for stop in self._stops if stop in self.text]
        if found:
            self.text = self.text[: min(found)]
            settled = len(self.text)
        else:  # The last character may not be whole yet, and the text may end with the beginning of a stop text.
            settled = len(self.text.rstrip("\ufffd"))
            settled = min([settled, *(self._overlap(stop) for stop in self._stops)])
        new = self.text[self._shown : settled]
        self._shown += len(new)
        return new, bool(found)

    def _overlap(self, stop: str) -> int:
        """Where in the text its longest ending begins that is a beginning of ``stop``."""
        length = next((n for n in range(len(stop) - 1, 0, -1) if self.text.endswith(stop[:n])), 0)
        return len(self.text) - length

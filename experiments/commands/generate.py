"""``manyheads generate``: continue texts with a trained model."""

import sys
from dataclasses import dataclass

from manyheads.experiments.arguments import parse
from manyheads.experiments.commands.output import print_json
from manyheads.experiments.data.tokenizers import Tokenizer
from manyheads.experiments.decoding.generate import generate
from manyheads.experiments.decoding.sampling import check_sampling
from manyheads.experiments.pretrained import load_model

__all__ = ["run"]


@dataclass(frozen=True)
class Arguments:
    """Command line of ``manyheads generate``."""

    prompt: tuple[str, ...]
    """Texts to continue; several are continued together."""
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
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they are not part of it."""
    chat: bool = False
    """Answer the prompts, with a model that was trained to do so."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self):
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} must be at least 1")
        if "" in self.prompt or not self.prompt:
            raise ValueError("prompt='' is empty, a prompt has at least one character")
        if "" in self.stop:
            raise ValueError("stop='' is empty, a stop text has at least one character")


def run(argv: list[str]) -> int:
    """Print the completion of each prompt."""
    arguments = parse(Arguments, argv, prog="manyheads generate", description="Continue texts with a trained model.")
    loaded = load_model(arguments.model)
    prompts = arguments.prompt
    if arguments.chat:
        if loaded.chat is None:
            raise ValueError(f"chat: model={arguments.model!r} was not trained to answer, it continues texts only")
        prompts = tuple(map(loaded.chat, prompts))
    stream = len(prompts) == 1 and not arguments.json
    completions = [Completion(loaded.tokenizer, arguments.stop) for _ in prompts]

    def on_token(row: int, token: int) -> bool:
        ended, new = completions[row].add(token)
        if stream:
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
    ...
    return 0

"""SmolLM2-135M on a CPU against transformers with PyTorch: the same weights, cores and tokens, float32, batch 1."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from manyheads.architectures.language.decoder import Decoder
from manyheads.architectures.language.llama import save_llama
from manyheads.experiments.benchmarks.harness import Benchmark, interleave
from manyheads.experiments.decoding.generate import generate
from manyheads.experiments.pretrained.smollm2 import load_smollm2


def _in_transformers(model: Decoder) -> Any:
    """The same model in transformers."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads of one library must not slow the other down
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install -r oracles.txt") from None
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        save_llama(model, folder)
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def run(quick: bool, progress: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of a prefill (the logits after the last token) and of decoding; the ratios are theirs over ours."""
    prompt_length, new_tokens, repeats = (32, 4, 1) if quick else (512, 128, 5)
    progress("loading")
    model, _ = load_smollm2()
    theirs = _in_transformers(model)
    import torch

    model = model.unrolled()
    prompt = np.random.default_rng(0).integers(100, model.config.vocab_size, prompt_length)
    prompt_torch = torch.from_numpy(prompt[None])

    def ours(count: int) -> Callable[[], np.ndarray]:
        return lambda: generate(model, [prompt], max_new_tokens=count, capacity=prompt_length + 128).tokens[0]

    @torch.inference_mode()
    def torch_generate(count: int) -> np.ndarray:
        out = theirs(prompt_torch, use_cache=True, logits_to_keep=1)
        tokens = [out.logits[0, -1].argmax()]
        for _ in range(count - 1):
            out = theirs(tokens[-1][None, None], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[0, -1].argmax())
        return torch.stack(tokens).numpy()

    progress("timing")
    calls = {}
    for count in (1, new_tokens):
        calls["ours", count] = ours(count)
        calls["torch", count] = lambda count=count: torch_generate(count)
    same = float(np.mean(calls["ours", new_tokens]() == calls["torch", new_tokens]()))
    seconds = interleave(calls, repeats=repeats, reduce=min)
    prefill = {who: seconds[who, 1] for who in ("ours", "torch")}
    decode = {who: seconds[who, new_tokens] - seconds[who, 1] for who in ("ours", "torch")}
    return {
        "prompt_tokens": prompt_length,
        "new_tokens": new_tokens,
        "prefill_ratio": round(prefill["torch"] / prefill["ours"], 3),
        "decode_ratio": round(decode["torch"] / decode["ours"], 3),
        "prefill_seconds": {who: round(value, 4) for who, value in prefill.items()},
        "decode_seconds_per_token": {who: round(value / (new_tokens - 1), 5) for who, value in decode.items()},
        "equal_tokens": same,
        "torch": f"torch {torch.__version__}, {torch.get_num_threads()} threads",
        "headline": f"against transformers + torch: prefill {prefill['torch'] / prefill['ours']:.2f}x, "
        f"decoding {decode['torch'] / decode['ours']:.2f}x",
    }


BENCHMARK = Benchmark("smollm2", "prefill and decoding of SmolLM2-135M against transformers with torch", run)

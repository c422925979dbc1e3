"""Request lengths like ShareGPT's: an inverse-CDF sampler over measured quantiles (numbers only, no text).

Tokens of SmolLM2's tokenizer, after the filter that serving benchmarks use: prompt and output of at least 4,
prompt at most 1024, sum at most 2048.
"""

from __future__ import annotations

import numpy as np

_PERCENT = [1, *range(5, 100, 5), 99]
_PROMPT = [5, 8, 11, 13, 17, 21, 27, 36, 49, 73, 108, 162, 223, 282, 335, 391, 458, 547, 658, 806, 953]
_OUTPUT = [4, 8, 11, 15, 20, 27, 37, 52, 75, 104, 140, 181, 219, 257, 294, 334, 379, 441, 534, 710, 943]


def sharegpt(requests: int, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request, drawn independently."""
    rng = np.random.default_rng(seed)
    prompts = np.interp(100 * rng.random(requests), _PERCENT, _PROMPT)
    outputs = np.interp(100 * rng.random(requests), _PERCENT, _OUTPUT)
    return [(round(p), round(o)) for p, o in zip(prompts, outputs, strict=True)]

"""Variants for a served model: FI_VARIANT=examples/variants_to_serve.py:STREAMING vllm serve ...

STREAMING: every token sees the first tokens of its request and the last ones before itself, as in
StreamingLLM, but that positions stay those of the text. SIGMOID: sigmoid attention, for models that were
trained with it.
"""

from fi_backend import variants
from fi_backend.variants import Argument, define

STREAMING = (
    define(
        "STREAMING",
        Argument("first", "int", at_least=0),
        Argument("recent", "int", at_least=1),
        mask="kv_pos < first or q_pos - kv_pos < recent",
    ),
    {"first": 4, "recent": 1020},
)
SIGMOID = variants.SIGMOID, {"sigmoid_bias": -7.0}  # about -log(1024)

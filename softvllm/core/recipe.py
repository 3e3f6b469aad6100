"""Defaults of the think phase that fit a model: how its thinking ends, what is forced then.

A model whose tokenizer has `</think>` was trained to end its thoughts there. Any other model
follows the paper (section 4, appendix C): thinking ends at "The final answer is:" and the answer
starts inside `\\boxed{`.
"""

from __future__ import annotations

from typing import Any

from softvllm.core.params import PAPER_AFTER_CUT, PAPER_AFTER_END, PAPER_END_STRING

OPEN, CLOSE = "<think>", "</think>"
FORCED = ("force_after_end", "force_after_cut")


def marker_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens `<think>` and `</think>`, as far as the tokenizer has them."""
    vocab = tokenizer.get_vocab()
    return frozenset(vocab[token] for token in (OPEN, CLOSE) if token in vocab)


def is_reasoning_model(tokenizer: Any) -> bool:
    """Whether `</think>` is one token of the tokenizer."""
    return tokenizer is not None and CLOSE in tokenizer.get_vocab()


def recipe_for(tokenizer: Any, *, free_answer: bool = False) -> dict[str, Any]:
    """Fields of `CoTParams` for a request that names none of them.

    Args:
        tokenizer: Hugging Face tokenizer, or None.
        free_answer: the answer must not begin with text of ours: a grammar or a tool parser reads
            it. Only a line break is forced then (a grammar needs one forced token to start after).
    """
    if is_reasoning_model(tokenizer):
        return {
            "end_strings": [CLOSE],
            "force_after_end": "",
            "force_after_cut": f"\n{CLOSE}\n\n",
        }
    if free_answer:
        return {"end_strings": [PAPER_END_STRING], **dict.fromkeys(FORCED, "\n")}
    return {
        "end_strings": [PAPER_END_STRING],
        "force_after_end": PAPER_AFTER_END,
        "force_after_cut": PAPER_AFTER_CUT,
    }

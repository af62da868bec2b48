"""Text drawn from the demo language model, and the classifier that names the label of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from demo_lm_model import BOS, EOS, PAD
from demo_lm_text import Document
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import LlamaForCausalLM

PIECE = 150  # characters, about as long as 50 tokens
HEAD = 512  # tokens; the likeliest ones are rarely more


@dataclass(frozen=True)
class Sampling:
    """How continuations are drawn."""

    prompt_tokens: int = 16
    new_tokens: int = 50
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


@torch.no_grad()
def continuations(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    on_token: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Samples `how.new_tokens` tokens after each prompt (BOS, then equally many ids), never a special one.

    Written out rather than `generate`, so that a seed gives the same text under every version of transformers.

    Args:
        model: In evaluation mode.
        prompts: Token ids without BOS; all of one length.
        how: Its `prompt_tokens` is not used: the prompts have their length.
        on_token: Called whenever every prompt has got one more token.
    """
    tokens, past = torch.tensor([[BOS, *prompt] for prompt in prompts]), None
    drawn_tokens: list[torch.Tensor] = []
    rng = np.random.default_rng(how.seed)
    for _ in range(how.new_tokens):
        output = model(input_ids=tokens, past_key_values=past, use_cache=True)
        past, logits = output.past_key_values, output.logits[:, -1].double() / how.temperature
        logits[:, [PAD, BOS, EOS]] = -torch.inf
        tokens = _pick(logits.softmax(-1), torch.from_numpy(rng.random(len(prompts))), how.top_p)
        drawn_tokens.append(tokens)
        if on_token is not None:
            on_token()
    return torch.cat(drawn_tokens, dim=1).tolist()


def _pick(p: torch.Tensor, at: torch.Tensor, top_p: float) -> torch.Tensor:
    """Of each row of probabilities, the token at the place `at` (0 to 1) among the likeliest ones that make `top_p`."""
    few = min(HEAD, p.shape[-1])
    head, ids = p.topk(few)  # a fifth of the time of sorting all of them
    tokens = _pick_sorted(head, ids, at, top_p)
    if few < p.shape[-1] and bool((flat := head.sum(-1) < top_p).any()):
        tokens[flat] = _pick_sorted(*p[flat].sort(descending=True, stable=True), at[flat], top_p)
    return tokens


def _pick_sorted(p: torch.Tensor, ids: torch.Tensor, at: torch.Tensor, top_p: float) -> torch.Tensor:
    p = p.where(p.cumsum(-1) - p < top_p, 0)  # keeps the token that crosses the limit
    reach = p.cumsum(-1)
    chosen = (reach <= at[:, None] * reach[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(1, chosen.clamp(max=p.shape[-1] - 1))


def train_classifier(documents: Sequence[Document]) -> Pipeline:
    """Names a label from character 1- to 4-grams, trained on pieces as long as a continuation."""
    texts, names = pieces(documents)
    features = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True, lowercase=False, min_df=2)
    model = make_pipeline(features, LogisticRegression(C=30, max_iter=500, class_weight="balanced"))
    return model.fit(texts, names)


def pieces(documents: Sequence[Document]) -> tuple[list[str], list[str]]:
    """Texts of PIECE characters, and their labels."""
    cut = [
        (document.text[start : start + PIECE], document.label)
        for document in documents
        for start in range(0, max(1, len(document.text) - PIECE // 2), PIECE)
    ]
    return [text for text, _ in cut], [label for _, label in cut]

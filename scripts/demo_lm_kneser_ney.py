"""A 5-gram model with interpolated, modified Kneser-Ney smoothing: what the demo language model is compared with.

Chen and Goodman, "An empirical study of smoothing techniques for language modeling" (1998), section 3: the highest
order counts n-grams, the lower ones count the different tokens that an n-gram follows. For a context c and a token w

    P(w | c) = (count(c w) - D(count(c w))) / total(c) + gamma(c) P(w | c without its first token)

and below the unigrams all tokens are equally likely. Unseen contexts pass on to the shorter one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class _Order:
    """All n-grams of one order: `keys` are sorted, and a key's position is the n-gram's number."""

    keys: np.ndarray  # number of the n-gram's first n-1 tokens x vocab_size + last token
    count: np.ndarray
    discounted: np.ndarray
    total: np.ndarray  # by number of the context, the (n-1)-gram
    gamma: np.ndarray  # by number of the context


class KneserNey:
    """Trained on documents of token ids. Every document begins after `order - 1` BOS, and its end is not predicted.

    Args:
        documents: Token ids of each document, without BOS.
        vocab_size: Ids are below it.
        bos: Id that stands before a document and never within one.
        order: Tokens of the longest n-gram.
        n_predicted: How many tokens can occur, for the uniform distribution below the unigrams.
        discounts: Three numbers for counts 1, 2, and 3 or more; estimated for each order if left out.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        vocab_size: int,
        *,
        bos: int,
        order: int = 5,
        n_predicted: int | None = None,
        discounts: tuple[float, float, float] | None = None,
    ) -> None:
        self.vocab_size, self.bos, self.n = vocab_size, bos, order
        self.n_predicted = n_predicted or vocab_size
        stream = self._stream(documents)
        predicted = stream != bos
        grams, uniques, firsts = [np.zeros(len(stream), np.int64)], [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
        counts = np.zeros(0, np.int64)
        for _ in range(order):
            # The n-gram that ends here is the (n-1)-gram that ends one before, and this token. Before the first token
            # stands nothing; what is made of that ends in BOS, so nothing counts it.
            keys = np.concatenate([[0], grams[-1][:-1]]) * vocab_size + stream
            unique, first, number = np.unique(keys, return_index=True, return_inverse=True)
            grams.append(number.reshape(-1))
            uniques.append(unique)
            firsts.append(first)
        self.orders: list[_Order] = []
        for n in range(1, order + 1):
            if n == order:
                seen = grams[n][predicted]  # occurrences
            else:
                longer = firsts[n + 1][predicted[firsts[n + 1]]]  # one occurrence of each longer n-gram
                seen = grams[n][longer]
            counts = np.bincount(seen, minlength=len(uniques[n]))
            self.orders.append(_order(uniques[n], counts, len(uniques[n - 1]), vocab_size, discounts))

    def document_bits(self, documents: Sequence[Sequence[int]]) -> list[float]:
        """Bits that each document's tokens cost."""
        stream = self._stream(documents)
        p = self.probabilities(stream)
        costs = np.where(stream == self.bos, 0.0, -np.log2(p))
        lengths = [len(document) + self.n - 1 for document in documents]
        return [float(part.sum()) for part in np.split(costs, np.cumsum(lengths)[:-1])]

    def probabilities(self, stream: np.ndarray) -> np.ndarray:
        """P of each token of a stream after the ones before it; those of the first `order - 1` mean nothing."""
        p = np.full(len(stream), 1.0 / self.n_predicted)
        context = np.zeros(len(stream), np.int64)  # number of the n-gram before each token; -1: never seen
        for order in self.orders:
            keys = np.where(context >= 0, context * self.vocab_size + stream, -1)
            place = np.minimum(np.searchsorted(order.keys, keys), len(order.keys) - 1)
            gram = np.where(order.keys[place] == keys, place, -1)
            known = (context >= 0) & (order.total[context] > 0)
            own = np.where(gram >= 0, order.discounted[gram], 0.0) / np.where(known, order.total[context], 1.0)
            p = np.where(known, own + order.gamma[context] * p, p)
            context = np.concatenate([[-1], gram[:-1]])
        return p

    def _stream(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        start = [self.bos] * (self.n - 1)
        return np.concatenate([np.array([*start, *document], np.int64) for document in documents])


def _order(
    keys: np.ndarray, counts: np.ndarray, n_contexts: int, vocab_size: int, given: tuple[float, float, float] | None
) -> _Order:
    context = keys // vocab_size
    discount = np.array([0.0, *(given or estimate_discounts(counts))])[np.minimum(counts, 3)]
    total = np.bincount(context, weights=counts, minlength=n_contexts)
    held_back = np.bincount(context, weights=discount, minlength=n_contexts)
    gamma = held_back / np.maximum(total, 1)
    return _Order(keys, counts, counts - discount, total, gamma)


def estimate_discounts(counts: np.ndarray) -> tuple[float, float, float]:
    """Chen and Goodman's estimates from how many n-grams have count 1, 2, 3 and 4; 0.75 where one of them is none."""
    n1, n2, n3, n4 = (int((counts == value).sum()) for value in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return 0.75, 0.75, 0.75
    y = n1 / (n1 + 2 * n2)
    # Odd counts of counts could give a discount outside (0, count), and with it no probabilities.
    first, second, third = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    return float(np.clip(first, 0.05, 0.95)), float(np.clip(second, 0.05, 1.95)), float(np.clip(third, 0.05, 2.95))

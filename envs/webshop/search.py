"""The shop's search: BM25 over the products' texts, by bm25s.

Parameters are those of the authors' search engine (Lucene's formula, k1 = 0.9, b = 0.4).
Stop words are left out; words are not stemmed. Read-only once made, so any thread may ask.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from astuner.errors import MissingDependency

from .catalogue import Product

MOST_RESULTS = 50


class Search:
    def __init__(self, products: Sequence[Product]) -> None:
        """Raises MissingDependency."""
        self._products = list(products)
        self._bm25 = _bm25s()
        self._index = self._bm25.BM25(method="lucene", k1=0.9, b=0.4)
        self._index.index(
            self._words([product.searched_text for product in products]), show_progress=False
        )

    def find(self, query: str) -> list[Product]:
        """The best products with any word of the query, best first, 50 at most."""
        import numpy as np

        words = [word for word in self._words([query])[0] if word in self._index.vocab_dict]
        if not words:
            return []
        scores = self._index.get_scores(words)
        best = np.argsort(-scores, kind="stable")[:MOST_RESULTS]
        return [self._products[i] for i in best if scores[i] > 0]

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self._bm25.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise MissingDependency("bm25s", "webshop", "The environment webshop") from None
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets DEBUG itself
    return bm25s

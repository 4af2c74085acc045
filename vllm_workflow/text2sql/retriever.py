"""Finds values of the database that a question mentions: CHESS's information retriever."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz, process

from vllm_workflow.text2sql.database import Database
from vllm_workflow.text2sql.types import Column, ValueHit

_WORD = re.compile(r"\w+(?:[-'.&/]\w+)*")
_STOP_TEXT = """
    a all an and any are as at be been by can did do does each for from had has have how i if in
    into is it its list many me more most much my name no not of on or our over per show so than
    that the their them then there these they this those to top under up was we were what when
    where which who whose why will with yes you your
"""
_STOP_WORDS = frozenset(_STOP_TEXT.split())
"""Words that alone are no sign of a value, although `no` and `yes` often are values."""

_TEXT_TYPES = ("CHAR", "TEXT", "CLOB", "STRING")
_MIN_LENGTH_FOR_SIMILARITY = 4
_NUM_SIMILAR = 3

_Places = dict[str, list[ValueHit]]


@dataclass(frozen=True, slots=True)
class _Index:
    places: _Places
    """Where each value occurs, by its case-folded form."""
    folded: list[str]
    """The keys of `places`, as a list because rapidfuzz answers with positions."""
    capped: list[tuple[str, str]]
    """Columns (table, column) that have more values than were indexed."""


@dataclass(frozen=True, slots=True)
class _Ngram:
    text: str
    start: int
    """Position of its first word in the question, counted in words."""
    num_words: int


class ValueRetriever:
    """Looks keywords and word sequences of a question up in the text columns of a database.

    A phrase is tried as it is, then ignoring case, and a keyword that still has no match by
    similarity (Levenshtein ratio). The index is built at the first look-up and is bounded;
    for columns that exceed the bound the database itself is asked for equal values.

    Args:
        database: Where to look.
        max_values_per_column: Distinct values indexed of each column.
        max_value_length: Longer texts are descriptions, not values, and are not indexed.
        min_similarity: In percent; above 100 switches look-up by similarity off.
        max_ngram: Word sequences of the question up to this length are tried.
        max_hits: At most this many hits are returned, the most exact ones first.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_values_per_column: int = 5_000,
        max_value_length: int = 80,
        min_similarity: float = 82.0,
        max_ngram: int = 5,
        max_hits: int = 12,
    ) -> None:
        self.database = database
        self.max_values_per_column = max_values_per_column
        self.max_value_length = max_value_length
        self.min_similarity = min_similarity
        self.max_ngram = max_ngram
        self.max_hits = max_hits
        self._index: _Index | None = None
        self._lock = threading.Lock()

    def retrieve(self, keywords: Sequence[str], question: str) -> tuple[ValueHit, ...]:
        """Return values that resemble a keyword or occur in the question, best first.

        Blocking, and slow at the first call: use `asyncio.to_thread` in async code.
        """
        index = self._built()
        phrases = [phrase for phrase in map(_cleaned, keywords) if phrase]
        ngrams = list(_ngrams(question, self.max_ngram))
        places = [
            index.places,
            self._capped_places(index, [*phrases, *(ngram.text for ngram in ngrams)]),
        ]
        exact: list[ValueHit] = []
        unmatched: list[str] = []
        for phrase in phrases:
            hits = _equal_values(places, phrase)
            exact += hits
            if not hits:
                unmatched.append(phrase)
        mentioned = _mentioned_values(places, ngrams)
        if not phrases and not mentioned:
            unmatched = [ngram.text for ngram in ngrams if ngram.num_words <= 2]
        similar = [hit for phrase in unmatched for hit in self._similar(index, phrase)]
        return tuple(dict.fromkeys([*exact, *mentioned, *similar]))[: self.max_hits]

    def _built(self) -> _Index:
        with self._lock:
            if self._index is None:
                self._index = self._build()
            return self._index

    def _build(self) -> _Index:
        places: _Places = defaultdict(list)
        capped = []
        for table in self.database.schema().tables:
            for column in filter(_holds_text, table.columns):
                values = self.database.distinct_values(
                    table.name,
                    column.name,
                    limit=self.max_values_per_column,
                    max_length=self.max_value_length,
                )
                if len(values) >= self.max_values_per_column:
                    capped.append((table.name, column.name))
                for value in values:
                    hit = ValueHit(table=table.name, column=column.name, value=value)
                    places[value.strip().casefold()].append(hit)
        return _Index(dict(places), list(places), capped)

    def _capped_places(self, index: _Index, phrases: list[str]) -> _Places:
        """Ask the database for values of big columns that equal a phrase."""
        places: _Places = defaultdict(list)
        wanted = list(dict.fromkeys(p for p in phrases if p.casefold() not in _STOP_WORDS))
        for table, column in index.capped if wanted else ():
            for value in self.database.matching_values(table, column, wanted, limit=self.max_hits):
                hit = ValueHit(table=table, column=column, value=value)
                places[value.strip().casefold()].append(hit)
        return places

    def _similar(self, index: _Index, phrase: str) -> list[ValueHit]:
        if len(phrase) < _MIN_LENGTH_FOR_SIMILARITY:
            return []
        found = process.extract(
            phrase.casefold(),
            index.folded,
            scorer=fuzz.ratio,
            score_cutoff=self.min_similarity,
            limit=_NUM_SIMILAR,
        )
        return [hit for folded, _, _ in found for hit in index.places[folded]]


def _holds_text(column: Column) -> bool:
    if any(word in column.type for word in _TEXT_TYPES):
        return True
    return any(isinstance(example, str) for example in column.examples)


def _cleaned(phrase: str) -> str:
    return phrase.strip().strip("\"'`").strip()


def _ngrams(question: str, longest: int) -> Iterator[_Ngram]:
    """Yield the word sequences of a question as they are written, the longest first."""
    words = list(_WORD.finditer(question))
    for num_words in range(min(longest, len(words)), 0, -1):
        for start in range(len(words) - num_words + 1):
            first, last = words[start], words[start + num_words - 1]
            text = question[first.start() : last.end()]
            if num_words > 1 or (len(text) > 1 and text.casefold() not in _STOP_WORDS):
                yield _Ngram(text, start, num_words)


def _mentioned_values(places: list[_Places], ngrams: list[_Ngram]) -> list[ValueHit]:
    """Return values that occur in the question; `York` is not tried again in `New York`."""
    hits: list[ValueHit] = []
    covered: set[int] = set()
    for ngram in ngrams:
        span = set(range(ngram.start, ngram.start + ngram.num_words))
        found = [] if span <= covered else _equal_values(places, ngram.text)
        if found:
            covered |= span
            hits += found
    return hits


def _equal_values(places: list[_Places], phrase: str) -> list[ValueHit]:
    """Return the values equal to `phrase` if there are any, else those equal but for case."""
    hits = [hit for part in places for hit in part.get(phrase.casefold(), ())]
    return [hit for hit in hits if hit.value == phrase] or hits

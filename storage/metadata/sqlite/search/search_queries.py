"""The searches of the index. They find:

- repositories by their names
- tags
- manifests by their labels and annotations
- manifests and blobs by their digests

The index may still have rows of deleted content. Each search joins the rows of the index with the tables of the
content, and thereby finds only content that exists. The functions take the arguments of
`storage.content_search.ContentSearch`. Each function reads all rows of a statement or closes the statement. Otherwise
the statement would keep its read transaction open.

A `SearchScope` is the set of repositories that a search may find. `SearchScope.ids` maps the names of these
repositories to their row ids. It is None if there are too many repositories to list.

A function named `convert` converts one row of a statement to a key and an entry of the page. `read_page` leaves out the
row if `convert` returns None, or if an earlier row has the same key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, Final

import apsw

from storage.content_search import (
    MAX_OFFSET,
    MIN_HEX_DIGITS,
    DigestMatch,
    LabelsMatch,
    SearchPage,
    TagMatch,
)
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.search.index_tables import START_OF_NAME
from storage.metadata.sqlite.search.search_scope import MAX_ROWS, SearchScope, read_page, time_limit
from storage.names import ALGORITHMS, Digest, RepositoryName, Tag
from storage.patterns import NameSet

GROUP_CHARACTERS: Final = 3
"""Number of characters in a *group*. The full-text index of names is a trigram index: a search finds a name by groups
of three consecutive characters."""
MAX_PATTERNS: Final = 16
"""A person's rights are patterns of repository names. If there are at most this number of patterns, a search for names
adds the patterns to its query of the index (`_pattern_expression`). If there are more patterns, the search reads the
matching names of all repositories, and leaves out the names that the person may not see."""
MAX_SHOWN_LABELS: Final = 8
"""Largest number of labels that a search returns for one manifest."""
MAX_BLOBS: Final = 20
"""A search by the first digits of a digest finds at most this number of blobs of each hash algorithm."""
LAST_CHARACTER: Final = "\U0010ffff"
"""A character that sorts after all characters of names and tags."""
MAX_TOKENS_OF_WORD: Final = 8
"""Largest number of tokens in one word of a search for labels. A *word* is a part of the query between spaces. A
*token* is a unit of the full-text index, a run of letters and digits: the word `a-b` has two tokens. The limit bounds
the time in which SQLite compares the positions of the tokens."""
MAX_TOKENS: Final = 16
"""Largest total number of tokens in the words of a search for labels. This limit also bounds the time of the search."""
_TOKEN = re.compile(r"[^\W_]+")
_NAME_TEXT = re.compile(r"[a-z0-9._/-]+")
_HEX = re.compile(r"[0-9a-f]{6,128}")
_NAMES = """
SELECT r.name FROM search_name CROSS JOIN repository r ON r.id = search_name.rowid
 WHERE search_name MATCH ?1 AND r.manifests > 0"""
_NAMES_BEGINNING = "SELECT name FROM repository WHERE manifests > 0 AND name >= ?1 AND name < ?2 ORDER BY name"
_TAG = """
SELECT r.name, s.tag, m.digest, t.updated FROM {source}
       CROSS JOIN repository r ON r.id = s.repository
       CROSS JOIN tag t ON t.repository = s.repository AND t.name = s.tag
       CROSS JOIN manifest m ON m.id = t.manifest
 WHERE s.word >= ?1 AND s.word < ?2"""
_TAGS = _TAG.format(source="search_tag s") + " ORDER BY s.word, s.repository, s.tag"
_TAGS_IN_REPOSITORIES = _TAG.format(source="json_each(?3) j CROSS JOIN search_tag s ON s.repository = j.value")
_TAG_OF_MANIFEST = """
coalesce((SELECT name FROM tag WHERE manifest = m.id LIMIT 1),
         (SELECT t.name FROM manifest_child c JOIN tag t ON t.manifest = c.manifest
           WHERE c.repository = m.repository AND c.digest = m.digest LIMIT 1))"""
"""SQL expression: a tag of the manifest `m`. If `m` has no tag, a tag of an index that lists `m`. If no index with a
tag lists `m`, NULL."""
_LABELS = f"""
SELECT r.name, m.digest, l.text, {_TAG_OF_MANIFEST} FROM search_word
       CROSS JOIN search_label l ON l.manifest = search_word.rowid
       CROSS JOIN manifest m ON m.id = search_word.rowid
       CROSS JOIN repository r ON r.id = m.repository
 WHERE search_word MATCH ?1 ORDER BY search_word.rowid DESC"""
_MANIFESTS = f"""
SELECT r.name, m.digest, {_TAG_OF_MANIFEST}, 1 FROM search_manifest s
       CROSS JOIN manifest m ON m.id = s.manifest
       CROSS JOIN repository r ON r.id = m.repository
 WHERE s.hex >= ?1 AND s.hex < ?2 AND m.digest LIKE ?3
   AND (?4 IS NULL OR m.repository IN (SELECT value FROM json_each(?4)))"""
_BLOBS = """
SELECT r.name, b.digest, NULL, 0
  FROM (SELECT id, digest FROM blob WHERE digest >= ?1 AND digest < ?2 ORDER BY digest LIMIT ?3) b
       CROSS JOIN blob_link l ON l.blob = b.id AND (?4 IS NULL OR l.repository IN (SELECT value FROM json_each(?4)))
       CROSS JOIN repository r ON r.id = l.repository
 WHERE EXISTS (SELECT 1 FROM manifest_blob g WHERE g.repository = l.repository AND g.digest = b.digest)"""
"""Finds a blob in a repository if the repository has both:

- A link to the blob: the row that lets the repository serve the blob.
- A manifest that refers to the blob. The link alone does not suffice: a mirror can add a link although the upstream has
  not confirmed that it has the blob in this repository."""


def find_repositories(
    db: apsw.Connection, words: Sequence[str], within: NameSet, offset: int, limit: int
) -> SearchPage[RepositoryName]:
    """Finds repositories by their names."""
    if not words or not all(map(_NAME_TEXT.fullmatch, words)) or offset > MAX_OFFSET:
        return SearchPage([], is_complete=offset <= MAX_OFFSET)
    scope = SearchScope.of(db, within)
    if scope.ids is not None:
        names, is_complete = {name for name in scope.ids if _is_match(words, name)}, True
    else:
        names, is_complete = _matching_names(db, words, scope)
    ranked = sorted(names, key=lambda name: (_rank(name, words[0]), name))
    items = [str.__new__(RepositoryName, name) for name in ranked[offset : offset + limit]]
    return SearchPage(
        items, more=len(ranked) > offset + limit and offset + limit <= MAX_OFFSET, is_complete=is_complete
    )


def _matching_names(db: apsw.Connection, words: Sequence[str], scope: SearchScope) -> tuple[set[str], bool]:
    """Returns the names that match, and `is_complete`: True only if these are all matching names. Searches for the best
    matches first, because the search ends early if very many names match. If the search also reads names that the
    person may not see (`SearchScope.reads_hidden_rows`), `is_complete` is always False. Otherwise `is_complete` would
    reveal whether many hidden names match."""
    names: set[str] = set()
    rows_read = 0
    try:
        with time_limit(db):
            for sql, values in _name_statements(words, scope):
                with closing(db.cursor()) as cursor:
                    for (name,) in cursor.execute(sql, values):
                        rows_read += 1
                        if rows_read > MAX_ROWS or len(names) > MAX_OFFSET:
                            return names, False
                        if name not in names and _all_in(words, name) and name in scope:
                            names.add(name)
    except apsw.InterruptError:
        return names, False
    return names, not scope.reads_hidden_rows


def _name_statements(words: Sequence[str], scope: SearchScope) -> Iterable[tuple[str, tuple[str, ...]]]:
    """Yields the statements that find names, in this order:

    1. Names that begin with the first word. The index has the character `START_OF_NAME` before each name.
    2. Names in which the first word follows a slash.
    3. All names that contain all words.

    Leaves out a statement that would search only for texts shorter than a group: the index cannot find them."""
    first_word, *other_words = words
    rights_expression = _pattern_expression(scope.within)
    if len(first_word) < GROUP_CHARACTERS - 1 and not other_words:
        yield _NAMES_BEGINNING, (first_word, first_word + LAST_CHARACTER)
    for beginning in (START_OF_NAME, "/", ""):
        expression = _groups_expression([beginning + first_word, *other_words])
        if expression:
            yield _NAMES, (f"{expression} AND ({rights_expression})" if rights_expression else expression,)


def _groups_expression(texts: Iterable[str]) -> str:
    """Returns the full-text expression for the names that contain every group (`GROUP_CHARACTERS`) of every text. The
    expression is empty if all texts are shorter than a group."""
    groups = {
        text[start : start + GROUP_CHARACTERS] for text in texts for start in range(len(text) - GROUP_CHARACTERS + 1)
    }
    return " AND ".join(f'"{group}"' for group in sorted(groups))


def _pattern_expression(within: NameSet) -> str:
    """Returns a full-text expression that finds all names in `within`, and some other names. The expression is empty if
    there are more than `MAX_PATTERNS` patterns, or if a pattern has fewer than two characters before its first star."""
    if len(within.patterns) > MAX_PATTERNS:
        return ""
    expressions = [_groups_expression([START_OF_NAME + pattern.prefix]) for pattern in within.patterns]
    return " OR ".join(f"({expression})" for expression in expressions) if all(expressions) else ""


def _all_in(words: Sequence[str], text: str) -> bool:
    return all(word in text for word in words)


def _is_match(words: Sequence[str], name: str) -> bool:
    """Returns whether a name matches the words, by the rules of a search of the index (`_name_statements`):

    - If the search has a single word of one character, the name must begin with it.
    - If the search has a single word of two characters, a part of the name between slashes must begin with it.
    - Otherwise the name must contain all words."""
    if len(words) == 1 and len(words[0]) < GROUP_CHARACTERS - 1:
        return name.startswith(words[0])
    if len(words) == 1 and len(words[0]) < GROUP_CHARACTERS:
        return f"/{words[0]}" in f"/{name}"
    return _all_in(words, name)


def _rank(name: str, word: str) -> int:
    """Returns how well a name that contains `word` matches it; 0 is best."""
    if name.startswith(word):
        return 0
    if name.endswith(f"/{word}"):
        return 1
    return 2 if f"/{word}" in name else 3


def find_tags(
    db: apsw.Connection, words: Sequence[str], within: NameSet, offset: int, limit: int
) -> SearchPage[TagMatch]:
    """Finds tags. Splits the words of the query into parts at each ':'. Finds a tag if it meets both conditions:

    - The last part is at the beginning of the tag, or follows a '-' or '_' in the tag (`index_tables.words_of_tag`).
    - Each other part occurs in the text REPOSITORY:TAG."""
    parts = [part for word in words for part in word.split(":") if part]
    if not parts:
        return SearchPage([])
    *other_parts, last_part = parts
    scope = SearchScope.of(db, within)

    def convert(row: tuple[Any, ...]) -> tuple[object, TagMatch] | None:
        name, tag, digest, updated = row
        if not _all_in(other_parts, f"{name}:{tag.lower()}"):
            return None
        entry = TagMatch(str.__new__(RepositoryName, name), str.__new__(Tag, tag), _digest(digest), updated)
        return (name, tag), entry

    values: tuple[str, ...] = (last_part, last_part + LAST_CHARACTER)
    if scope.ids_json is None:
        return read_page(db, scope, _TAGS, values, offset, limit, convert)
    return read_page(db, scope, _TAGS_IN_REPOSITORIES, (*values, scope.ids_json), offset, limit, convert)


def find_labels(
    db: apsw.Connection, words: Sequence[str], within: NameSet, offset: int, limit: int
) -> SearchPage[LabelsMatch]:
    """Finds manifests by their labels and annotations."""
    searched_words = list(_cut_to_token_limits(words))
    if not searched_words:
        return SearchPage([])
    scope = SearchScope.of(db, within)
    expression = f"text : ({' AND '.join(map(_quoted, searched_words))})"
    if scope.ids is not None:
        if not scope.ids:
            return SearchPage([])
        expression += f" AND repository : ({' OR '.join(_quoted(str(row_id)) for row_id in scope.ids.values())})"

    def convert(row: tuple[Any, ...]) -> tuple[object, LabelsMatch]:
        name, digest, text, tag = row
        entry = LabelsMatch(
            str.__new__(RepositoryName, name),
            _digest(digest),
            None if tag is None else str.__new__(Tag, tag),
            _shown_labels(text, searched_words),
        )
        return (name, tag or digest), entry

    return read_page(db, scope, _LABELS, (expression,), offset, limit, convert)


def _cut_to_token_limits(words: Iterable[str]) -> Iterator[str]:
    """Yields those words of a search for labels that contain a token (letters or digits). Cuts a word after
    `MAX_TOKENS_OF_WORD` tokens. Ends after `MAX_TOKENS` tokens in total."""
    remaining = MAX_TOKENS
    for word in words:
        starts = [match.start() for match in _TOKEN.finditer(word)]
        limit = min(MAX_TOKENS_OF_WORD, remaining)
        if starts and limit:
            yield word if len(starts) <= limit else word[: starts[limit]]
            remaining -= min(len(starts), limit)


def _quoted(text: str) -> str:
    """Returns `text` as a phrase of a full-text search."""
    return '"' + text.replace('"', '""').replace("\0", " ") + '"'


def _shown_labels(text: str, words: Sequence[str]) -> dict[str, str]:
    """Returns at most `MAX_SHOWN_LABELS` labels that contain one of the words. Each line of `text` is a label in the
    form `NAME=VALUE`."""
    lines = [line for line in text.split("\n") if any(word in line.lower() for word in words)]
    return {name: value for name, _, value in (line.partition("=") for line in lines[:MAX_SHOWN_LABELS])}


def find_digests(db: apsw.Connection, digest: str, within: NameSet, offset: int, limit: int) -> SearchPage[DigestMatch]:
    """Finds manifests and blobs by the beginning of a digest."""
    algorithm, colon, digits = digest.lower().rpartition(":")
    if (colon and algorithm not in ALGORITHMS) or not _HEX.fullmatch(digits) or len(digits) < MIN_HEX_DIGITS:
        return SearchPage([])
    scope = SearchScope.of(db, within)

    def convert(row: tuple[Any, ...]) -> tuple[object, DigestMatch]:
        name, full_digest, tag, is_manifest = row
        entry = DigestMatch(
            str.__new__(RepositoryName, name),
            _digest(full_digest),
            bool(is_manifest),
            None if tag is None else str.__new__(Tag, tag),
        )
        return (name, full_digest), entry

    entries: list[DigestMatch] = []
    is_complete = True
    max_entries = offset + limit + 1
    first_digits = digits[:16]  # the index has only the first 16 digits of each digest
    pattern = f"{algorithm or '%'}:{digits}%"
    statements: list[tuple[str, tuple[Any, ...]]] = [
        # "g" sorts after all hexadecimal digits.
        (_MANIFESTS, (first_digits, first_digits + "g", pattern, scope.ids_json))
    ]
    for blob_algorithm in [algorithm] if algorithm else ALGORITHMS:
        statements.append(
            (_BLOBS, (f"{blob_algorithm}:{digits}", f"{blob_algorithm}:{digits}g", MAX_BLOBS, scope.ids_json))
        )
    for sql, values in statements:
        page = read_page(db, scope, sql, values, 0, max_entries, convert)
        entries += page.items
        is_complete &= page.is_complete
    if offset > MAX_OFFSET:
        return SearchPage([], is_complete=False)
    return SearchPage(entries[offset : offset + limit], more=len(entries) > offset + limit, is_complete=is_complete)


def first_tags(db: apsw.Connection, repo: RepositoryName, limit: int) -> list[tuple[Tag, Digest]]:
    """Returns the first `limit` tags of a repository, with the digests of their manifests. Raises NameUnknown."""
    repository = lookups.repository_id(db, repo)
    rows: list[Any] = db.execute(
        "SELECT t.name, m.digest FROM tag t JOIN manifest m ON m.id = t.manifest WHERE t.repository = ? "
        "ORDER BY t.name LIMIT ?",
        (repository, limit),
    ).fetchall()
    return [(str.__new__(Tag, name), _digest(digest)) for name, digest in rows]


def _digest(text: str) -> Digest:
    """Converts a text from the database to a `Digest`. Skips the checks of the constructor, which ran before the digest
    was stored."""
    return str.__new__(Digest, text)

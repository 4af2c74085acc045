"""Is this text one single read-only statement? Asked before SQLite sees it."""

from __future__ import annotations

import sqlglot
from sqlglot import Token, TokenType, exp
from sqlglot.errors import SqlglotError

_MAX_SQL_LENGTH = 50_000
_MAX_NESTING = 100
"""Parsers recurse; SQLite itself stops at depth 1000, and no honest query comes near this."""

_STARTS = (TokenType.SELECT, TokenType.WITH, TokenType.L_PAREN)
_START_WORDS = ("SELECT", "WITH")
_OPENING = (TokenType.L_PAREN, TokenType.CASE)
_CLOSING = (TokenType.R_PAREN, TokenType.END)
_PREFIX_OPERATORS = (TokenType.NOT, TokenType.DASH, TokenType.PLUS, TokenType.TILDE)

_NOT_A_SELECT = "it is not a SELECT"


def why_refused(sql: str) -> str:
    """Return why `sql` must not be executed, empty if it is one single SELECT.

    Text that starts like a SELECT but cannot be parsed is let through: SQLite names the
    mistake better than any other parser could, and its authorizer still allows reading only.
    """
    if not sql.strip():
        return "there is no statement"
    if len(sql) > _MAX_SQL_LENGTH:
        return f"it has {len(sql)} characters; at most {_MAX_SQL_LENGTH} are taken"
    try:
        tokens = sqlglot.tokenize(sql, read="sqlite")
    except SqlglotError:
        return "" if sql.split(maxsplit=1)[0].upper() in _START_WORDS else _NOT_A_SELECT
    reason = _why_tokens_refused(tokens)
    if reason:
        return reason
    try:
        trees = [tree for tree in sqlglot.parse(sql, read="sqlite") if tree is not None]
    except (SqlglotError, RecursionError):
        return ""
    return "" if len(trees) == 1 and isinstance(trees[0], exp.Query) else _NOT_A_SELECT


def _why_tokens_refused(tokens: list[Token]) -> str:
    if not tokens:
        return "there is no statement"
    if tokens[0].token_type not in _STARTS:
        return f"{_NOT_A_SELECT} but starts with {tokens[0].text[:20]!r}"
    kinds = [token.token_type for token in tokens]
    while kinds and kinds[-1] is TokenType.SEMICOLON:
        kinds.pop()
    if TokenType.SEMICOLON in kinds:
        return "there is more than one statement"
    if _nesting(kinds) > _MAX_NESTING:
        return f"it is nested more than {_MAX_NESTING} deep"
    return ""


def _nesting(kinds: list[TokenType]) -> int:
    """Return how deep a parser has to recurse: brackets, CASE, and runs of prefix operators."""
    deepest = depth = run = 0
    for kind in kinds:
        if kind in _OPENING:
            depth += 1
        elif kind in _CLOSING:
            depth -= 1
        run = run + 1 if kind in _PREFIX_OPERATORS else 0
        deepest = max(deepest, depth + run)
    return deepest

"""How many token ids a tokenizer directory uses, read as plain JSON."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mbridge_config.facts.model import existing_directory, read_json_object
from mbridge_config.paths import is_file
from mbridge_config.problems import ConfigError, Problem

_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")


def tokenizer_size(directory: str | Path) -> int | None:
    """Return the largest token id of the tokenizer in `directory` plus one, added tokens included.

    None where no JSON file lists the ids (a bare SentencePiece model). Raises `ConfigError` for a missing
    directory, one without tokenizer files, and broken JSON.
    """
    directory = existing_directory(directory)
    if not any(is_file(directory / name) for name in _FILES):
        raise ConfigError(
            Problem(
                id="tokenizer-files",
                key=None,
                value=str(directory),
                reason=f"there is no tokenizer in the directory: none of {', '.join(_FILES)}",
                fix="give the directory that holds tokenizer.json",
            )
        )
    ids: list[int] = []
    for name, ids_of in (
        ("tokenizer.json", _fast),
        ("vocab.json", _values),
        ("added_tokens.json", _values),
        ("tokenizer_config.json", _decoder),
    ):
        file = directory / name
        # vocab.json repeats what tokenizer.json has
        if is_file(file) and not (name == "vocab.json" and ids):
            ids += [number for number in ids_of(read_json_object(file, "tokenizer-json")) if type(number) is int]
    return max(ids) + 1 if ids else None


def token_ids(directory: Path) -> dict[str, int]:
    """Return the tokens that `tokenizer.json` or `vocab.json` in `directory` lists, with their ids; empty without them.

    Raises `ConfigError` for broken JSON.
    """
    fast, slow = directory / "tokenizer.json", directory / "vocab.json"
    found: dict[Any, Any] = {}
    if is_file(fast):
        content = read_json_object(fast, "tokenizer-json")
        model, added = content.get("model"), content.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            found = dict(vocabulary)
        elif isinstance(vocabulary, list):
            entries = [entry for entry in enumerate(vocabulary) if isinstance(entry[1], list) and entry[1]]
            found = {str(entry[0]): number for number, entry in entries}
        for token in added if isinstance(added, list) else []:
            if isinstance(token, dict):
                found[str(token.get("content"))] = token.get("id")
    elif is_file(slow):
        found = read_json_object(slow, "tokenizer-json")
    return {token: number for token, number in found.items() if type(number) is int}


def _fast(content: dict[str, Any]) -> Iterable[Any]:
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):  # BPE, WordPiece: token -> id
        yield from vocabulary.values()
    elif isinstance(vocabulary, list):  # Unigram: the place in the list is the id
        yield len(vocabulary) - 1
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        yield token.get("id") if isinstance(token, dict) else None


def _values(content: dict[str, Any]) -> Iterable[Any]:
    return content.values()


def _decoder(content: dict[str, Any]) -> Iterable[Any]:
    decoder = content.get("added_tokens_decoder")
    return [int(number) for number in decoder if number.isdecimal()] if isinstance(decoder, dict) else []

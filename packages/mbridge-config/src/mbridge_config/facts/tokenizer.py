"""How many token ids a tokenizer directory uses, read as plain JSON."""

from pathlib import Path
from typing import Any

from mbridge_config.facts.model import existing_directory, read_json_object
from mbridge_config.paths import is_file
from mbridge_config.problems import refusal

_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "tokenizer_config.json")


def tokenizer_size(directory: str | Path) -> int | None:
    """Return the largest token id of the tokenizer in `directory` plus one, added tokens included.

    None where no JSON file lists the ids (a bare SentencePiece model). Raises `ConfigError` for a missing
    directory, one without tokenizer files, and broken JSON.
    """
    directory = existing_directory(directory)
    if not any(is_file(directory / name) for name in _FILES):
        reason = f"there is no tokenizer in the directory: none of {', '.join(_FILES)}"
        raise refusal("tokenizer-files", reason, "give the directory that holds tokenizer.json", value=str(directory))
    decoder = _read(directory / "tokenizer_config.json").get("added_tokens_decoder")
    added = [int(number) for number in decoder if number.isdecimal()] if isinstance(decoder, dict) else []
    ids = [*token_ids(directory).values(), *_whole_numbers(_read(directory / "added_tokens.json")).values(), *added]
    return max(ids) + 1 if ids else None


def token_ids(directory: Path) -> dict[str, int]:
    """Return the tokens that `tokenizer.json` or `vocab.json` in `directory` lists, with their ids; empty without them.

    Raises `ConfigError` for broken JSON.
    """
    content = _read(directory / "tokenizer.json")
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    found: dict[Any, Any] = {}
    if isinstance(vocabulary, dict):  # BPE, WordPiece: token -> id
        found = dict(vocabulary)
    elif isinstance(vocabulary, list):  # Unigram: the place in the list is the id
        found = {str(entry[0]): number for number, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            found[str(token.get("content"))] = token.get("id")
    # vocab.json repeats what tokenizer.json has
    return _whole_numbers(found) or _whole_numbers(_read(directory / "vocab.json"))


def _read(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`, empty without the file. Raises `ConfigError` for broken JSON."""
    return read_json_object(file, "tokenizer-json") if is_file(file) else {}


def _whole_numbers(tokens: dict[Any, Any]) -> dict[str, int]:
    return {token: number for token, number in tokens.items() if type(number) is int}

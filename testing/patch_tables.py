"""Checks of a table of patches on the libraries themselves."""

from typing import Any

import pytest
from mbridge_model.patches import PatchError, PatchTable
from mbridge_model.patches.patch import _ABSENT, _prepare


def check_table(table: PatchTable) -> None:
    """Apply, refuse and undo the table in this process, and leave it as it was."""
    was_applied = table.is_applied
    table.undo()
    changes = [_prepare(patch, None) for patch in table.patches]

    def found() -> list[Any]:
        return [getattr(change.owner, change.name, None) for change in changes]

    before = found()
    assert all(patch.reason for patch in table.patches)
    assert table.apply() and not table.apply(), "the second time there is nothing to do"
    assert all(new != old for new, old in zip(found(), before, strict=True))
    first = next(change for change in changes if change.name != "__code__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first.owner, first.name, object())
        applied = found()
        with pytest.raises(PatchError, match=f"cannot put back {first.target}: something else has replaced it"):
            table.undo()
        assert (table.is_applied, found()) == (True, applied)
    table.undo()
    table.undo()
    assert not table.is_applied
    assert all(now == old for now, old in zip(found(), before, strict=True))

    gone = next(change for change in changes if change.old is not _ABSENT and change.name != "__code__")
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(gone.owner, gone.name)
        with pytest.raises(PatchError, match=f"cannot {table.purpose} on .*{gone.target}: there is no '{gone.name}'"):
            table.apply()
        assert not table.is_applied
    assert all(now == old for now, old in zip(found(), before, strict=True))
    if was_applied:
        table.apply()

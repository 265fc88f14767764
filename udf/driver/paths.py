"""An FsDriver as pyfuse3.Operations: inodes and handles on FUSE's side, paths on the author's.

Owns: nothing of its own; it is names.py, attributes.py and contents.py in one object. None of them catches what an
author raises (the host's guard maps it), or answers what an author got wrong (convert.py refuses it).
Called by: udf/host/serve.py. The rules it rests on know nothing of pyfuse3: tree.py (ids and paths), gate.py (who may
work where), hiding.py (removed but open), absent.py (missing verbs).
"""

from __future__ import annotations

from udf.driver.attributes import AttributeOperations
from udf.driver.contents import ContentOperations
from udf.driver.names import NameOperations


class PathOperations(NameOperations, AttributeOperations, ContentOperations):
    """Serves one FsDriver."""

    async def finish(self) -> None:
        """The orderly end: remove what is only here because it was open."""
        await self._hiding.bury_all()

"""What a converted FFN knows of its making, for `hf_glu.revert`: a checksum of the out-projection that it then had.

It is kept with the in-projection in memory, not in checkpoints.
"""

from __future__ import annotations

from hf_glu.ffn.sites import Site
from hf_glu.instruments.equality import checksum

_SUM = "_hf_glu_out_sum"


def note_making(site: Site) -> None:
    """Remember the out-projection of a site that is being widened, before it is fitted."""
    vars(site.in_proj)[_SUM] = checksum(*site.out_proj.parameters(recurse=False))


def made_with(site: Site) -> bool | None:
    """Tell whether a site has the out-projection that it was converted with; None: nobody knows."""
    known = vars(site.in_proj).get(_SUM)
    return None if known is None else bool(known == checksum(*site.out_proj.parameters(recurse=False)))

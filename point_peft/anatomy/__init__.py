"""A backbone as the library understands it; nothing in here runs a model.

`description` says what an anatomy holds, `structure` and `roles` find blocks and what their layers make, `families` and
`presets` know what structure does not tell, `checking` compares an anatomy with a model.
"""

from point_peft.anatomy.description import Anatomy, Block, PrefixParameter, Read, Stage, Tap

__all__ = ["Anatomy", "Block", "PrefixParameter", "Read", "Stage", "Tap"]
